"""The benchmarks of the store at small counts; `benchmarks/results/nothing_lost.md` has larger ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import shared_store
import store_times
from killed_tunes import Counts, Tunes
from store_times import LADDER, LIMITS_MS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _printed(script, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, BENCHMARKS / script, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_tunes_end_with_the_uninterrupted_profile():
    printed = _printed("killed_tunes.py", "--kills", 2)
    assert printed.startswith("2 kills in ")
    assert "and 0 others again" in printed
    assert "Runs that failed: 0" in printed


def test_killed_writers_lose_no_choice():
    printed = _printed("shared_store.py", "--writers", 4, "--merges", 5, "--kills", 2)
    assert printed.startswith("4 writers made 5 merges each in ")
    assert "Buckets without their last merge: 0" in printed


@pytest.mark.parametrize("field", ["repeated", "different", "damaged", "lost", "files", "processes", "failed"])
def test_anything_that_is_lost_is_not_right(field):
    assert Counts(kills=3, in_flight=3).is_right
    assert not Counts(kills=3, in_flight=4).is_right
    assert not Counts(kills=3, **{field: 1}).is_right


@pytest.mark.parametrize(
    ("before", "steps", "in_flight", "repeated"),
    [
        ([], ["a", "b"], 0, 0),
        (["a", "b"], ["b", "c"], 1, 0),
        (["a", "b"], ["c"], 0, 0),
        (["a", "b"], ["a", "b"], 1, 1),
        (["a", "b"], ["b", "b"], 1, 1),
        ([], ["a", "a"], 0, 1),
    ],
)
def test_only_the_last_step_before_a_kill_may_be_repeated_and_once(before, steps, in_flight, repeated):
    tunes = object.__new__(Tunes)
    tunes.counts = Counts()
    tunes._count_steps(before, steps)
    assert (tunes.counts.in_flight, tunes.counts.repeated) == (in_flight, repeated)


def test_a_merge_is_numbered_in_its_bucket():
    assert shared_store.numbers(shared_store.saved(4, 2, 7)) == {2: 7}


def test_store_times_are_a_table_with_the_limits(monkeypatch, capsys):
    taken = store_times.times(2, 2)
    assert list(taken)[:2] == list(LIMITS_MS)
    assert all(passed > 0 for passed, _ in taken.values())
    assert len(store_times.profile(0, [store_times.choice(rows) for rows in LADDER]).choices) == len(LADDER)
    monkeypatch.setattr(store_times, "times", lambda profiles, attempts: {"save": (21.0, 3.0), "load": (1.0, 1.0)})
    assert store_times.main([]) == 1
    assert "| save | 21.00 | 3.00 | 20.0 |" in capsys.readouterr().out
    monkeypatch.setattr(store_times, "times", lambda profiles, attempts: {"save": (2.0, 2.0), "load": (1.0, 1.0)})
    assert store_times.main([]) == 0
