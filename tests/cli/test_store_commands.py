"""`moetune store verify`, `merge` and `prune`: dry first, one document, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from choices import make_choice
from click.testing import Result

from moetune.measure import this_machine
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.store.store import Store

Moetune = Callable[..., Result]
HERE = Environment(device="Example GPU", strict={"torch": "2.13", "triton": "3.7", "kernel": "builtin"})
LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


def profile(measured_at: str = EARLY, tile: int = 1, **strict: str) -> Profile:
    environment = HERE.model_copy(update={"strict": {**HERE.strict, **strict}})
    choices = tuple(make_choice(rows, measured_at=measured_at, tactic={"tile": tile}) for rows in (1, 2))
    return Profile(
        layer=LAYER, regime=Regime(ladder=[1, 2]), backend="triton", environment=environment, choices=choices
    )


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of the command line, on a machine that is HERE."""
    monkeypatch.setattr(this_machine, "environment_here", lambda profile, device: HERE)
    return Store()


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other [/]")


def content(store: Store) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.root.glob("*/*/*/*") if path.is_file()}


def test_verify_explains_every_file_and_changes_nothing(moetune: Moetune, store: Store) -> None:
    assert "has no profile yet" in moetune("store", "verify").stdout
    store.save(profile())
    store.save(profile(triton="3.6"))
    good = moetune("store", "verify")
    assert (good.exit_code, good.stderr) == (0, "")
    assert "triton 3.6, here 3.7" in good.stdout
    assert good.stdout.endswith("2 files: 1 matches, 1 near\n")
    damaged = next(iter(content(store))).with_name("triton-0.json")
    damaged.write_text("{")
    before = content(store)
    result = moetune("store", "verify", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    document = json.loads(result.stdout)
    assert (document["schema_version"], document["store"], document["shared"]) == (1, str(store.root), [])
    files = {file["path"]: file for file in document["files"]}
    assert sorted(file["state"] for file in files.values()) == ["damaged", "matches", "near"]
    assert files[str(damaged)]["why"].startswith(f"{damaged} is no profile")
    assert [file["differing"] for file in files.values() if file["state"] == "near"] == [
        {"triton": {"wanted": "3.7", "stored": "3.6"}}
    ]
    assert content(store) == before


def test_verify_and_list_show_each_store_under_its_title(moetune: Moetune, store: Store, other: Store) -> None:
    store.save(profile())
    other.save(profile(triton="3.6"))
    for command in ("verify", "list"):
        text = moetune("store", command, "--store", f"{store.root}:{other.root}").stdout
        assert f"store {store.root}\n" in text
        assert f"shared store, read-only {other.root}\n" in text


def test_merge_says_what_it_would_do_and_does_it_with_apply(moetune: Moetune, store: Store, other: Store) -> None:
    store.save(profile(EARLY))
    other.save(profile(LATE, tile=2))
    before, others = content(store), content(other)
    dry = moetune("store", "merge", other.root)
    assert (dry.exit_code, dry.stderr) == (0, "")
    assert "2 replaced by a later measurement: 1, 2" in dry.stdout
    assert "1 of 1 profiles would change; give --apply to write them." in dry.stdout
    assert content(store) == before
    document = json.loads(moetune("store", "merge", other.root, "--apply", "--json").stdout)
    assert document["applied"]
    assert [(each["new"], each["replaced"], each["kept"]) for each in document["merged"]] == [([], [1, 2], [])]
    assert content(other) == others
    assert [path.name for path in content(store)] == [path.name for path in before]
    assert list(content(store).values()) == list(others.values())


@pytest.mark.parametrize("name", ["none", "file", "itself"])
def test_merge_needs_another_store(moetune: Moetune, store: Store, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    store.save(profile())
    result = moetune("store", "merge", store.root if name == "itself" else tmp_path / name)
    assert result.exit_code == 2
    assert "Give another store's folder." in result.stderr


def test_merge_names_what_it_leaves_out(moetune: Moetune, store: Store, other: Store, tmp_path: Path) -> None:
    other.save(profile())
    (path,) = content(other)
    path.write_text("{")
    (tmp_path / "empty").mkdir()
    result = moetune("store", "merge", other.root, tmp_path / "empty", "--apply")
    assert result.exit_code == 0
    assert f"{path} is not merged: " in result.stderr
    assert f"{tmp_path / 'empty'} has no profile." in result.stderr
    assert not content(store)


def test_prune_says_what_it_would_delete_and_deletes_it_with_apply(moetune: Moetune, store: Store) -> None:
    store.save(profile(triton="3.6"))
    assert "No profile" in moetune("store", "prune", "--apply").stdout
    store.save(profile())
    old, new = (
        str(store.path(each.layer, each.regime, each.backend, each.environment))
        for each in (profile(triton="3.6"), profile())
    )
    dry = moetune("store", "prune")
    assert dry.stdout == (
        f"would delete {old}\n  replaced by {new}\n1 profile would be deleted; give --apply to delete them.\n"
    )
    assert len(content(store)) == 2
    document = json.loads(moetune("store", "prune", "--apply", "--json").stdout)
    assert (document["applied"], document["profiles"]) == (True, [{"path": old, "replaced_by": new}])
    assert [str(path) for path in content(store)] == [new]
