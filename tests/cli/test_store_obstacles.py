"""A store that cannot be written: known before anything is measured, or the result is printed."""

import errno
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
from faulty import FaultyFiles

import moetune.store.lock as lock_module
from moetune.store.lock import LOCK_NAME, held
from moetune.store.store import Store
from moetune.tuning.bucket_tuner import BucketTuner

TUNE = importlib.import_module("moetune.tuning.tune")


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def command(tiny, planted, store):
    question = ("--ep", "4", "--dp", "--ladder", "4,8", "--draws", "1", "--backend", "planted")
    return ("tune", "--model", tiny(), *question, "--store", store)


@pytest.mark.parametrize(
    ("code", "exit_code", "hint"), [(errno.ENOSPC, 1, "Free some space"), (errno.EROFS, 2, "Give another folder")]
)
def test_a_full_disk_or_a_read_only_mount_is_known_before_anything_is_measured(
    code, exit_code, hint, moetune, planted, command, store
):
    store.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        FaultyFiles(1, True, code).install(patched)
        result = moetune(*command, "--json")
    assert result.exit_code == exit_code
    assert f"error: The store {store} cannot be written: {os.strerror(code)}" in result.stderr
    assert hint in result.stderr
    assert result.stdout == ""
    assert planted.prepared == []


def test_a_full_disk_is_known_though_the_lock_file_exists(moetune, planted, command, store):
    """Its name is not written then, so the lock is taken; the probe finds it."""
    store.mkdir()
    (store / LOCK_NAME).touch()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", _raising(errno.ENOSPC))
        result = moetune(*command)
    assert (result.exit_code, planted.prepared) == (1, [])
    assert "No space left on device" in result.stderr


def _raising(code):
    def call(*_):
        raise OSError(code, os.strerror(code))

    return call


def test_a_live_holder_of_the_lock_is_known_before_anything_is_measured(moetune, planted, command, store, monkeypatch):
    monkeypatch.setattr(lock_module, "LOCK_TIMEOUT_S", 0.0)
    store.mkdir()
    with held(store / LOCK_NAME):
        result = moetune(*command)
    assert (result.exit_code, planted.prepared) == (1, [])
    assert f"Process {os.getpid()} on " in result.stderr
    assert "End that process" in result.stderr
    assert moetune(*command).exit_code == 0


def test_another_user_s_journal_is_known_before_anything_is_measured(moetune, planted, command, store):
    real, opened = Path.open, []

    def refused(self, mode="r", *arguments, **options):
        if self.name.endswith(".journal.jsonl") and mode == "r+b":
            opened.append(self)
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, mode, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "open", refused)
        result = moetune(*command)
    assert (result.exit_code, planted.prepared) == (2, [])
    assert f"Permission denied: {opened[0]}" in result.stderr


@pytest.fixture
def full_after_the_first(monkeypatch):
    """The disk becomes full once the first bucket is saved."""
    from moetune.errors import StoreError

    save, saved = Store.save, []

    def full(self, profile, **options):
        if saved:
            raise StoreError("The disk is full.", "Free some space.")
        saved.append(profile)
        return save(self, profile, **options)

    monkeypatch.setattr(Store, "save", full)


def test_what_cannot_be_saved_is_in_the_one_document_with_exit_code_4(moetune, command, full_after_the_first):
    result = moetune(*command, "--json")
    assert result.exit_code == 5
    document = json.loads(result.stdout)
    assert [choice["rows"] for choice in document["choices"]] == [4, 8]
    assert document["unsaved"] == {"planted": [8]}
    lines = result.stderr.splitlines()
    assert "warning: 8 rows: the result cannot be saved yet. The disk is full." in lines
    assert "error: What was measured is not saved, at 8 rows. The disk is full. Free some space." in result.stderr


def test_what_cannot_be_saved_is_printed(moetune, command, full_after_the_first):
    result = moetune(*command)
    assert result.exit_code == 5
    assert {"4", "8"} < {line.split()[0] for line in result.stdout.splitlines() if " fast" in line}


def test_a_saved_result_has_no_such_field(moetune, command):
    result = moetune(*command, "--json")
    assert result.exit_code == 0
    assert "unsaved" not in json.loads(result.stdout)


def test_a_folder_that_vanishes_meanwhile_is_made_again(moetune, command, store, monkeypatch):
    """With what was saved before; a journal that is lost with it is of no use any more."""
    measure, vanished = BucketTuner._measure, []

    def vanishing(self, batch):
        if self._bucket.rows == 8 and not vanished:
            vanished.append(store)
            shutil.rmtree(store)
        return measure(self, batch)

    monkeypatch.setattr(BucketTuner, "_measure", vanishing)
    result = moetune(*command, "--json")
    assert result.exit_code == 0
    assert vanished
    ((_, profile),) = Store(store).profiles()
    assert [choice.rows for choice in profile.choices] == [4, 8]
