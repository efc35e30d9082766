"""Finds the decoder layers whose experts are in a list of module names of a quantization config.

A list can mix three spellings: `re:PATTERN`, matched from the start of a name; shell patterns with `*`; and plain
names, which mean every module whose path contains their components in a row. Sources: vLLM 0.33.0,
`model_executor/layers/quantization/` (`utils/quant_utils.py: is_layer_skipped`, `utils/config_utils.py:
is_equal_or_regex_match`, `modelopt.py: is_layer_excluded`); transformers 5.24.0,
`quantizers/quantizers_utils.py: should_convert_module`.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from moetune.errors import UsageError
from moetune.quoting import quoted, shortened

PREFIXES = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "thinker.model.layers",
    "backbone.layers",
    "transformer.blocks",
    "layers",
)
"""The names before a decoder layer's number, in checkpoints and in engines."""
MATRICES = (
    ("0.gate_proj", "0.up_proj", "0.down_proj"),
    ("0.w1", "0.w3", "0.w2"),
    ("gate_up_proj", "down_proj"),
    ("gate_proj", "up_proj", "down_proj"),
)
"""The spellings of one expert's matrices, then of the tensors that have those of all experts. An engine looks up the
first expert only (vLLM `compressed_tensors_moe.py`)."""
_LAYER = re.compile(r"(?:^|[.*])(?:layers|blocks|h)\.(\d{1,9})(?=\.|\*|$)")
_NAMES_EXPERTS = re.compile(r"(?<![A-Za-z_])experts(?![A-Za-z_])")
_ELSEWHERE = re.compile(r"mtp|nextn|eagle|shared|vision|visual|image|audio|talker|resampler|experts\\?\.[\d(\[\\]")
MOST_PATTERNS = 2_000
"""The most patterns with wildcards in a list. Plain names are not counted."""
MOST_IN_PATTERN = 2_000
MOST_REPEATS = 5
MOST_SECONDS = 0.5
"""Of processor time, for the patterns of one list."""
_REPEAT = re.compile(r"(?<!\\)[*+]|(?<![\\(*+?}])\?|(?<!\\)\{\d*,?\d*\}")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_REGEX_MARKS = re.compile(r"[\^$()|\\+{]")


@dataclass(frozen=True)
class ExpertModules:
    """The experts' modules of a model.

    Attributes:
        experts: the modules' names in a decoder layer, such as `mlp.experts`.
        layers: the numbers of the layers that have experts.
    """

    experts: tuple[str, ...]
    layers: tuple[int, ...]

    def meant_by(self, names: Iterable[str], where: str) -> frozenset[int]:
        """Returns the layers all of whose experts' matrices are named by `names`.

        Args:
            names: names and patterns of modules.
            where: the list that has them, for errors.

        Raises:
            UsageError: a pattern is not a regular expression, matches no known experts, or only some of an expert's
                matrices are named.
        """
        patterns = [_Pattern(name, where) for name in dict.fromkeys(names)]
        plain = frozenset(p.text for p in patterns if p.expression is None and self._words.issuperset(p.components))
        searched = [pattern for pattern in patterns if pattern.expression is not None]
        if len(searched) > MOST_PATTERNS:
            raise UsageError(f"{where}: more than {MOST_PATTERNS} patterns.", "Pass --precision.")
        used: set[str] = set()
        clock = _Clock(where)
        found = frozenset(layer for layer in self.layers if self._is_meant(layer, plain, searched, used, clock))
        for pattern in patterns:
            if pattern.text in used or not self._should_match(pattern.text):
                continue
            if not any(pattern.matches(name, clock) for layer in self.layers for name in self._names(layer)):
                raise UsageError(
                    f"{where}: {quoted(pattern.given)} names experts, but not as {PREFIXES[0]}.N.{self.experts[0]}.",
                    "Pass --precision.",
                )
            if not found:
                raise UsageError(
                    f"{where}: {quoted(pattern.given)} names only some of an expert's matrices.", "Pass --precision."
                )
        return found

    def _is_meant(
        self, layer: int, plain: frozenset[str], searched: list[_Pattern], used: set[str], clock: _Clock
    ) -> bool:
        """Returns whether the layer's module, or each matrix in one spelling, is named. Adds its names to `used`."""
        searched = [pattern for pattern in searched if pattern.layer in (None, layer)]

        def named(name: str) -> set[str]:
            hits = _runs(name) & plain if plain else set()
            return hits | {pattern.text for pattern in searched if pattern.matches(name, clock)}

        if not plain and not searched:
            return False
        for module in self._modules(layer):
            spellings: list[list[set[str]]] = [[named(module)]]
            spellings += [[named(f"{module}.{part}") for part in parts] for parts in MATRICES]
            if meaning := next((hits for hits in spellings if all(hits)), None):
                used.update(*meaning)
                return True
        return False

    def _modules(self, layer: int) -> Iterator[str]:
        return (f"{prefix}.{layer}.{experts}" for prefix in PREFIXES for experts in self.experts)

    def _names(self, layer: int) -> Iterator[str]:
        for module in self._modules(layer):
            yield module
            yield from (f"{module}.{part}" for parts in MATRICES for part in parts)

    @cached_property
    def _numbers(self) -> frozenset[int]:
        return frozenset(self.layers)

    @cached_property
    def _words(self) -> frozenset[str]:
        """Returns all components of the known names. A plain name with any other component names no experts."""
        dotted = (*PREFIXES, *self.experts, *(part for parts in MATRICES for part in parts), *map(str, self.layers))
        return frozenset(word for name in dotted for word in name.split("."))

    def _should_match(self, text: str) -> bool:
        """Returns whether a pattern is about these experts. Some are about other parts, or about a single expert."""
        if not _NAMES_EXPERTS.search(text) or _ELSEWHERE.search(text):
            return False
        numbers = [int(number) for number in _LAYER.findall(text)]
        return not numbers or any(number in self._numbers for number in numbers)


