"""Which decoder layers' experts a list of module names means, as quantization configs write such lists.

Three spellings are understood wherever they stand: `re:PATTERN`, matched from the start of a name; shell patterns with
`*`; and plain names, which mean a module wherever their components stand in its path. Sources: vLLM 0.33.0,
`model_executor/layers/quantization/` (`utils/quant_utils.py: is_layer_skipped`, `utils/config_utils.py:
is_equal_or_regex_match`, `modelopt.py: is_layer_excluded`); transformers 5.24.0,
`quantizers/quantizers_utils.py: should_convert_module`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from moetune.errors import UsageError

PREFIXES = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "thinker.model.layers",
    "backbone.layers",
    "transformer.blocks",
    "layers",
)
"""What stands before a decoder layer's number in checkpoints and in engines."""
MATRICES = (
    ("0.gate_proj", "0.up_proj", "0.down_proj"),
    ("0.w1", "0.w3", "0.w2"),
    ("gate_up_proj", "down_proj"),
    ("gate_proj", "up_proj", "down_proj"),
)
"""The spellings of one expert's matrices, then of all experts' in one tensor each. An engine asks the first expert for
all (vLLM `compressed_tensors_moe.py`)."""
_LAYER = re.compile(r"(?:^|[.*])(?:layers|blocks|h)\.(\d+)(?=\.|\*|$)")
_NAMES_EXPERTS = re.compile(r"(?<![A-Za-z_])experts(?![A-Za-z_])")
_ELSEWHERE = re.compile(r"mtp|nextn|eagle|shared|vision|visual|image|audio|talker|resampler|experts\\?\.[\d(\[\\]")
_REGEX_MARKS = re.compile(r"[\^$()|\\+{]")


@dataclass(frozen=True)
class ExpertModules:
    """The experts' modules of a model.

    `experts`: their names within a decoder layer, as `mlp.experts`. `layers`: the numbers of those that have them.
    """

    experts: tuple[str, ...]
    layers: tuple[int, ...]

    def meant_by(self, names: Iterable[str], where: str) -> frozenset[int]:
        """The layers whose experts as a whole are meant by `names`.

        Raises:
            UsageError: a pattern is no regular expression, names experts of no layer that is known here, or all that
                are named are single matrices; `where` says which list it stands in.
        """
        patterns = [_Pattern(name, where) for name in dict.fromkeys(names)]
        plain = frozenset(p.text for p in patterns if p.expression is None and self._words.issuperset(p.components))
        searched = [pattern for pattern in patterns if pattern.expression is not None]
        used: set[str] = set()
        found = frozenset(layer for layer in self.layers if self._is_meant(layer, plain, searched, used))
        for pattern in patterns:
            if pattern.text in used or not self._should_meet(pattern.text):
                continue
            if not any(pattern.meets(name) for layer in self.layers for name in self._names(layer)):
                raise UsageError(
                    f"{where}: {pattern.given!r} names experts, but not as moetune knows them: "
                    f"{PREFIXES[0]}.N.{self.experts[0]}."
                )
            if not found:
                raise UsageError(f"{where}: {pattern.given!r} names only some of an expert's matrices.")
        return found

    def _is_meant(self, layer: int, plain: frozenset[str], searched: list[_Pattern], used: set[str]) -> bool:
        """Whether the layer's module, or each matrix of one of its spellings, is named; `used` gets what names it."""
        searched = [pattern for pattern in searched if pattern.layer in (None, layer)]

        def named(name: str) -> set[str]:
            hits = _runs(name) & plain if plain else set()
            return hits | {pattern.text for pattern in searched if pattern.meets(name)}

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
    def _words(self) -> frozenset[str]:
        """All components of the names here; a plain name with another one means none of them."""
        dotted = (*PREFIXES, *self.experts, *(part for parts in MATRICES for part in parts), *map(str, self.layers))
        return frozenset(word for name in dotted for word in name.split("."))

    def _should_meet(self, text: str) -> bool:
        """Whether a pattern should have met some experts; those of other parts, or of one expert alone, need not."""
        if not _NAMES_EXPERTS.search(text) or _ELSEWHERE.search(text):
            return False
        numbers = [int(number) for number in _LAYER.findall(text)]
        return not numbers or any(number in self.layers for number in numbers)


def mentioned_layers(names: Iterable[str]) -> frozenset[int]:
    """The layer numbers that stand in `names`."""
    return frozenset(int(number) for name in names for number in _LAYER.findall(name))


@dataclass(frozen=True)
class _Pattern:
    given: str
    where: str

    @cached_property
    def is_regular(self) -> bool:
        """Whether it is a regular expression, marked as one or by its looks."""
        return self.given.startswith(("re:", ".*")) or bool(_REGEX_MARKS.search(self.given))

    @cached_property
    def text(self) -> str:
        return self.given.removeprefix("re:") if self.is_regular else self.given.strip(".")

    @cached_property
    def expression(self) -> re.Pattern[str] | None:
        """None for a plain name."""
        if self.is_regular:
            try:
                # One that is not marked ends where a module's name ends (transformers: should_convert_module).
                return re.compile(self.text if self.given.startswith("re:") else rf"(?:{self.text})(?=\.|$)")
            except re.error as error:
                raise UsageError(f"{self.where}: {self.given!r} is no regular expression: {error}.") from None
        if not any(mark in self.text for mark in "*?["):
            return None
        # ModelOpt's `layers.1*` means layer 1 and what is in it, not layer 10 (modelopt.py: apply_vllm_mapper).
        if re.search(r"\d\*$", self.text):
            return re.compile(fnmatch.translate(self.text[:-1]) + "|" + fnmatch.translate(self.text[:-1] + ".*"))
        return re.compile(fnmatch.translate(self.text))

    @cached_property
    def components(self) -> frozenset[str]:
        return frozenset(self.text.split("."))

    def meets(self, name: str) -> bool:
        """Whether the pattern means the module of this name, or one that it lies in."""
        return self.text in _runs(name) if self.expression is None else bool(self.expression.match(name))

    @cached_property
    def layer(self) -> int | None:
        """The one layer that a shell pattern names, for speed; None where it may be any."""
        number = None if self.is_regular else _LAYER.search(self.text)
        return int(number.group(1)) if number else None


def _runs(name: str) -> set[str]:
    """Every run of components of a dotted name: `a.b` → a, b, a.b."""
    components = name.split(".")
    size = len(components)
    return {".".join(components[start:end]) for start in range(size) for end in range(start + 1, size + 1)}
