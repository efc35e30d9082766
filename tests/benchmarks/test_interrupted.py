"""The benchmark of signals says what is wrong, and nothing where nothing is."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import interrupted
import pytest
import waiting
from interrupted import Trial, planned, report, trial

INT = signal.SIGINT


@pytest.mark.parametrize(
    ("ended", "faults"),
    [
        (Trial(INT, 130, "error: interrupted.\n", 0.1), ()),
        (Trial(INT, -2, "", 0.1), ()),
        (Trial(INT, 0, "", 0.1), ("lost",)),
        (Trial(INT, -9, "", 120.0, hung=True), ("lost",)),
        (Trial(INT, 1, "Traceback (most recent call last):\n", 0.1), ("traceback", "another exit code")),
        (Trial(INT, 1, "This is a bug in moetune.", 0.1), ("reported as a bug", "another exit code")),
        (Trial(signal.SIGTERM, 130, "", 0.1), ("another exit code",)),
        (Trial(INT, 130, "", 0.1, orphans=1, damaged=1), ("orphans", "damaged store")),
    ],
)
def test_what_is_wrong_with_the_end_of_a_run_is_named(ended, faults):
    assert ended.faults == faults
    rows = len({ended.number, INT})
    lines = report([ended, Trial(INT, 130, "", 0.3)]).splitlines()
    assert lines[2].startswith(f"| SIGINT | {3 - rows} |")
    assert (len(lines) == 2 + rows) == (not faults)


def test_the_plan_has_each_signal_as_often_as_asked_and_depends_on_the_seed_alone():
    plan = planned(5, 2, 0)
    assert plan == planned(5, 2, 0) != planned(5, 2, 1)
    numbers = [number for number, _ in plan]
    assert [numbers.count(number) for number in (INT, signal.SIGTERM, signal.SIGHUP)] == [5, 2, 2]
    assert all(0 <= share < 1 for _, share in plan)


@pytest.mark.slow
def test_a_run_gets_its_signal_after_its_first_line(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupted, "GONE_S", 0.1)
    sleeping = [sys.executable, waiting.__file__, "wait", "sleeps"]
    done = trial(sleeping, signal.SIGTERM, 0.0, tmp_path)
    assert done.faults == ()
    assert done.returncode == 143
    printing = [sys.executable, waiting.__file__, "wait", "prints"]
    assert trial(printing, signal.SIGTERM, 5.0, tmp_path) is None
