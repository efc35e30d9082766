"""Writes docs/schemas: a JSON schema for each kind of document, from the models themselves.

`make pages` runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from moetune.dep_bench.result import DepBench
from moetune.errors import Plain
from moetune.export.lookup import Lookup
from moetune.spec.model import FrozenModel
from moetune.store.profile import Profile
from moetune.tuning.batch import Batch
from moetune.tuning.changes import Changes
from moetune.tuning.checked import Check
from moetune.tuning.comparison import Comparison
from moetune.tuning.plan import Plan


class ExportedFile(FrozenModel):
    """One file of an export."""

    path: str
    state: Literal["written", "unchanged"]


class ExportDocument(FrozenModel):
    """The document of `moetune export --json`."""

    schema_version: Literal[1]
    target: str
    profile: str
    near: dict[str, dict[str, Plain]]
    neutral: dict[str, dict[str, Plain]]
    measured_ladder: str | None
    folder: str
    files: tuple[ExportedFile, ...]
    variables: dict[str, str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


DOCUMENTS: Final[dict[str, type[BaseModel]]] = {
    "profile": Profile,
    "plan": Plan,
    "comparison": Comparison,
    "changes": Changes,
    "batch": Batch,
    "export": ExportDocument,
    "lookup": Lookup,
    "check": Check,
    "dep-bench": DepBench,
}


class _Fields(GenerateJsonSchema):
    """Describes a model by its fields, also if a function shortens what is written."""

    def ser_schema(self, schema: Any) -> JsonSchemaValue | None:
        """Returns the schema of a serializer, or None to use that of the fields."""
        return None if schema["type"] == "function-wrap" else super().ser_schema(schema)


def schemas() -> dict[str, str]:
    """Returns the text of each file, by its name."""
    return {f"{name}.json": _text(model) for name, model in DOCUMENTS.items()}


def _text(model: type[BaseModel]) -> str:
    found: dict[str, Any] = model.model_json_schema(mode="serialization", schema_generator=_Fields)
    document = {"$schema": GenerateJsonSchema.schema_dialect, **_without_descriptions(found)}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _without_descriptions(value: Any) -> Any:
    """Leaves docstrings out: they describe Python objects, docs/json-schemas.md describes the documents."""
    if isinstance(value, list):
        return [_without_descriptions(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_descriptions(one)
        for name, one in value.items()
        if not (name == "description" and isinstance(one, str))
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")
