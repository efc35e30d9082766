"""The logic of benchmarks/tune_overhead.py, on planted times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tune_overhead
from tune_overhead import WAYS, journaled, measured, report

from moetune.store.journal import Journal


def test_each_way_runs_once_a_round_and_the_order_turns() -> None:
    order: list[str] = []
    names = {way: name for name, way in WAYS.items()}

    def once(way: tune_overhead.Way) -> float:
        order.append(names[way])
        return 10.0 + way.journal + 2 * way.worker

    times = measured(3, once)
    assert [order[number] for number in (0, 4, 8)] == ["neither", "journal", "worker"]
    assert all(sorted(order[number : number + 4]) == sorted(WAYS) for number in (0, 4, 8))
    assert times == {"neither": [10.0] * 3, "journal": [11.0] * 3, "worker": [12.0] * 3, "both": [13.0] * 3}


@pytest.mark.parametrize(("both", "holds"), [(10.2, True), (10.4, False)])
def test_more_than_three_percent_does_not_hold(both: float, holds: bool) -> None:
    times = {"neither": [10.0] * 5, "journal": [10.0] * 5, "worker": [10.0] * 5, "both": [both] * 5}
    text, found = report(times)
    assert found is holds
    assert f"| both | {both} | +{100 * both / 10 - 100:.1f}% |" in text


def test_without_a_journal_nothing_is_appended_and_afterwards_it_is_again() -> None:
    real = Journal._append
    with journaled(False):
        assert Journal._append is not real
    assert Journal._append is real
    with journaled(True):
        assert Journal._append is real
