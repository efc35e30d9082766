"""The profiles in profiles/ are what the wheel's readers expect; a script puts them there and lists them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from moetune.backends.registry import backend
from moetune.errors import UsageError
from moetune.spec.environment import Environment
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "profiles"
FILES = sorted(PACKAGED.rglob("*.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/package_profiles.py as a module, beside its neighbour picture.py."""
    path = ROOT / "benchmarks" / "package_profiles.py"
    spec = importlib.util.spec_from_file_location("package_profiles", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "path", [str(path.parent), *sys.path])
        spec.loader.exec_module(module)
    return module


def test_the_readme_lists_every_packaged_profile(script: ModuleType) -> None:
    readme = (PACKAGED / "README.md").read_text(encoding="utf-8")
    assert script.listed(readme, PACKAGED) == readme


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_packaged_profile_is_complete_in_its_place_and_of_the_kernel_as_it_is(path: Path) -> None:
    store = Store(PACKAGED)
    profile = store.read(path)
    assert store.path(profile.layer, profile.regime, profile.backend, profile.environment) == path
    assert [choice.rows for choice in profile.choices] == list(profile.regime.buckets)
    if profile.environment.strict.get("kernel") == "builtin":
        assert profile.environment.strict["kernel_source"] == backend("triton").environment()["kernel_source"]


def test_there_is_nothing_else_in_the_folder() -> None:
    assert {path.relative_to(PACKAGED).parts[0] for path in PACKAGED.rglob("*.*") if path not in FILES} <= {
        "README.md",
        "__init__.py",
        "__pycache__",
    }


def test_what_the_script_packages_is_served_and_listed_with_its_command(
    script: ModuleType,
    tmp_path: Path,
    profile_of: Callable[..., Profile],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    into, measured = tmp_path / "into", Store(tmp_path / "measured")
    into.mkdir()
    (into / "README.md").write_text(f"# Title\n{script.HEADING}stale\n")
    strict = {"torch": "2.11.0", "kernel": "sglang", "remote": "zero"}
    profile = measured.save(profile_of(environment=Environment(device="Example GPU", strict=strict)))
    question = (profile.layer, profile.regime, profile.backend, profile.environment)
    monkeypatch.setattr(sys, "argv", ["package_profiles.py", str(measured.path(*question)), "--into", str(into)])
    script.main()

    path, found = Store(tmp_path / "empty", into).find(*question)
    assert (path, found) == (Store(into).path(*question), profile)
    assert sorted(file for file in into.rglob("*") if file.is_file()) == sorted([path, into / "README.md"])
    readme = (into / "README.md").read_text()
    assert readme.startswith("# Title\n")
    assert "stale" not in readme
    assert "Example GPU, kernel sglang, remote zero, torch 2.11.0:" in readme
    command = "moetune tune --model small --ep 4 --dp --tune-max-num-tokens 16 --backend torch --kernel sglang"
    assert f"| `{command}` | 5 | 1.25× | 2026-01-01 | `{path.relative_to(into)}` |" in readme
    assert script.listed(readme, into) == readme


def test_the_script_refuses_a_profile_that_lacks_buckets(
    script: ModuleType, tmp_path: Path, profile_of: Callable[..., Profile], choice_of: Callable[..., Choice]
) -> None:
    with pytest.raises(UsageError, match=r"the buckets \[2, 4, 8, 16\] are not tuned"):
        script.package(profile_of(choices=(choice_of(1),)), tmp_path)
    assert list(tmp_path.iterdir()) == []
