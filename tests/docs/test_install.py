"""The README's advice on installing into an engine's environment, checked by pip's dry run. Nothing is installed."""

import json
import re
import shutil
import subprocess
import sys
import venv

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import ROOT, text

ENGINES = re.findall(r"(vLLM|SGLang) ([\d.]+\d)", text("README.md").partition("## Install")[2].partition("##")[0])
KEPT = {"torch", "flashinfer-python"}

pytestmark = pytest.mark.network


def pip(folder, *words):
    """What pip would install, as its report lists it."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", *words, "--dry-run", "--quiet", "--report", report]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]


def pins(engine, version, folder):
    """The versions of torch and FlashInfer that an engine requires, from its wheel's metadata."""
    words = ("install", "--ignore-installed", "--no-deps", "--only-binary", ":all:", f"{engine.lower()}=={version}")
    (metadata,) = pip(folder, *words)
    required = [Requirement(line) for line in metadata["requires_dist"]]
    pinned = {canonicalize_name(one.name): str(one.specifier) for one in required if one.marker is None}
    assert all(pinned[name].startswith("==") for name in KEPT)
    return {name: pinned[name].removeprefix("==") for name in KEPT}


def environment(folder, installed):
    """Makes an environment in which packages look installed, and returns its interpreter."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name, version in installed.items():
        info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder / "bin" / "python"


@pytest.fixture(autouse=True, scope="module")
def _index(pytestconfig):
    if pytestconfig.getoption("markexpr") != "network":
        pytest.skip("only `pytest -m network` contacts a package index")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    project = tmp_path_factory.mktemp("wheel") / "project"
    project.mkdir()
    for folder in ("moetune", "profiles"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, project / file)
    words = ("wheel", "--quiet", "--no-deps", "--wheel-dir", project / "dist", project)
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, timeout=300)
    (built,) = (project / "dist").glob("*.whl")
    return built


def replaced(wheel, installed, folder, *words):
    """Which of the packages to keep pip would replace if the wheel were installed beside them."""
    folder.mkdir(exist_ok=True)
    python = environment(folder / "env", installed)
    named = {canonicalize_name(one["name"]) for one in pip(folder, "--python", python, "install", wheel, *words)}
    assert "moetune" in named
    return named & KEPT


def test_the_readme_names_two_engines():
    assert [engine for engine, _ in ENGINES] == ["vLLM", "SGLang"]


@pytest.mark.parametrize(("engine", "version"), ENGINES)
def test_an_engines_torch_and_flashinfer_are_kept(wheel, tmp_path, engine, version):
    assert replaced(wheel, pins(engine, version, tmp_path), tmp_path) == set()


def test_an_older_flashinfer_is_kept_without_dependencies_only(wheel, tmp_path):
    older = {"torch": "2.14.0", "flashinfer-python": "0.6.17"}
    assert replaced(wheel, older, tmp_path / "bare", "--no-deps") == set()
    assert replaced(wheel, older, tmp_path / "with dependencies") == {"flashinfer-python"}
