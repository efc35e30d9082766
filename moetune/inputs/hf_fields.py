"""Reads and checks the fields of a config. Every error names the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moetune.errors import UsageError
from moetune.quoting import quoted

Config = Mapping[str, Any]
Names = tuple[str, ...]
Meaning = TypeVar("Meaning")
SIZES_HINT = "Give the layer's sizes: --experts 256 --top-k 8 --hidden 7168 --intermediate 2048."


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one config. A name can contain dots: `ffn_config.moe_top_k` is a field of an object.

    If a method gets several names, they are alternatives, and the first with a value other than null is used.

    Attributes:
        config: the parsed object.
        defaults: the defaults of the config class. Sizes have none.
        where: the file, for errors.
    """

    config: Config
    defaults: Config
    where: str

    def found(self, *names: str) -> tuple[str, Any]:
        """Returns the first of `names` with a value, and the value; or the first that is null, and None."""
        values = [(name, self._written(name)) for name in names]
        for name, value in values:
            if value is not None and value is not _ABSENT:
                return name, value
        there = [name for name, value in values if value is None]
        if there:
            return there[0], None
        known = next((name for name in names if name in self.defaults), names[0])
        return known, self.defaults.get(known)

    def get(self, *names: str) -> Any:
        """Returns the value as written, or the default of the config class. None means null."""
        return self.found(*names)[1]

    def size(self, *names: str, first_of_list: bool = False) -> int:
        """Returns a positive integer, which must be given.

        A list has one entry a layer, and all must be equal, unless `first_of_list`: then its first is returned.

        Raises:
            UsageError: it is missing, or invalid.
        """
        name = next((name for name in names if self._written(name) not in (None, _ABSENT)), None)
        if name is None:
            raise UsageError(f"{self.where} lacks the field {' or '.join(names)}.", SIZES_HINT)
        return self._integer(name, self._written(name), least=1, first_of_list=first_of_list)

    def integer(self, *names: str, default: int = 0, least: int = 0) -> int:
        """Returns an integer of at least `least`; `default` if null. The entries of a list must be equal.

        Raises:
            UsageError: it is invalid.
        """
        name, value = self.found(*names)
        return default if value is None else self._integer(name, value, least)

    def number(self, *names: str, default: float) -> float:
        """Returns a finite positive number; `default` if null.

        Raises:
            UsageError: it is invalid.
        """
        name, value = self.found(*names)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UsageError(f"{self.where}: {name} must be a positive number, given {quoted(value)}.", SIZES_HINT)
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """Returns a boolean; `default` if null.

        Raises:
            UsageError: it is invalid.
        """
        name, value = self.found(*names)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UsageError(f"{self.where}: {name} must be true or false, given {quoted(value)}.", SIZES_HINT)
        return value

    def choice(self, *names: str, choices: Mapping[str, Meaning], default: str) -> Meaning:
        """Returns the value in `choices` of the string in the field; that of `default` if null.

        Raises:
            UsageError: the string is not in `choices`.
        """
        name, value = self.found(*names)
        value = value or default
        if not isinstance(value, str) or value not in choices:
            raise UsageError(
                f"{self.where}: {name} must be one of {', '.join(choices)}; given {quoted(value)}.", SIZES_HINT
            )
        return choices[value]

    def _written(self, name: str) -> Any:
        value: Any = self.config
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return _ABSENT
            value = value[part]
        return value

    def _integer(self, name: str, value: Any, least: int, first_of_list: bool = False) -> int:
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            if not first_of_list and any(entry != value[0] for entry in value):
                raise UsageError(f"{self.where}: {name} differs between layers: {quoted(value)}.", SIZES_HINT)
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(
                f"{self.where}: {name} must be an integer of at least {least}, given {quoted(value)}.", SIZES_HINT
            )
        return value


_ABSENT: Any = object()
