"""The logic of benchmarks/tune_overhead.py: what it times, what it adds up, and a small tune that it accounts for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tune_overhead
from tune_overhead import Account, in_fresh_process, report, starts_s, timed

TUNED = Account(tune=103.0, exchanges=90.0, work=89.0, notes=0.25, journal=0.5, end=0.25)


class Slow:
    """Takes planted time."""

    now_s = 0.0

    def does(self, seconds: float) -> str:
        Slow.now_s += seconds
        return "done"

    def fails(self) -> None:
        raise ValueError("planted")


def test_both_ways_start_once_a_round_in_turn() -> None:
    order: list[bool] = []

    def once(isolate: bool) -> float:
        order.append(isolate)
        return 3.0 if isolate else 2.0

    assert starts_s(2, once) == ([3.0, 3.0], [2.0, 2.0])
    assert order == [False, True, True, False]


def test_each_call_is_timed_and_afterwards_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_overhead, "time", SimpleNamespace(perf_counter=lambda: Slow.now_s))
    real, took = Slow.does, list[float]()
    with timed((Slow, ("does", "fails")), took.append):
        assert Slow().does(0.5) == "done"
        with pytest.raises(ValueError, match="planted"):
            Slow().fails()
    assert took == [0.5, 0.0]
    assert Slow.does is real


@pytest.mark.parametrize(("start_s", "holds"), [(1.0, True), (2.0, False)])
def test_more_than_three_percent_does_not_hold(start_s: float, holds: bool) -> None:
    text, found = report(TUNED, [2.0 + start_s, 9.0], [7.0, 2.0])
    assert found is holds
    assert f"| start of the worker | {start_s:.2f} |" in text
    assert "| messages to the worker and back | 0.75 |" in text
    assert f"| overhead | {start_s + 1.75:.2f} |" in text
    assert f"| the rest of the tune | {103 - start_s - 1.75:.2f} |" in text


@pytest.mark.slow
def test_a_small_tune_is_accounted_for() -> None:
    found = Account(*in_fresh_process(tune_overhead.account, 1))
    assert 0 < found.notes < found.work < found.exchanges < found.tune
    assert found.messages > 0
    assert 0 < found.journal + found.end < found.tune - found.exchanges
    assert in_fresh_process(tune_overhead.start_s, 1, True) > 0
