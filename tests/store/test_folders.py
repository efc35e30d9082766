from __future__ import annotations

from pathlib import Path

import pytest

from moetune.store.folders import packaged_root
from moetune.store.store import Store


def test_root_is_the_variable_else_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOETUNE_STORE", raising=False)
    assert Store().root == tmp_path / "home/.cache/moetune"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert Store().root == tmp_path / "home/.cache/moetune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store().root == tmp_path / "cache/moetune"
    monkeypatch.setenv("MOETUNE_STORE", "~/profiles")
    assert Store().root == tmp_path / "home/profiles"
    assert Store(tmp_path).root == tmp_path


def test_the_packaged_root_is_the_installed_package_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETUNE_PACKAGED_PROFILES")
    root = packaged_root()
    assert root is not None
    assert (root / "README.md").is_file()
    assert Store().roots == (Store().root, root)
    monkeypatch.setenv("MOETUNE_PACKAGED_PROFILES", "0")
    assert packaged_root() is None
    assert Store().roots == (Store().root,)


def test_a_checkout_and_a_wheel_find_the_profiles_beside_their_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOETUNE_PACKAGED_PROFILES")
    package = tmp_path / "moetune"
    for folder in (package, tmp_path / "profiles"):
        folder.mkdir()
    assert packaged_root(package) != tmp_path / "profiles", "a folder beside an installed package is not its own"
    (tmp_path / "pyproject.toml").touch()
    assert packaged_root(package) == tmp_path / "profiles"
    (package / "profiles").mkdir()
    assert packaged_root(package) == package / "profiles"
