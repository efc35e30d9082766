"""Workers that are killed from outside cost retries; `benchmarks/killed_workers.py` does the same with 40 kills."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import killed_workers
from killed_workers import KILLER, OTHERS, RUNS, Tuned, planned, report, tunes


@pytest.mark.slow
def test_six_kills_cost_no_tune_and_exclude_no_tactic_that_runs():
    done = tunes(6, seed=1, ladder="4")
    assert sum((one.kills for one in done), Counter()).total() == 6
    assert [one.is_right for one in done] == [True] * len(done)
    assert done[0].excluded == {KILLER}


def test_every_second_kill_is_in_a_run_and_the_others_are_in_every_other_step():
    plan = planned(40, seed=0)
    assert plan == planned(40, seed=0) != planned(40, seed=1)
    assert all(kind == "run" and RUNS[0] <= count <= RUNS[1] for kind, count in plan[::2])
    assert Counter(kind for kind, _ in plan[1::2]) == dict.fromkeys(OTHERS, 5)


def test_a_tune_that_blames_another_or_fails_is_not_right(monkeypatch, capsys):
    right = Tuned(Counter(run=2), True, frozenset({"fast"}), frozenset({KILLER}))
    blamed = Tuned(Counter(pause=1), False, frozenset({"fast"}), frozenset({"middling"}))
    failed = Tuned(Counter(start=1), False, frozenset(), frozenset(), "NoResultError: no")
    assert [one.is_right for one in (right, blamed, failed)] == [True, False, False]
    assert "4 kills (2 in a run, 1 in a start, 0 in a preparation, 0 in a reference, 1 in a pause). 1 of 3 tunes" in (
        report([right, blamed, failed])
    )
    monkeypatch.setattr(killed_workers, "tunes", lambda kills, seed: [right, blamed])
    assert killed_workers.main([]) == 1
    assert "| 2 |  |  |  |  | 1 | fast | middling |" in capsys.readouterr().out
