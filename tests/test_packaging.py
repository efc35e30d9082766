import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_goes_into_the_wheel():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "moetune").rglob("__init__.py")}
    assert set(declared) == found | {"moetune.profiles"}
