import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_package_goes_into_the_wheel():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "moetune").rglob("__init__.py")}
    assert set(declared) == found | {"moetune.profiles"}


def test_profiles_and_data_files_go_into_the_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    project = tmp_path / "project"
    for folder in ("moetune", "profiles"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, project / file)
    planted = Path("profiles/Example_GPU/e8-k2/ep8-tp1-dp-0123/triton-4567.json")
    (project / planted).parent.mkdir(parents=True)
    (project / planted).write_text("{}")
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=100)
    built = {str(path.relative_to(project / "built")) for path in (project / "built").rglob("*.*") if path.is_file()}
    assert f"moetune/{planted}" in built
    assert {"moetune/profiles/README.md", "moetune/py.typed", "moetune/inputs/dispatchers.json"} <= built
