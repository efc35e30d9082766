"""`Under`, the base of records that are taken under one distribution of a regime."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from moetune.spec.bounds import Name
from moetune.spec.model import FrozenModel


class Under(FrozenModel):
    """A record of one row count, and of one distribution if the regime has several.

    Attributes:
        distribution: the distribution; empty if the regime has only one. It is in dumps only if it is set, as is a
            `slowdown`.
    """

    distribution: Name = ""

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        if not self.distribution:
            dumped.pop("distribution", None)
            dumped.pop("slowdown", None)
        return dumped


def place(rows: int, distribution: str) -> str:
    """Returns where something was measured: `8 rows`, or `8 rows under zipf:1`."""
    return f"{rows} rows" + (f" under {distribution}" if distribution else "")
