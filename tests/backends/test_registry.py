"""The backends by name."""

import subprocess
import sys

import pytest

from moetune.backends import registry
from moetune.backends.base import Backend
from moetune.errors import UsageError


def test_every_named_backend_is_there_and_has_its_name() -> None:
    assert "torch" in registry.backends()
    for name in registry.backends():
        made = registry.backend(name)
        assert isinstance(made, Backend)
        assert made.name == name


def test_an_unknown_backend_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'cuda'.*torch"):
        registry.backend("cuda")


def test_torch_runs_here() -> None:
    assert registry.Diagnosis("torch", True) in registry.diagnose()


def test_a_backend_that_cannot_be_imported_is_diagnosed_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_HOMES", {"gone": "moetune.no_such_module:Gone", **registry._HOMES})
    gone, *others = registry.diagnose()
    assert (gone.name, gone.available) == ("gone", False)
    assert "no_such_module" in gone.reason
    assert gone.hint
    assert all(other.available for other in others)


def test_naming_and_making_a_backend_imports_no_torch() -> None:
    code = "import sys; from moetune.backends import registry; registry.backend('torch'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
