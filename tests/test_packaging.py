import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from processes import GIVE_UP_S

from moetune import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_goes_into_the_wheel():
    declared = PROJECT["tool"]["setuptools"]["packages"]
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "moetune").rglob("__init__.py")}
    assert set(declared) == found | {"moetune.profiles"}


def test_the_lowest_versions_that_ci_installs_are_the_lower_bounds():
    bounds = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci/lowest").read_text(), re.MULTILINE))
    project = PROJECT["project"]
    declared = dict(re.split(">=", name) for name in project["dependencies"] + project["optional-dependencies"]["dev"])
    assert set(bounds) >= {"click", "pydantic", "pyyaml", "rich"}
    for name, version in bounds.items():
        assert version.removesuffix(".0") == declared[name].removesuffix(".0")


def test_the_wheel_contains_the_modules_profiles_models_and_flags(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    project = tmp_path / "project"
    for folder in ("moetune", "profiles"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, project / file)
    planted = Path("profiles/Example_GPU/e8-k2/ep8-tp1-dp-0123/triton-4567.json")
    (project / planted).parent.mkdir(parents=True)
    (project / planted).write_text("{}")
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "bdist_wheel", "--dist-dir", "dist"]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=GIVE_UP_S)
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name == f"moetune-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        built = set(archive.namelist())
    files = {
        path
        for path in (ROOT / "moetune").rglob("*")
        if path.suffix in (".py", ".json", ".typed", ".html", ".css", ".js")
    }
    assert {path.relative_to(ROOT).as_posix() for path in files} <= built
    assert {f"moetune/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "profiles").rglob("*.json")} <= built
    assert {f"moetune/{planted}", "moetune/profiles/README.md", "moetune/py.typed"} <= built
