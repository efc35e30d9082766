"""Launch lines from the engines' own docs: what each is read as, as golden files of line, regime and warnings.

`lines.json` has them with their sources, and what a person who knows the engine says they mean; `documented.json` has
what moetune reads. After a change that is meant, `python tests/inputs/test_documented_lines.py` writes it anew.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from moetune.errors import MoetuneError
from moetune.inputs import launch
from moetune.inputs.options import resolve

DATA = Path(__file__).parent.parent / "data" / "launch"
LINES: list[dict[str, Any]] = json.loads((DATA / "lines.json").read_text(encoding="utf-8"))
GOLDEN = DATA / "documented.json"


def reading(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `entry["line"]` is read as where `folder` is the working directory and holds its files."""
    for name, content in entry.get("files", {}).items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        read = launch.read(entry["line"], {})
        options = dict(read.options)
        backend = options.pop("backend", None)
        asked = resolve(**options)
    except MoetuneError as error:
        return {"refused": str(error)}
    finally:
        os.chdir(before)
    layer, regime = asked.layer, asked.regime
    found: dict[str, Any] = {"model": layer.name, "precision": layer.precision.value}
    found["regime"] = regime.slug + ("-uneven" if regime.uneven_shards else "")
    found["ladder"] = str(regime.ladder)
    found["tune_max_num_tokens"] = regime.tune_max_num_tokens
    if backend is not None:
        found["backend"] = backend
    if read.warnings:
        found["warnings"] = list(read.warnings)
    return found


def golden(folder: Path) -> list[dict[str, Any]]:
    return [{"line": entry["line"], "read": reading(entry, folder / str(number))} for number, entry in enumerate(LINES)]


@pytest.mark.parametrize("number", range(len(LINES)), ids=lambda number: f"{number}-{LINES[number]['engine']}")
def test_a_documented_line_is_read_as_recorded(number, tmp_path):
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))[number]
    assert recorded["line"] == LINES[number]["line"]
    assert reading(LINES[number], tmp_path) == recorded["read"]


def test_most_documented_lines_give_a_regime():
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(recorded) == len(LINES)
    assert sum("regime" in entry["read"] for entry in recorded) >= 40


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in range(len(LINES)):
            (folder / str(number)).mkdir()
        GOLDEN.write_text(json.dumps(golden(folder), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
