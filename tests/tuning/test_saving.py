"""What is measured is saved, or kept and raised at the end."""

import errno
from dataclasses import replace

import pytest
from faulty import FaultyFiles
from planted import LAYER, tactic
from runs import REGIME, tune_planted

from moetune.backends import registry
from moetune.errors import MoetuneError, NoResultError, NotSavedError, StoreError, UsageError
from moetune.spec.regime import Regime
from moetune.store.journal import Journal
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning.comparison import Comparison
from moetune.tuning.events import BucketChosen, BucketStarted, NotJournaled, NotSaved
from moetune.tuning.tune_all import tune_all

TIMES = {"default": 2.0, "fast": 1.0}
FULL = StoreError("The store is full.", "Free some space.")


@pytest.fixture
def full(monkeypatch):
    """Makes the first saves, of as many buckets as given, fail."""

    def _full(times):
        attempts, save = [], Store.save

        def failing(self, profile, **options):
            attempts.append([choice.rows for choice in profile.choices])
            if len(attempts) <= times:
                raise FULL
            return save(self, profile, **options)

        monkeypatch.setattr(Store, "save", failing)
        return attempts

    return _full


def _profile(error):
    assert isinstance(error.answer, Profile)
    return error.answer


def _of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def test_what_cannot_be_saved_is_saved_with_the_next_bucket(plant, full, tmp_path):
    plant(milliseconds=TIMES)
    attempts, events = full(1), []
    profile = tune_planted(store=tmp_path, on_event=events.append)
    assert attempts == [[4], [4, 8]]
    assert _of(NotSaved, events) == [NotSaved(4, FULL.message)]
    assert [event.choice.rows for event in _of(BucketChosen, events)] == [4, 8]
    assert [choice.rows for choice in profile.choices] == [4, 8]
    assert tune_planted(store=tmp_path, frozen=True) == profile


def test_what_cannot_be_saved_until_the_end_is_raised_with_the_error(plant, full, tmp_path):
    plant(milliseconds=TIMES)
    attempts, events = full(99), []
    with pytest.raises(NotSavedError, match=r"at 4, 8 rows\. The store is full") as raised:
        tune_planted(store=tmp_path, on_event=events.append)
    assert attempts == [[4], [4, 8], [4, 8]]
    assert [event.rows for event in _of(NotSaved, events)] == [4, 8]
    assert raised.value.exit_code == 5
    assert raised.value.rows == {"planted": (4, 8)}
    assert raised.value.hint.startswith("Free some space.")
    assert [(choice.rows, choice.tactic) for choice in _profile(raised.value).choices] == [
        (4, tactic("fast")),
        (8, tactic("fast")),
    ]


def test_with_stored_buckets_the_error_has_the_whole_profile_and_names_the_others(plant, full, tmp_path):
    plant(milliseconds=TIMES)

    def end(event):
        if isinstance(event, BucketStarted) and event.rows == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_planted(store=tmp_path, on_event=end)
    full(99)
    with pytest.raises(NotSavedError) as raised:
        tune_planted(store=tmp_path)
    assert raised.value.rows == {"planted": (8,)}
    assert [choice.rows for choice in _profile(raised.value).choices] == [4, 8]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, NoResultError("planted")])
def test_what_ends_the_tune_later_loses_nothing_that_is_not_saved(ending, plant, full, tmp_path):
    plant(milliseconds=TIMES)
    full(99)

    def end(event):
        if isinstance(event, BucketStarted) and event.rows == 8:
            raise ending

    with pytest.raises(NotSavedError) as raised:
        tune_planted(store=tmp_path, on_event=end)
    assert raised.value.rows == {"planted": (4,)}
    assert [choice.rows for choice in _profile(raised.value).choices] == [4]


def test_a_journal_that_cannot_be_written_is_reported_once_and_costs_no_tune(plant, tmp_path, monkeypatch):
    plant(milliseconds=TIMES)
    attempts, events = [], []

    def refused(self, *records):
        attempts.append(records)
        raise FULL

    monkeypatch.setattr(Journal, "_append", refused)
    profile = tune_planted(store=tmp_path, on_event=events.append)
    assert [choice.rows for choice in profile.choices] == [4, 8]
    assert _of(NotJournaled, events) == [NotJournaled(FULL.message)]
    assert len(attempts) == 1


def test_several_backends_are_compared_though_one_is_not_saved(plant, monkeypatch, tmp_path):
    """The error has the comparison, and names what is not saved by backend."""
    backend = plant(milliseconds=TIMES)
    other = replace(backend, name="other")
    monkeypatch.setattr(registry, "able", lambda layer, regime, rivals: ([backend, other], {}))
    save = Store.save

    def failing(self, profile, **options):
        if profile.backend == "planted":
            raise FULL
        return save(self, profile, **options)

    monkeypatch.setattr(Store, "save", failing)
    with pytest.raises(NotSavedError) as raised:
        tune_all(LAYER, REGIME, tmp_path, device="cpu", isolate=False)
    comparison = raised.value.answer
    assert isinstance(comparison, Comparison)
    assert raised.value.rows == {"planted": (4, 8)}
    assert [(result.backend, result.failed) for result in comparison.families] == [("planted", ""), ("other", "")]
    assert [bucket.rows for bucket in comparison.buckets] == [4, 8]


@pytest.mark.parametrize(("lasting", "code", "step"), [(False, errno.ENOSPC, 5), (True, errno.EROFS, 8)])
def test_whatever_call_fails_in_a_tune_nothing_is_lost_and_the_next_run_finishes(plant, tmp_path, lasting, code, step):
    regime = Regime(ladder="8", draws=4)
    backend = plant(milliseconds=TIMES)
    whole = 0
    for first in range(1, 99, step):
        store, files, events = tmp_path / str(first), FaultyFiles(first, lasting, code), []
        backend.prepared.clear()
        with pytest.MonkeyPatch.context() as patched:
            files.install(patched)
            try:
                answer = tune_planted(regime, store=store, on_event=events.append)
                assert files.has_failed or first > 20
            except NotSavedError as error:
                answer = _profile(error)
            except (StoreError, UsageError):
                answer = None
                assert backend.prepared == []
        if answer is not None:
            assert [choice.tactic for choice in answer.choices] == [tactic("fast")]
        try:
            again = tune_planted(regime, store=store)
        except MoetuneError as error:
            raise AssertionError(f"after call {first}: {files.failing}") from error
        assert [choice.tactic for choice in again.choices] == [tactic("fast")]
        assert not [path for path in store.rglob("*") if path.suffix in {".tmp", ".jsonl"}]
        whole += answer is not None
        if not files.has_failed:
            break
    else:
        raise AssertionError("no tune is without a fault")
    assert whole >= 4
