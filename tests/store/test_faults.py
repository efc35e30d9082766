"""Whatever call of the file system fails, nothing that was stored is lost, and the next attempt goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from faulty import FaultyFiles
from processes import GIVE_UP_S
from stored import ProfileOf, ensure_writable, load, path_of

import moetune.store.lock as lock_module
from moetune.errors import StoreError, UsageError
from moetune.spec.tactic import Tactic
from moetune.store.journal import Journal
from moetune.store.store import Store

KINDS = [
    pytest.param(lasting, code, id=f"{os.strerror(code)}{', lasting' if lasting else ''}")
    for lasting in (False, True)
    for code in (errno.ENOSPC, errno.EIO, errno.EROFS)
]


class Scenario(Protocol):
    """What a store has, and what is attempted while its file system fails."""

    def prepare(self, store: Store) -> None: ...

    def attempt(self, store: Store) -> None: ...


def faults(lasting: bool, code: int, scenario: Scenario) -> Iterator[tuple[Store, bool, list[str]]]:
    """Yields a store after each fault in turn, whether the attempt said that it had failed, and what calls failed."""
    for first in range(1, 60):
        files = FaultyFiles(first, lasting, code)
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            failed = False
            scenario.prepare(store)
            with pytest.MonkeyPatch.context() as patched:
                files.install(patched)
                try:
                    scenario.attempt(store)
                except (StoreError, UsageError) as error:
                    failed = os.strerror(code) in error.message
            if not files.has_failed:
                assert not failed
                assert first > 4
                return
            yield store, failed, files.failing
    raise AssertionError("no attempt is without a fault")


class Saving:
    def __init__(self, profile_of: ProfileOf) -> None:
        self.old, self.new = profile_of(rows=[1, 2]), profile_of(rows=[4])

    def prepare(self, store: Store) -> None:
        store.save(self.old)

    def attempt(self, store: Store) -> None:
        store.save(self.new)


@pytest.mark.parametrize(("lasting", "code"), KINDS)
def test_a_save_loses_nothing(lasting: bool, code: int, profile_of: ProfileOf) -> None:
    saving = Saving(profile_of)
    for store, failed, _ in faults(lasting, code, saving):
        rows = [choice.rows for choice in load(store, saving.old).choices]
        assert rows in ([1, 2], [1, 2, 4])
        assert failed or rows == [1, 2, 4]
        store.save(saving.new)
        assert [choice.rows for choice in load(store, saving.old).choices] == [1, 2, 4]
        assert not list(Path(store.root).rglob("*.tmp"))


class Noting:
    def __init__(self, profile_of: ProfileOf) -> None:
        self.profile = profile_of()

    def journal(self, store: Store) -> Journal:
        profile = self.profile
        return store.journal(profile.layer, profile.regime, profile.backend, profile.environment)

    def note(self, store: Store, tiles: range) -> None:
        self.journal(store).note(4, "auto", 1, {Tactic(tile=tile): 1.0 + tile for tile in tiles}, {})

    def tiles(self, store: Store) -> list[object]:
        read = self.journal(store).read()
        assert read.unread == ()
        return [measurement.tactic["tile"] for measurement in read.measurements]

    def prepare(self, store: Store) -> None:
        self.note(store, range(3))

    def attempt(self, store: Store) -> None:
        self.note(store, range(3, 9))


@pytest.mark.parametrize(("lasting", "code"), KINDS)
def test_a_note_loses_nothing_and_a_batch_is_there_as_a_whole_or_not_at_all(
    lasting: bool, code: int, profile_of: ProfileOf
) -> None:
    noting = Noting(profile_of)
    for store, failed, _ in faults(lasting, code, noting):
        tiles = noting.tiles(store)
        assert tiles[:3] == [0, 1, 2]
        if not lasting:
            assert tiles[3:] in ([], [3, 4, 5, 6, 7, 8])
        assert failed or len(tiles) == 9
        noting.note(store, range(9, 10))
        assert noting.tiles(store) == [*tiles, 9]


class Dropping(Noting):
    def prepare(self, store: Store) -> None:
        self.note(store, range(3))
        self.journal(store).note(8, "auto", 1, {Tactic(tile=9): 1.0}, {})

    def attempt(self, store: Store) -> None:
        self.journal(store).drop([4])


@pytest.mark.parametrize(("lasting", "code"), KINDS)
def test_what_is_dropped_from_a_journal_is_of_finished_buckets_alone(
    lasting: bool, code: int, profile_of: ProfileOf
) -> None:
    dropping = Dropping(profile_of)
    for store, failed, _ in faults(lasting, code, dropping):
        tiles = dropping.tiles(store)
        assert tiles in ([0, 1, 2, 9], [9])
        assert failed or tiles == [9]


class Probing(Saving):
    def attempt(self, store: Store) -> None:
        ensure_writable(store, self.old)


@pytest.mark.parametrize(("lasting", "code"), KINDS)
def test_an_obstacle_is_found_before_anything_is_measured(lasting: bool, code: int, profile_of: ProfileOf) -> None:
    """Only the holder's name in the lock, and cleaning up, may fail."""
    probing = Probing(profile_of)
    for store, failed, failing in faults(lasting, code, probing):
        assert load(store, probing.old) == probing.old
        assert failed == bool({"open", "write", "fsync"} & set(failing))


def test_what_killed_writers_left_is_swept_and_a_living_one_s_file_stays(store: Store, profile_of: ProfileOf) -> None:
    profile = store.save(profile_of(rows=[1]))
    path = path_of(store, profile)
    program = (
        "import os, pathlib, signal, sys; from moetune.store import files; "
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL); "
        "files.replace(pathlib.Path(sys.argv[1]), b'{')"
    )
    assert subprocess.run([sys.executable, "-c", program, path], timeout=GIVE_UP_S).returncode == -9
    (orphan,) = path.parent.glob(".*.tmp")
    others = [path.with_name(name) for name in (".notes.tmp", f"{path.name}.{16 * 'a'}.tmp", ".swp")]
    for other in others:
        other.touch()
    alive = path.with_name(f".{path.name}.{16 * '0'}.tmp")
    with alive.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.save(profile_of(rows=[2]))
        assert not orphan.exists()
        assert {alive, *others} < set(path.parent.iterdir())
    ensure_writable(store, profile)
    assert not alive.exists()
    assert set(path.parent.iterdir()) == {path, *others}


@pytest.mark.parametrize("is_member", [True, False])
def test_mode_group_and_owner_survive_a_merge_as_far_as_permitted(
    is_member: bool, store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(store, store.save(profile_of(rows=[1])))
    path.chmod(0o664)
    old, fstat = path.stat(), os.fstat
    given: list[tuple[int, int]] = []

    def fchown(descriptor: int, user: int, group: int) -> None:
        given.append((user, group))
        if user != -1 or not is_member:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    def of_another_group(descriptor: int) -> os.stat_result:
        found = list(fstat(descriptor))
        found[stat.ST_UID], found[stat.ST_GID] = old.st_uid + 1, old.st_gid + 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "fchown", fchown)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", of_another_group)
        patched.setattr(lock_module, "_lies_at", lambda *_: True)
        store.save(profile_of(rows=[2]))
    assert given == [(-1, old.st_gid), (old.st_uid, -1)]
    assert stat.S_IMODE(path.stat().st_mode) == (0o664 if is_member else 0o644)
    path.chmod(0o600)
    store.save(profile_of(rows=[4]))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