def mentioned_layers(names: Iterable[str]) -> frozenset[int]:
    """Returns the layer numbers in `names`."""
    return frozenset(int(number) for name in names for number in _LAYER.findall(name))


@dataclass(frozen=True)
class _Pattern:
    given: str
    where: str

    @cached_property
    def is_regular(self) -> bool:
        """Returns whether it is a regular expression: marked by `re:`, or with characters that only those have."""
        return self.given.startswith(("re:", ".*")) or bool(_REGEX_MARKS.search(self.given))

    @cached_property
    def text(self) -> str:
        return self.given.removeprefix("re:") if self.is_regular else self.given.strip(".")

    @cached_property
    def expression(self) -> re.Pattern[str] | None:
        """Returns the compiled pattern, or None for a plain name."""
        if self.is_regular:
            _require_fast(self.text, f"{self.where}: {quoted(self.given)}")
            try:
                # Without `re:` a match must end where a module's name ends (transformers: should_convert_module).
                return re.compile(self.text if self.given.startswith("re:") else rf"(?:{self.text})(?=\.|$)")
            except (re.error, RecursionError, OverflowError) as error:
                raise UsageError(
                    f"{self.where}: {quoted(self.given)} is not a regular expression: {shortened(str(error))}.",
                    "Pass --precision.",
                ) from None
        if not any(mark in self.text for mark in "*?["):
            return None
        # ModelOpt's `layers.1*` means layer 1 and its modules, not layer 10 (modelopt.py: apply_vllm_mapper).
        if re.search(r"\d\*$", self.text):
            return re.compile(fnmatch.translate(self.text[:-1]) + "|" + fnmatch.translate(self.text[:-1] + ".*"))
        return re.compile(fnmatch.translate(self.text))

    @cached_property
    def repeats(self) -> int:
        return min(MOST_REPEATS, len(_REPEAT.findall(self.text)))

    @cached_property
    def components(self) -> frozenset[str]:
        return frozenset(self.text.split("."))

    def matches(self, name: str, clock: _Clock) -> bool:
        """Returns whether the pattern names this module, or one that contains it."""
        clock.check(self.repeats)
        return self.text in _runs(name) if self.expression is None else bool(self.expression.match(name))

    @cached_property
    def layer(self) -> int | None:
        """Returns the only layer that the pattern can name, or None if there can be others. It saves comparisons."""
        number = None if self.is_regular else _LAYER.search(self.text)
        return int(number.group(1)) if number else None


class _Clock:
    """Ends a search that takes too long."""

    def __init__(self, where: str) -> None:
        self._where, self._began, self._steps = where, time.thread_time(), 0

    def check(self, repeats: int) -> None:
        """Raises UsageError if the search has taken more than `MOST_SECONDS`.

        Args:
            repeats: the repetitions of the next pattern. The time is read before one with many, and seldom otherwise.
        """
        self._steps += 4**repeats
        if self._steps < 4**MOST_REPEATS:
            return
        self._steps = 0
        if time.thread_time() - self._began > MOST_SECONDS:
            raise UsageError(f"{self._where}: its patterns take too long to search for.", "Pass --precision.")


def _require_fast(text: str, what: str) -> None:
    """Checks that a regular expression needs little time: it repeats single characters only, and few of them.

    `(a+)+` needs time that doubles with each character of the name that it does not match.

    Raises:
        UsageError: it repeats a group, or has too many repetitions.
    """
    repeats = len(_REPEAT.findall(text))
    if len(text) > MOST_IN_PATTERN or repeats > MOST_REPEATS or _REPEATED_GROUP.search(text):
        raise UsageError(
            f"{what} can take too long: moetune reads regular expressions of at most {MOST_IN_PATTERN} characters and "
            f"{MOST_REPEATS} repetitions, none of a group.",
            "Pass --precision.",
        )


def _runs(name: str) -> set[str]:
    """Returns every run of components of a dotted name: a, b and a.b of `a.b`."""
    components = name.split(".")
    size = len(components)
    return {".".join(components[start:end]) for start in range(size) for end in range(start + 1, size + 1)}
