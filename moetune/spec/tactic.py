"""`Tactic`: one choice a kernel offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

Value = int | bool | str


class Tactic(Mapping[str, Value]):
    """A small frozen, hashable mapping of names to ints, bools or strings; JSON as it is.

    >>> Tactic(BLOCK_SIZE_M=64, num_warps=4)["num_warps"]
    4
    """

    __slots__ = ("_hash", "_items")

    def __init__(self, values: Mapping[str, Value] | None = None, /, **named: Value) -> None:
        items = {**(values or {}), **named}
        for name, value in items.items():
            if not isinstance(name, str) or not isinstance(value, int | str):
                raise TypeError(f"A tactic maps names to ints, bools or strings; given {name!r}: {value!r}.")
        object.__setattr__(self, "_items", items)
        object.__setattr__(self, "_hash", hash(frozenset((n, type(v).__name__, v) for n, v in items.items())))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Tactic is frozen")

    def __getitem__(self, name: str) -> Value:
        return self._items[name]  # type: ignore[attr-defined, no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tactic) and self._items == other._items  # type: ignore[attr-defined, no-any-return]

    def __repr__(self) -> str:
        return f"Tactic({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def __str__(self) -> str:
        """One value alone as it is, else `name=value` pairs: for tables."""
        if len(self) == 1:
            return str(next(iter(self.values())))
        return " ".join(f"{name}={value}" for name, value in self.items())

    def __reduce__(self) -> tuple[type[Tactic], tuple[dict[str, Value]]]:
        return Tactic, (dict(self),)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        value = core_schema.union_schema(
            [
                core_schema.bool_schema(strict=True),
                core_schema.int_schema(strict=True),
                core_schema.str_schema(strict=True),
            ]
        )
        mapping = core_schema.dict_schema(core_schema.str_schema(), value)
        return core_schema.no_info_after_validator_function(
            cls,
            core_schema.union_schema(
                [
                    core_schema.chain_schema(
                        [core_schema.is_instance_schema(cls), core_schema.no_info_plain_validator_function(dict)]
                    ),
                    mapping,
                ]
            ),
            serialization=core_schema.plain_serializer_function_ser_schema(dict),
        )
