"""The flags of each engine's command line: names, aliases and number of values.

`benchmarks/record_flags.py` records the tables from the engines' own parsers. Each table names its version and source.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Final

from moetune.errors import UsageError
from moetune.inputs.suggestions import MOST_COMPARED
from moetune.quoting import quoted
from moetune.spec.enums import ENGINE_TITLES

ENGINES: Final = tuple(ENGINE_TITLES)
VALUES: Final = ("none", "one", "optional", "many", "json")
"""How many words a flag takes: none (a switch), one, at most one, one or more, or one JSON object."""
_ATTACHED: Final = re.compile(r"-?([A-Za-z])(\S+)")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of an engine. All names are without leading dashes and with `-` for `_`.

    Attributes:
        name: the canonical name.
        aliases: other names with two dashes.
        value: the number of words that it takes, one of `VALUES`.
        short: names with one dash, such as `tp` for `-tp`.
        negative: the names that switch it off, such as `no-x` and `disable-x`.
        spelled: the flag as a user writes it, with dashes.
        note: for a flag that the newest version does not have, since when, and its replacement. Otherwise empty.
    """

    name: str
    aliases: tuple[str, ...] = ()
    value: str = "one"
    short: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    spelled: str = ""
    note: str = ""

    @property
    def is_removed(self) -> bool:
        """Whether the newest version does not have the flag any more. `note` then names the replacement."""
        return bool(self.note)

    def negates(self, name: str) -> bool:
        """Returns whether `name`, by which the flag was found, switches it off.

        >>> table("vllm").find("no-enable-expert-parallel").negates("no-enable-expert-parallel")
        True
        """
        return _plain(name) in self.negative


@dataclass(frozen=True, slots=True)
class FlagTable:
    """The flags of one program.

    Attributes:
        engine, program, version: what the flags were recorded from.
        flags: the flags by canonical name.
        abbreviations: whether an unambiguous beginning of a long flag stands for it.
        dotted: whether `--x.key VALUE` sets a key of a flag that takes a JSON object.
        removed: flags of older versions, by canonical name.
    """

    engine: str
    program: str
    version: str
    flags: Mapping[str, Flag]
    abbreviations: bool = False
    dotted: bool = False
    removed: Mapping[str, Flag] = field(default_factory=dict)
    _names: Mapping[str, Flag] = field(default_factory=dict, repr=False)
    _short: Mapping[str, Flag] = field(default_factory=dict, repr=False)

    def find(self, name: str) -> Flag | None:
        """Returns the flag that a user wrote, or None if the engine has no such flag.

        Args:
            name: the flag without `=value`, with its dashes or without, with `_` or `-`. It can be any name of the
                flag, a flag of an older version, `x.key` if x takes a JSON object, or an unambiguous beginning if the
                program accepts one. It can also be a one-letter flag with its value attached (`-O3`). The `value` of
                the returned flag is then `none`, because no further word belongs to it, and `attached` returns the
                value.
        """
        plain = _plain(name)
        if name.startswith("-") and not name.startswith("--"):
            found = self._short.get(plain)
        elif name.startswith("--"):
            found = self._names.get(plain)
        else:
            found = self._names.get(plain) or self._short.get(plain)
        if found is not None:
            return found
        if self.dotted and "." in name:
            owner = self.find(name.partition(".")[0])
            return owner if owner is not None and owner.value == "json" else None
        if not name.startswith("--") and self.attached(name) is not None:
            return replace(self._short[plain[0]], value="none")
        return self._abbreviated(name, plain) or self.removed.get(plain)

    def attached(self, name: str) -> str | None:
        """Returns the value that is attached to a one-letter flag, such as `3` in `-O3`, or None."""
        match = _ATTACHED.fullmatch(name)
        if match is None or _plain(name) in self._names or _plain(name) in self._short:
            return None
        flag = self._short.get(match[1])
        if flag is None or flag.value == "none" or not (name.startswith("-") or match[2][0].isdigit()):
            return None
        return match[2].removeprefix("=")

    def nearest(self, name: str) -> str | None:
        """Returns the canonical name of the flag with the most similar spelling, or None."""
        names = {
            **{removed: removed for removed in self.removed},
            **{one: self._names[one].name for one in self._names},
        }
        names |= {one: flag.name for one, flag in self._short.items() if len(one) > 1}
        near = difflib.get_close_matches(_plain(name.partition(".")[0])[:MOST_COMPARED], names, n=1, cutoff=0.7)
        return names[near[0]] if near else None

    def _abbreviated(self, name: str, plain: str) -> Flag | None:
        if not self.abbreviations or (name.startswith("-") and not name.startswith("--")) or len(plain) < 2:
            return None
        begun = [one for one in self._names if one.startswith(plain)]
        return self._names[begun[0]] if len(begun) == 1 else None


@functools.cache
def table(engine: str, program: str | None = None) -> FlagTable:
    """Returns the flags of an engine's server, or of another of its programs (`dynamo.vllm`, `trtllm-bench`).

    A program without a table of its own has the flags of its engine's server.

    Raises:
        UsageError: there is no such engine.
    """
    if engine not in ENGINES:
        raise UsageError(f"No flags are known of engine {quoted(engine)}.", f"Known: {', '.join(ENGINES)}.")
    kept = json.loads(
        resources.files("moetune.inputs").joinpath("flags").joinpath(f"{engine}.json").read_text(encoding="utf-8")
    )
    own = kept.get("programs", {}).get(program or "", {})
    flags = kept["flags"] if not own else {**(kept["flags"] if own.get("extends", False) else {}), **own["flags"]}
    removed = kept.get("removed", {}) if not own or own.get("extends", False) else own.get("removed", {})
    current = {name: _flag(name, said) for name, said in flags.items()}
    by_name = {one: flag for flag in current.values() for one in _long_names(flag)}
    return FlagTable(
        engine,
        program or engine,
        own.get("version", kept["version"]),
        current,
        own.get("abbreviations", kept["abbreviations"]),
        own.get("dotted", kept["dotted"]),
        {name: _flag(name, said) for name, said in removed.items() if name not in by_name},
        by_name,
        {one: flag for flag in current.values() for one in flag.short},
    )


def _flag(name: str, said: Mapping[str, Any]) -> Flag:
    lists = {key: tuple(said.get(key, ())) for key in ("aliases", "short", "negative")}
    return Flag(name, value=said["value"], spelled=said.get("spelled", f"--{name}"), note=said.get("note", ""), **lists)


def _long_names(flag: Flag) -> Iterator[str]:
    yield flag.name
    yield from flag.aliases
    yield from flag.negative


def _plain(name: str) -> str:
    """Returns `name` without leading dashes and with `-` for `_`. A key after a dot is not changed."""
    head, dot, key = name.lstrip("-").partition(".")
    return head.replace("_", "-") + dot + key
