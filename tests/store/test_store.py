from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import GIVE_UP_S
from stored import BASE, DAMAGE, ProfileOf, damage, ensure_writable, files, load, newer, path_of

import moetune.store.store as store_module
from moetune.errors import DamagedProfileError, MissError, NewerSchemaError, UsageError
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store


def test_saved_profile_is_loaded(store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of()
    assert store.save(profile) == profile
    assert load(store, profile) == profile
    assert store.read(path_of(store, profile)) == profile
    assert list(store.profiles()) == [(path_of(store, profile), profile)]


def test_save_merges_by_bucket_and_the_newer_measurement_wins(
    store: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    early, late = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00+00:00"
    store.save(profile_of(choices=(choice_of(1, measured_at=late), choice_of(2, measured_at=early))))
    returned = store.save(
        profile_of(
            choices=(
                choice_of(1, measured_at=early, tactic={"tile": 91}),
                choice_of(2, measured_at=late, tactic={"tile": 92}),
                choice_of(8, measured_at=early, tactic={"tile": 98}),
            )
        )
    )
    assert [(choice.rows, choice.tactic["tile"]) for choice in returned.choices] == [(1, 1), (2, 92), (8, 98)]
    assert load(store, returned) == returned


SAVE_EACH_IN_A_PROCESS = """
import multiprocessing, pathlib, sys
from moetune.store.profile import Profile
from moetune.store.store import Store

def save(mine, barrier):
    profile = Profile.model_validate_json(mine.read_text())
    barrier.wait()
    Store(sys.argv[1]).save(profile, replacing=sys.argv[3:] == ["replacing"])

fork = multiprocessing.get_context("fork")
mine = sorted(pathlib.Path(sys.argv[2]).iterdir())
barrier = fork.Barrier(len(mine))
processes = [fork.Process(target=save, args=(path, barrier)) for path in mine]
for process in processes:
    process.start()
for process in processes:
    process.join()
assert "torch" not in sys.modules
sys.exit(any(process.exitcode for process in processes))
"""


def test_thirty_two_processes_saving_at_once_lose_nothing(store: Store, profile_of: ProfileOf, tmp_path: Path) -> None:
    regime = Regime(ladder=list(range(1, 33)), tune_max_num_tokens=32)
    measured = tmp_path / "measured"
    measured.mkdir()
    for rows in regime.buckets:
        (measured / f"{rows}.json").write_text(profile_of(regime, [rows]).model_dump_json())
    subprocess.run([sys.executable, "-c", SAVE_EACH_IN_A_PROCESS, store.root, measured], check=True, timeout=GIVE_UP_S)
    complete = profile_of(regime)
    assert len(complete.choices) == 32
    assert load(store, complete) == complete
    assert files(store) == {path_of(store, complete)}


def test_sixteen_processes_that_replace_beside_sixteen_stored_buckets_lose_nothing(
    store: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice], tmp_path: Path
) -> None:
    regime = Regime(ladder=list(range(1, 33)), tune_max_num_tokens=32)
    future = [choice_of(rows, tactic={"tile": 0}, measured_at="2999-01-01T00:00:00Z") for rows in regime.buckets]
    store.save(profile_of(regime, choices=tuple(future)))
    measured = tmp_path / "measured"
    measured.mkdir()
    for rows in regime.buckets[::2]:
        (measured / f"{rows}.json").write_text(profile_of(regime, [rows]).model_dump_json())
    arguments = [SAVE_EACH_IN_A_PROCESS, store.root, measured, "replacing"]
    subprocess.run([sys.executable, "-c", *map(str, arguments)], check=True, timeout=GIVE_UP_S)
    kept = {choice.rows: choice.tactic["tile"] for choice in load(store, profile_of(regime)).choices}
    assert kept == {rows: rows if rows % 2 else 0 for rows in regime.buckets}


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_store_that_cannot_be_written_is_a_usage_error(below: str, tmp_path: Path, profile_of: ProfileOf) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / below)
    for attempt in (lambda: ensure_writable(store, profile_of()), lambda: store.save(profile_of())):
        with pytest.raises(UsageError, match="cannot be written") as raised:
            attempt()
        assert raised.value.exit_code == 2
        assert "\n" not in str(raised.value)
        assert str(store.root) in str(raised.value)
        assert "MOETUNE_STORE" in raised.value.hint
    with pytest.raises(MissError):
        load(store, profile_of())


def test_ensure_writable_writes_where_the_profile_will_lie_and_leaves_nothing_behind(
    store: Store, profile_of: ProfileOf
) -> None:
    ensure_writable(store, profile_of())
    assert files(store) == set()
    assert path_of(store, profile_of()).parent.is_dir()


