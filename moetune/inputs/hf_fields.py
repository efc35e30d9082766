"""Checked access to a config's fields: every error names the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moetune.errors import UsageError

Config = Mapping[str, Any]
Names = tuple[str, ...]
Meaning = TypeVar("Meaning")
SIZES_HINT = "Give the layer's sizes: --experts 256 --top-k 8 --hidden 7168 --intermediate 2048."


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one config. A name may lead into an object: `ffn_config.moe_top_k`.

    Where several names are given they are alternatives: the first that is there and not null counts. `defaults` are
    the config class's; sizes have none.
    """

    config: Config
    defaults: Config
    where: str

    def found(self, *names: str) -> tuple[str, Any]:
        """The first of `names` that has a value, and the value; else the first name that is there, with None."""
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
        """The value as it is written, or the config class's; an explicit null is None."""
        return self.found(*names)[1]

    def size(self, *names: str, first_of_list: bool = False) -> int:
        """A required positive integer. Of a list, one entry a layer, all must be equal; or its first is taken."""
        name = next((name for name in names if self._written(name) not in (None, _ABSENT)), None)
        if name is None:
            raise UsageError(f"{self.where} lacks the field {' or '.join(names)}.", SIZES_HINT)
        return self._integer(name, self._written(name), least=1, first_of_list=first_of_list)

    def integer(self, *names: str, default: int = 0, least: int = 0) -> int:
        """An integer of at least `least`, or such a list; null is `default`."""
        name, value = self.found(*names)
        return default if value is None else self._integer(name, value, least)

    def number(self, *names: str, default: float) -> float:
        """A finite positive number; null is `default`."""
        name, value = self.found(*names)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UsageError(f"{self.where}: {name} must be a positive number, given {value!r}.")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """A boolean; null is `default`."""
        name, value = self.found(*names)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UsageError(f"{self.where}: {name} must be true or false, given {value!r}.")
        return value

    def choice(self, *names: str, choices: Mapping[str, Meaning], default: str) -> Meaning:
        """The meaning of one of a few strings."""
        name, value = self.found(*names)
        value = value or default
        if not isinstance(value, str) or value not in choices:
            raise UsageError(f"{self.where}: {name} must be one of {', '.join(choices)}; given {value!r}.")
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
                raise UsageError(f"{self.where}: {name} differs between layers: {value!r}.", SIZES_HINT)
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{self.where}: {name} must be an integer of at least {least}, given {value!r}.")
        return value


_ABSENT: Any = object()
