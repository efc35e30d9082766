from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import GIVE_UP_S
from stored import ProfileOf

import moetune.store.files as files_module
import moetune.store.lock as lock_module
from moetune.errors import StoreError, UsageError
from moetune.spec.tactic import Tactic
from moetune.store.journal import Journal, Journaled, Measurement, Past, Searched
from moetune.store.profile import Profile
from moetune.store.store import Store


def tactic(tile: int) -> Tactic:
    return Tactic(tile=tile)


def measured(rows: int, tile: int, outcome: float | str, when: str = "2026-01-01T00:00:00+00:00") -> Measurement:
    """`outcome`: a time in µs, or why there is none."""
    found = {"reason": outcome} if isinstance(outcome, str) else {"time_us": outcome}
    return Measurement(rows=rows, tactic=tactic(tile), rounds=2, strategy="auto", measured_at=when, **found)


def journal_of(store: Store, profile: Profile) -> Journal:
    return store.journal(profile.layer, profile.regime, profile.backend, profile.environment)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def journal(store: Store, profile_of: ProfileOf) -> Journal:
    return journal_of(store, profile_of())


def test_it_lies_beside_the_profile_as_json_lines_and_is_no_profile(
    store: Store, journal: Journal, profile_of: ProfileOf
) -> None:
    journal.note(4, "exhaustive", 2, {tactic(16): 12.5}, {tactic(32): "hung"})
    profile = store.save(profile_of())
    path, found = store.find(profile.layer, profile.regime, profile.backend, profile.environment)
    assert found == profile
    assert journal.path == path.with_name(path.name.replace(".json", ".journal.jsonl"))
    assert list(store.profiles()) == [(path, profile)]
    first, second = map(json.loads, journal.path.read_text().splitlines())
    assert first.pop("measured_at") == second["measured_at"]
    assert first == {
        "schema_version": 1,
        "rows": 4,
        "tactic": {"tile": 16},
        "time_us": 12.5,
        "rounds": 2,
        "reason": "",
        "strategy": "exhaustive",
    }
    assert (second["tactic"], second["time_us"], second["reason"]) == ({"tile": 32}, None, "hung")


TILES = st.integers(0, 5).map(tactic)
TIMES = st.floats(0, 1e9, allow_nan=False)
BATCHES = st.lists(
    st.tuples(st.integers(1, 3), st.dictionaries(TILES, TIMES), st.dictionaries(TILES, st.text(min_size=1))),
    max_size=5,
)


@settings(max_examples=40)
@given(batches=BATCHES)
def test_what_was_noted_is_read_in_its_order(batches: list, profile_of: ProfileOf) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = journal_of(Store(folder), profile_of())
        for rows, times_us, failed in batches:
            journal.note(rows, "auto", 3, times_us, failed)
        expected = [
            (rows, tactic, outcome)
            for rows, times_us, failed in batches
            for tactic, outcome in (*times_us.items(), *failed.items())
        ]
        assert journal.read().unread == ()
        read = [(m.rows, m.tactic, m.reason or m.time_us) for m in journal.read().measurements]
        assert read == expected


def test_a_line_has_a_time_or_a_reason() -> None:
    given_twice = {**measured(4, 1, "hung").model_dump(), "time_us": 3.0}
    for wrong in (given_twice, {**given_twice, "time_us": None, "reason": ""}, {**given_twice, "surprise": 1}):
        with pytest.raises(UsageError):
            Measurement.model_validate(wrong)


def test_nothing_noted_leaves_no_file_and_no_journal_reads_as_nothing(store: Store, journal: Journal) -> None:
    journal.note(4, "auto", 1, {}, {})
    journal.remove()
    assert journal.read() == Journaled()
    assert not store.root.exists()


# Damage