def test_packaged_profile_answers_where_the_store_has_none(
    store: Store, packaged: Store, backed: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    theirs = packaged.save(profile_of(rows=[1, 2]))
    question = (theirs.layer, theirs.regime, theirs.backend, theirs.environment)
    before = {path: path.read_bytes() for path in packaged.root.rglob("*") if path.is_file()}
    path, found = backed.find(*question)
    assert (path, found) == (path_of(packaged, theirs), theirs)
    assert backed.is_packaged(path)
    assert backed.read(path) == theirs
    assert not store.root.exists()

    ours = store.save(profile_of(choices=(choice_of(1, tactic={"tile": 7}),)))
    path, found = backed.find(*question)
    assert (path, found) == (path_of(store, ours), ours)
    assert not backed.is_packaged(path)
    assert list(backed.profiles()) == [(path_of(store, ours), ours), (path_of(packaged, theirs), theirs)]
    assert {path: path.read_bytes() for path in packaged.root.rglob("*") if path.is_file()} == before


def test_save_takes_over_the_packaged_buckets_and_leaves_them_where_they_are(
    store: Store, packaged: Store, backed: Store, profile_of: ProfileOf, choice_of: Callable[..., Choice]
) -> None:
    packaged.save(profile_of(rows=[1, 2]))
    before = path_of(packaged, profile_of()).read_bytes()
    newer = choice_of(2, tactic={"tile": 92}, measured_at="2026-02-01T00:00:00Z")
    saved = backed.save(profile_of(choices=(newer, choice_of(8))))
    assert [(choice.rows, choice.tactic["tile"]) for choice in saved.choices] == [(1, 1), (2, 92), (8, 8)]
    assert load(store, saved) == saved
    assert path_of(packaged, saved).read_bytes() == before


@pytest.mark.parametrize("kind", ["truncated", "no schema", "schema 0"])
def test_damaged_packaged_profile_is_named_stays_and_costs_no_measurement(
    kind: str, store: Store, packaged: Store, backed: Store, profile_of: ProfileOf
) -> None:
    path, content = damage(packaged, profile_of(), DAMAGE[kind])
    with pytest.raises(DamagedProfileError, match="reinstall") as raised:
        load(backed, profile_of())
    assert str(path) in raised.value.message
    assert "MOETUNE_PACKAGED_PROFILES=0" in raised.value.hint
    assert path.read_bytes() == content
    assert not list(path.parent.glob("*.damaged-*"))
    saved = backed.save(profile_of(rows=[2]))
    assert load(store, saved) == saved
    assert path.read_bytes() == content


def test_packaged_profile_of_another_question_is_no_base(packaged: Store, backed: Store, profile_of: ProfileOf) -> None:
    other = packaged.save(profile_of(rows=[1], environment=Environment(device="Other", strict={})))
    asked = profile_of(rows=[2])
    path_of(packaged, asked).parent.mkdir(parents=True)
    path_of(packaged, asked).write_bytes(path_of(packaged, other).read_bytes())
    assert backed.save(asked) == asked


def test_store_that_is_the_packaged_folder_is_an_ordinary_one(packaged: Store, profile_of: ProfileOf) -> None:
    itself = Store(packaged.root, packaged.root)
    assert itself.roots == (packaged.root,)
    saved = itself.save(profile_of())
    assert not itself.is_packaged(path_of(itself, saved))


def test_save_onto_a_damaged_file_keeps_both_and_reports_it(store: Store, profile_of: ProfileOf) -> None:
    path, content = damage(store, profile_of(rows=[1]), DAMAGE["truncated"])
    with pytest.raises(DamagedProfileError, match="saved") as raised:
        store.save(profile_of(rows=[2]))
    aside = path.with_name(path.name + ".damaged-1")
    assert str(aside) in raised.value.hint
    assert aside.read_bytes() == content
    assert load(store, profile_of()) == profile_of(rows=[2])


def test_save_onto_the_profile_of_another_question_merges_nothing(store: Store, profile_of: ProfileOf) -> None:
    mine, other = profile_of(BASE, rows=[1]), profile_of(Regime(**{**BASE.model_dump(), "seed": 5}), rows=[2])
    path = path_of(store, mine)
    path.parent.mkdir(parents=True)
    path.write_text(other.model_dump_json())
    with pytest.raises(DamagedProfileError, match="seed"):
        store.save(mine)
    assert load(store, mine) == mine
    assert Profile.model_validate_json(path.with_name(path.name + ".damaged-1").read_bytes()) == other


def test_reader_leaves_a_file_that_a_writer_has_mended_meanwhile(
    store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = damage(store, profile_of(), DAMAGE["truncated"])
    parse, seen = store_module.read_profile, []

    def mended_after_the_first_look(asked: Path) -> Profile:
        try:
            return parse(asked)
        finally:
            if not seen:
                seen.append(asked)
                path.write_text(profile_of().model_dump_json())

    monkeypatch.setattr(store_module, "read_profile", mended_after_the_first_look)
    assert load(store, profile_of()) == profile_of()
    assert files(store) == {path}


def test_damaged_file_that_cannot_be_moved_is_still_reported_as_damaged(
    store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = damage(store, profile_of(), DAMAGE["truncated"])

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(DamagedProfileError, match=r"could not be moved aside.*Read-only"):
        load(store, profile_of())
    assert path.read_bytes() == content


def test_list_reports_damaged_and_newer_files_between_the_others_and_moves_none(
    store: Store, profile_of: ProfileOf
) -> None:
    regimes = [Regime(**{**BASE.model_dump(), "ep_size": size}) for size in (1, 2, 4)]
    broken, _ = damage(store, profile_of(regimes[0]), DAMAGE["binary"])
    later, _ = damage(store, profile_of(regimes[1]), newer)
    good = store.save(profile_of(regimes[2]))
    before = files(store)
    entries = dict(store.profiles())
    assert list(entries) == sorted(entries)
    assert entries[path_of(store, good)] == good
    assert isinstance(entries[broken], DamagedProfileError)
    assert isinstance(entries[later], NewerSchemaError)
    assert files(store) == before == entries.keys()
