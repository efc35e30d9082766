from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import GIVE_UP_S
from stored import ProfileOf, ensure_writable, files

import moetune.store.lock as lock_module
from moetune.errors import StoreError, UsageError
from moetune.store.lock import LOCK_NAME, LOCK_SAID_S, LOCK_TIMEOUT_S, held
from moetune.store.store import Store

ME = f"Process {os.getpid()} on {socket.gethostname()}"


class Clock:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lock_module, "time", clock)
    return clock


@pytest.fixture
def lock(store: Store) -> Path:
    store.root.mkdir()
    return store.root / LOCK_NAME


def test_a_held_lock_names_its_holder_and_a_free_one_nobody(lock: Path) -> None:
    with held(lock):
        assert json.loads(lock.read_bytes()) == {"pid": os.getpid(), "host": socket.gethostname()}
    assert lock.read_bytes() == b""


def test_who_waits_says_so_once_after_two_seconds_and_names_the_holder_at_the_end(
    lock: Path, clock: Clock, store: Store, profile_of: ProfileOf, caplog: pytest.LogCaptureFixture
) -> None:
    said_after: list[float] = []
    handler = logging.Handler()
    handler.emit = lambda record: said_after.append(clock.now_s)  # type: ignore[method-assign]
    logging.getLogger("moetune").addHandler(handler)
    with held(lock), pytest.raises(StoreError, match="was not free within 60 s") as raised:
        store.save(profile_of())
    logging.getLogger("moetune").removeHandler(handler)
    (said,) = caplog.messages
    assert said == f"Waiting for the lock {lock}. {ME} holds it."
    assert said_after == [pytest.approx(LOCK_SAID_S, abs=0.02)]
    assert clock.now_s == pytest.approx(LOCK_TIMEOUT_S, abs=0.02)
    assert f"{ME} holds it" in raised.value.message
    assert "End that process" in raised.value.hint
    assert not files(store)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x", "host": 1}', b"\xff", b"[" * 10_000])
def test_a_holder_that_gives_no_name_is_another_process(
    content: bytes, lock: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with held(lock):
        lock.write_bytes(content)
        with pytest.raises(StoreError, match="Another process holds it"), held(lock):
            pass


def test_a_lock_whose_file_was_deleted_is_not_taken_for_the_lock(
    lock: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it is deleted, and another process makes and locks a new one."""
    other, real, deleted = held(lock), fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not deleted:
            deleted.append(lock)
            lock.unlink()
            other.__enter__()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match="not free"), held(lock):
        pass
    other.__exit__(None, None, None)
    with held(lock):
        pass


def test_a_killed_holder_leaves_the_lock_free(lock: Path, clock: Clock) -> None:
    program = (
        "import os, pathlib, signal, sys; from moetune.store.lock import held; "
        "holding = held(pathlib.Path(sys.argv[1])); holding.__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, lock], timeout=GIVE_UP_S).returncode == -9
    assert json.loads(lock.read_bytes())["host"] == socket.gethostname()
    with held(lock):
        assert json.loads(lock.read_bytes())["pid"] == os.getpid()
    assert clock.now_s == 0


def test_another_user_s_lock_file_is_named_with_what_to_do(
    lock: Path, store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.write_bytes(b"")
    monkeypatch.setattr(os, "geteuid", lambda: lock.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_: False)

    def refused(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UsageError) as raised:
        ensure_writable(store, profile_of())
    assert raised.value.message == f"The store {store.root} cannot be written: Permission denied: {lock}."
    assert "It belongs to " in raised.value.hint
    assert "`chmod g+w`" in raised.value.hint


def test_a_file_system_without_locks_is_named(
    lock: Path, store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(StoreError, match="No locks available") as raised:
        ensure_writable(store, profile_of())
    assert "has no locks" in raised.value.hint
