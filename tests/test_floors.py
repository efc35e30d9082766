"""A room imports only from the rooms before it; some rooms and the package itself import no torch."""

import ast
import subprocess
import sys
from collections import Counter
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from processes import GIVE_UP_S

PACKAGE = Path(__file__).parent.parent / "moetune"
# A room imports only from rooms before it.
FLOORS = (
    "errors", "_version", "quoting", "untrusted", "stats", "spec", "inputs", "search", "store", "recordings",
    "workload", "backends", "measure", "export", "tuning", "report", "engine", "dep_bench", "fleet", "cli", "__main__",
)  # fmt: skip
NO_TORCH = ("errors", "quoting", "untrusted", "stats", "spec", "inputs", "search", "store", "report")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(module: str) -> str:
    """`moetune.spec.layer` → `spec`."""
    return module.split(".")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module):
    """The number of a module's floor, from the ground up; above all where it has none."""
    return FLOORS.index(room(module)) if room(module) in FLOORS else len(FLOORS)


def file_of(files, name):
    """The file that an imported name lies in: itself, or that of the object's module."""
    return name if name in files else name.rpartition(".")[0] if name.rpartition(".")[0] in files else None


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(tree: ast.AST, *, typing_too: bool = True) -> list[str]:
    """Every imported module, also inside functions; without those under `if TYPE_CHECKING` unless `typing_too`."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node.test) and not typing_too:
            found += imports(ast.Module(node.orelse, []), typing_too=typing_too)
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            found += [f"moetune.{alias.name}" for alias in node.names] if node.module == "moetune" else [node.module]
        found += imports(node, typing_too=typing_too)
    return found


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_a_room_imports_only_from_the_floors_below():
    offenders = []
    for path in MODULES:
        own = room(module_name(path))
        assert own in FLOORS, f"{own} has no floor in the design"
        # types of a higher floor may be named where nothing is imported at run time
        for name in imports(parsed(path), typing_too=False):
            upwards = name.startswith("moetune.") and floor(name) > FLOORS.index(own)
            if name == "moetune" or upwards:
                offenders.append(f"{module_name(path)} imports {name}")
    assert not offenders


def test_no_two_files_import_each_other():
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    edges = {}
    for name, path in files.items():
        found = map(partial(file_of, files), imports(parsed(path), typing_too=False))
        edges[name] = {other for other in found if other not in (None, name)}
    order = TopologicalSorter(edges)
    try:
        order.prepare()
    except CycleError as error:
        raise AssertionError(f"circle: {' -> '.join(error.args[1])}") from None


@pytest.mark.parametrize("path", [p for p in MODULES if room(module_name(p)) in NO_TORCH], ids=module_name)
def test_a_pure_room_imports_no_torch(path):
    heavy = {"torch", "triton", "flashinfer", "numpy"}
    assert not {name for name in imports(parsed(path)) if name.split(".")[0] in heavy}


def test_the_reader_of_imports_sees_through_functions_and_type_checking():
    code = "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\ndef f():\n    from moetune import spec\n"
    assert imports(ast.parse(code)) == ["a", "b", "c", "moetune.spec"]
    assert imports(ast.parse(code), typing_too=False) == ["a", "c", "moetune.spec"]


@pytest.mark.parametrize(
    "statement",
    [
        "import moetune",
        "from moetune.inputs import dispatcher, hf, presets; presets.preset('deepseek-r1'); dispatcher.dispatchers()",
        "import moetune.spec.regime, moetune.search.exhaustive, moetune.store.profile",
    ],
)
def test_no_torch_is_loaded(statement):
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=GIVE_UP_S).returncode == 0


def test_no_two_test_modules_have_one_name():
    """Pytest imports a test module by its file's name alone, so the second one of a name cannot be collected."""
    counts = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []
