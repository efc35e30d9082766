"""Defines `Tactic`, one choice that a kernel offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from moetune.quoting import quoted
from moetune.spec.bounds import MOST_CHARACTERS, MOST_ENTRIES

Value = int | bool | str

UNTUNED = -1
"""FlashInfer's number for no tactic. The kernel then makes its own choice."""


class Tactic(Mapping[str, Value]):
    """A frozen, hashable mapping of names to ints, bools or strings. Its JSON is an object with the same entries.

    >>> Tactic(BLOCK_SIZE_M=64, num_warps=4)["num_warps"]
    4

    Raises:
        TypeError: a name is no string, or a value is of another type.
    """

    __slots__ = ("_items", "_key")

    def __init__(self, values: Mapping[str, Value] | None = None, /, **named: Value) -> None:
        items: dict[str, Value] = dict(values or {}) | named
        for name, value in items.items():
            if not isinstance(name, str) or not isinstance(value, int | str):
                raise TypeError(
                    f"A tactic maps names to ints, bools or strings; given {quoted(name)}: {quoted(value)}."
                )
        object.__setattr__(self, "_items", items)
        # the types are part of the key, because True == 1 in Python
        key = frozenset((name, type(value).__name__, value) for name, value in items.items())
        object.__setattr__(self, "_key", key)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Tactic is frozen")

    def __getitem__(self, name: str) -> Value:
        return self._items[name]  # type: ignore[attr-defined, no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self._key)  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tactic) and self._key == other._key  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"Tactic({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def __str__(self) -> str:
        """Returns a single value without its name, and several as `name=value` pairs. Tables show this."""
        if len(self) == 1:
            return str(next(iter(self.values())))
        return " ".join(f"{name}={value}" for name, value in self.items())

    def __reduce__(self) -> tuple[type[Tactic], tuple[dict[str, Value]]]:
        return Tactic, (dict(self),)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.plain_serializer_function_ser_schema(dict)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: object) -> JsonSchemaValue:
        return {"type": "object", "additionalProperties": {"type": ["integer", "boolean", "string"]}}

    @classmethod
    def _validated(cls, value: object) -> Tactic:
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError("a tactic is a mapping of names to ints, bools or strings")
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"a tactic has at most {MOST_ENTRIES} entries")
        for text in (*value, *value.values()):
            if isinstance(text, str) and (len(text) > MOST_CHARACTERS or not text.isprintable()):
                raise ValueError(f"a tactic's texts have at most {MOST_CHARACTERS} characters, all printable")
            if isinstance(text, int) and not -(2**63) <= text < 2**63:
                raise ValueError("a tactic's integers have 64 bits")
        try:
            return cls(value)
        except TypeError as error:
            raise ValueError(str(error)) from None
