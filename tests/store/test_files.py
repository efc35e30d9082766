from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from stored import ProfileOf, damage, files, load, path_of

from moetune.errors import DamagedProfileError, StoreError
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.store.store import Store


def test_reader_never_sees_half_a_file(store: Store, profile_of: ProfileOf) -> None:
    profile = profile_of(Regime(ladder=list(range(1, 200)), tune_max_num_tokens=200))
    store.save(profile)
    path, writing = path_of(store, profile), threading.Event()

    def write() -> None:
        for _ in range(15):
            store.save(profile)
        writing.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not writing.is_set():
        assert Profile.model_validate_json(path.read_bytes()) == profile
        reads += 1
    writer.join()
    assert reads > 0


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_save_that_fails_leaves_the_old_file_and_no_litter(
    failing: str, store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.save(profile_of(rows=[1]))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
        with pytest.raises(StoreError, match="No space left") as raised:
            store.save(profile_of(rows=[2]))
    assert raised.value.exit_code == 1
    assert files(store) == {path_of(store, old)}
    assert load(store, old) == old


def test_file_and_folder_are_on_disk_before_save_returns(
    store: Store, profile_of: ProfileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = path_of(store, profile_of()), []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append(("replace", self))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    store.save(profile_of())
    [renamed] = [index for index, (what, _) in enumerate(events) if what == "replace"]
    temporary = events[renamed][1]
    assert temporary.parent == path.parent
    assert ("fsync", temporary) in events[:renamed]
    assert ("fsync", path.parent) in events[renamed:]
    assert {("fsync", folder) for folder in (store.root, *path.parents[1:3])} <= set(events)


def test_damaged_files_never_overwrite_each_other(store: Store, profile_of: ProfileOf) -> None:
    for number in range(1, 4):
        path, _ = damage(store, profile_of(), lambda good, number=number: b"damage %d" % number)
        with pytest.raises(DamagedProfileError, match=f"damaged-{number}"):
            load(store, profile_of())
    kept = {aside.name.removeprefix(path.name): aside.read_text() for aside in files(store)}
    assert kept == {f".damaged-{number}": f"damage {number}" for number in range(1, 4)}