@settings(max_examples=60)
@given(kept=st.floats(0, 1))
def test_cut_anywhere_it_holds_every_whole_line_and_goes_on_with_whole_ones(kept: float, profile_of: ProfileOf) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = journal_of(Store(folder), profile_of())
        for tile in range(4):
            journal.note(4, "auto", 1, {tactic(tile): 1.0 + tile}, {})
        whole, before = journal.path.read_bytes(), journal.read().measurements
        torn = whole[: round(kept * len(whole))]
        journal.path.write_bytes(torn)
        survivors = before[: torn.count(b"\n")]
        assert journal.read() == Journaled(survivors)

        journal.note(8, "auto", 1, {tactic(9): 5.0}, {})
        after = journal.read()
        assert after.unread == ()
        assert after.measurements[:-1] == survivors
        assert (after.measurements[-1].rows, after.measurements[-1].time_us) == (8, 5.0)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda line: b"",
    "half": lambda line: line[: len(line) // 2],
    "binary": lambda line: bytes(set(range(256)) - {10}),
    "pickle": lambda line: pickle.dumps({"schema_version": 1}).replace(b"\n", b""),
    "not an object": lambda line: b"[1]",
    "no schema": lambda line: line.replace(b"schema_version", b"schema"),
    "no time": lambda line: line.replace(b'"time_us":2.0', b'"time_us":null'),
    "no number": lambda line: line.replace(b'"time_us":2.0', b'"time_us":NaN'),
    "no tactic": lambda line: line.replace(b'{"tile":1}', b'{"tile":[1]}'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_earlier_damage_is_named_and_costs_its_line_alone(kind: str, journal: Journal) -> None:
    for tile in range(3):
        journal.note(4, "auto", 1, {tactic(tile): 1.0 + tile}, {})
    first, second, third = journal.path.read_bytes().splitlines()
    damaged = DAMAGE[kind](second)
    assert damaged != second
    content = b"\n".join((first, damaged, third, b""))
    journal.path.write_bytes(content)
    read = journal.read()
    assert [m.tactic for m in read.measurements] == [tactic(0), tactic(2)]
    (reason,) = read.unread
    assert reason.startswith(f"{journal.path}, line 2, is no measurement: ")
    journal.note(4, "auto", 1, {tactic(3): 1.0}, {})
    assert journal.path.read_bytes().startswith(content)


def test_lines_of_a_newer_schema_are_named_and_stay(journal: Journal) -> None:
    journal.note(4, "auto", 1, {tactic(1): 1.0}, {})
    newer = b'{"schema_version": 2, "later": [1]}\n'
    journal.path.write_bytes(newer + journal.path.read_bytes())
    read = journal.read()
    assert [m.tactic for m in read.measurements] == [tactic(1)]
    assert read.unread == (f"{journal.path}, line 1, has schema_version 2, and this moetune knows up to 1.",)
    journal.note(4, "auto", 1, {tactic(2): 1.0}, {})
    assert journal.path.read_bytes().startswith(newer)


def test_a_journal_that_cannot_be_read_or_written_is_an_error_that_says_so(
    store: Store, journal: Journal, tmp_path: Path, profile_of: ProfileOf
) -> None:
    journal.path.mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot be read"):
        journal.read()
    with pytest.raises(StoreError, match="cannot be written"):
        journal.note(4, "auto", 1, {tactic(1): 1.0}, {})
    (tmp_path / "file").write_text("in the way")
    nowhere = journal_of(Store(tmp_path / "file"), profile_of())
    assert nowhere.read() == Journaled()
    with pytest.raises(UsageError, match="cannot be written"):
        nowhere.note(4, "auto", 1, {tactic(1): 1.0}, {})


# Many writers

NOTE_EACH_IN_A_PROCESS = """
import pathlib, sys, multiprocessing
from moetune.store.profile import Profile
from moetune.store.store import Store

profile = Profile.model_validate_json(pathlib.Path(sys.argv[2]).read_text())
journal = Store(sys.argv[1]).journal(profile.layer, profile.regime, profile.backend, profile.environment)

def note(rows, barrier):
    barrier.wait()
    for tile in range(25):
        journal.note(rows, "auto", 1, {profile.choices[0].tactic: 1.0 + tile}, {})

fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(4)
processes = [fork.Process(target=note, args=(rows, barrier)) for rows in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join()
assert "torch" not in sys.modules
sys.exit(any(process.exitcode for process in processes))
"""


def test_four_writers_at_once_lose_nothing(
    store: Store, journal: Journal, profile_of: ProfileOf, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(profile_of().model_dump_json())
    subprocess.run([sys.executable, "-c", NOTE_EACH_IN_A_PROCESS, store.root, profile], check=True, timeout=GIVE_UP_S)
    read = journal.read()
    assert read.unread == ()
    for rows in range(4):
        assert [m.time_us for m in read.measurements if m.rows == rows] == [1.0 + tile for tile in range(25)]


def test_the_store_s_lock_is_kept(store: Store, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.note(4, "auto", 1, {tactic(1): 1.0}, {})
    before = journal.path.read_bytes()
    monkeypatch.setattr(lock_module, "LOCK_TIMEOUT_S", 0.0)
    with lock_module.held(store.root / lock_module.LOCK_NAME):
        for attempt in (lambda: journal.note(4, "auto", 1, {tactic(2): 1.0}, {}), journal.remove):
            with pytest.raises(StoreError, match="lock"):
                attempt()
        assert len(journal.read().measurements) == 1
    assert journal.path.read_bytes() == before
    journal.remove()
    assert not journal.path.exists()


# What it knows of a bucket


def test_of_a_bucket_it_knows_every_time_in_order_and_what_failed() -> None:
    journaled = Journaled(
        (
            measured(4, 0, 9.0),
            measured(4, 1, 2.0),
            measured(8, 3, 1.0),
            measured(4, 4, 1.0),
            measured(4, 1, 4.0),
            measured(4, 4, "wrong result"),
            measured(8, 2, "hung"),
        ),
        (Searched(rows=4, strategy="auto", warm_starts=(tactic(1),)), Searched(rows=8, strategy="x", warm_starts=())),
    )
    past = journaled.of(4, tactic(0), "auto")
    assert past.times_us == {tactic(0): [(2, 9.0)], tactic(1): [(2, 2.0), (2, 4.0)], tactic(4): [(2, 1.0)]}
    assert past.failed == {tactic(4): "wrong result"}
    assert past.search == journaled.searches[0]
    assert journaled.of(16, tactic(0), "auto") == Past()
    assert journaled.of(8, tactic(0), "auto").search is None
    assert journaled.of(4, tactic(0), "exhaustive") == Past({}, past.failed)


def test_where_the_default_failed_nothing_is_believed() -> None:
    journaled = Journaled((measured(4, 1, "out of memory"), measured(4, 0, "out of memory"), measured(4, 2, 1.0)))
    assert journaled.of(4, tactic(0), "auto") == Past()
    assert journaled.of(4, tactic(5), "auto").failed.keys() == {tactic(0), tactic(1)}


def test_a_search_is_read_as_it_ended_and_finished_buckets_keep_that_alone(journal: Journal) -> None:
    began = [Searched(rows=rows, strategy="auto", warm_starts=(tactic(rows),)) for rows in (4, 8)]
    ended = [each.model_copy(update={"finalists": (tactic(1),), "promising": (tactic(2),)}) for each in began]
    for search, result in zip(began, ended, strict=True):
        journal.note_search(search)
        journal.note(search.rows, "auto", 1, {tactic(1): 1.0}, {tactic(3): "hung"})
        if search.rows == 4:
            journal.note_search(result)
    assert journal.read().searches == (ended[0], began[1])
    with journal.path.open("ab") as file:
        file.write(b'damage\n{"torn')
    journal.drop([4, 2])
    left = journal.read()
    assert left.searches == (ended[0], began[1])
    assert [measurement.rows for measurement in left.measurements] == [8, 8]
    assert len(left.unread) == 1
    journal.drop([4, 8])
    assert journal.path.read_bytes() == f"{ended[0].model_dump_json()}\ndamage\n".encode()
    journal.remove()
    journal.drop([4])
    assert not journal.path.exists()


def test_an_append_reads_no_more_than_the_end_of_the_file(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read.append(size) or pread(file, size, at))
    for tile in range(200):
        journal.note(4, "auto", 1, {tactic(tile): 1.0}, {})
    assert journal.path.stat().st_size > 5 * files_module.BLOCK
    assert max(read) <= files_module.BLOCK
    assert len(read) == 199
