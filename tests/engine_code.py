"""Runs parts of an engine's module without the engine: the named functions and classes, with stand-ins for the rest."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any


def parts(path: Path, names: set[str], stand_ins: dict[str, Any]) -> dict[str, Any]:
    """Returns the module's own definitions of `names`; what else they use comes from `stand_ins`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names]
    assert {node.name for node in kept} == names
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, *kept], []))
    found = dict(stand_ins)
    exec(compile(module, str(path), "exec"), found)
    return found
