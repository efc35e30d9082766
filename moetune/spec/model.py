"""`FrozenModel`, the base of every pydantic model of moetune, and `digest_of`, the hash of stored keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moetune.errors import UsageError
from moetune.quoting import quoted, shortened


class FrozenModel(BaseModel):
    """A frozen pydantic model that accepts no unknown fields. Its errors are `UsageError`s of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_enum_values=False)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_errors(cls, data: Any, handler: Any) -> Self:
        if isinstance(data, Mapping) and len(data) > len(cls.model_fields):
            # pydantic would make an error for each of them, and there can be a million
            unknown = next(name for name in data if name not in cls.model_fields)
            raise UsageError(f"{cls.__name__}: {shortened(str(unknown))}: Extra inputs are not permitted.")
        try:
            return handler(data)  # type: ignore[no-any-return]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = shortened(".".join(str(part) for part in first["loc"])) or cls.__name__
            raise UsageError(
                f"{cls.__name__}: {field}: {shortened(first['msg'])} (given: {quoted(first['input'])})."
            ) from None


def digest_of(fields: Any) -> str:
    """Returns the first 16 hex digits of SHA-256 over the canonical JSON of `fields`."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
