"""An older profile's winners are checked in few measurements, and what moved a step is found."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import partial
from itertools import combinations, product
from pathlib import Path

import pytest
from recorded import PAIR_TABLES, TABLES, Cell, cells, recorded_pairs, replay

from moetune.search.base import Batch, Search
from moetune.search.revalidate import FIRST, MOST, exchanged, first_tactics, revalidate, steps
from moetune.spec.tactic import Tactic
from moetune.stats import geomean
from moetune.tuning.final_comparison import SAMPLES

GRID = tuple(Tactic(x=x, y=y, on=on) for x, y, on in product((16, 32, 64, 128), (2, 3, 4), (False, True)))
AT = Tactic(x=64, y=2, on=False)


def play(search: Search, times: Mapping[Tactic, float]) -> tuple[list[Batch], tuple[Tactic, ...]]:
    """The batches of a search on exact times, and its finalists. A tactic without a time fails."""
    batches: list[Batch] = []
    try:
        batches.append(next(search))
        while True:
            batches.append(search.send({tactic: times[tactic] for tactic in batches[-1].tactics if tactic in times}))
    except StopIteration as stop:
        return batches, stop.value


def test_a_step_changes_one_tunable_to_its_next_value() -> None:
    near = {Tactic(x=32, y=2, on=False), Tactic(x=128, y=2, on=False), Tactic(x=64, y=3, on=False)}
    assert set(steps(GRID, AT)) == near | {Tactic(x=64, y=2, on=True)}


def test_a_step_passes_over_what_is_no_candidate() -> None:
    without = [tactic for tactic in GRID if tactic["x"] != 32]
    assert set(steps(without, AT)) == set(steps(GRID, AT)) - {Tactic(x=32, y=2, on=False)} | {
        Tactic(x=16, y=2, on=False)
    }
    assert steps([AT], AT) == ()


def test_an_exchange_takes_one_value_from_another_tactic() -> None:
    pairs = [Tactic(a=a, b=b) for a in range(5) for b in range(5) if (a, b) != (1, 3)]
    others = [Tactic(a=1, b=2), Tactic(a=0, b=4), Tactic(algorithm="dense")]
    assert exchanged(pairs, Tactic(a=0, b=3), others) == (Tactic(a=0, b=2), Tactic(a=0, b=4))


def test_the_first_are_the_default_the_winners_two_others_and_the_neighbors() -> None:
    default, others = GRID[-1], GRID[3:8]
    first = first_tactics(default, (AT, GRID[9], Tactic(gone=1)), others, steps(GRID, AT), GRID)
    wanted = (default, AT, GRID[9], *others[:2], *steps(GRID, AT), *others[2:])
    assert first == tuple(dict.fromkeys(wanted))[:FIRST]
    assert len(first_tactics(default, GRID, others, (), GRID)) == FIRST
    assert first_tactics(default, (AT,), (), (), GRID[:5]) == GRID[:5]


def test_if_the_winner_stays_one_batch_is_enough() -> None:
    times = dict.fromkeys(GRID, 2.0) | {AT: 1.0}
    first = first_tactics(GRID[-1], (AT,), (), steps(GRID, AT), GRID)
    batches, finalists = play(revalidate(first, AT, lambda at: steps(GRID, at)), times)
    assert [batch.tactics for batch in batches] == [first]
    assert finalists[0] == AT


@pytest.mark.parametrize("failed", [False, True])
def test_if_it_moved_two_steps_the_second_batch_finds_it(failed: bool) -> None:
    times = dict.fromkeys(GRID, 3.0)
    times |= {AT: 2.0, Tactic(x=128, y=2, on=False): 1.5, Tactic(x=128, y=3, on=False): 1.0}
    if failed:
        del times[AT]
    first = first_tactics(GRID[-1], (AT,), (), steps(GRID, AT), GRID)
    batches, finalists = play(revalidate(first, AT, lambda at: steps(GRID, at)), times)
    assert len(batches) == 2
    assert batches[1].tactics[0] == Tactic(x=128, y=2, on=False)
    assert finalists[:2] == (Tactic(x=128, y=3, on=False), Tactic(x=128, y=2, on=False))


def test_the_second_batch_is_brought_to_the_first_ones_clock_by_the_leader() -> None:
    a, b, c = (Tactic(x=x) for x in (1, 2, 3))
    search = revalidate((a, b), a, lambda at: (c,))
    next(search)
    assert search.send({a: 2.0, b: 1.0}).tactics == (b, c)
    with pytest.raises(StopIteration) as stop:
        search.send({b: 2.0, c: 1.8})
    assert stop.value.value == (c, b, a)


def test_where_all_fail_there_is_no_finalist() -> None:
    assert play(revalidate((AT,), AT, lambda at: ()), {}) == ([Batch((AT,), 2)], ())


def shifts(tactics: Mapping[Tactic, float], seed: int) -> dict[Tactic, float]:
    """How much another compiler might change each time: a factor for each value and for each pair of values."""
    chance, factors = random.Random(seed), {}

    def of(key: object, sigma: float) -> float:
        return factors.setdefault(key, chance.gauss(0, sigma))

    return {
        tactic: math.exp(
            sum(of(item, 0.015) for item in tactic.items())
            + sum(of(pair, 0.01) for pair in combinations(sorted(tactic.items()), 2))
            + chance.gauss(0, 0.005)
        )
        for tactic in tactics
    }


def checked(cell: Cell, old: list[Tactic], seed: int, final_rounds: int = SAMPLES[0], **options: int) -> float:
    """The regret, plus one, of a check of the `old` winners, that of the bucket first."""

    def neighbors(at: Tactic) -> tuple[Tactic, ...]:
        return steps(tuple(cell.truth), at)

    first = first_tactics(cell.default, old[:1], old[1:], neighbors(old[0]), tuple(cell.truth))
    found = replay(revalidate(first, old[0], neighbors, **options), cell, random.Random(seed), final_rounds)
    assert found.measured <= MOST
    return 1 + found.regret


@pytest.mark.no_cover
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_on_recorded_tables_a_changed_compiler_costs_less_than_half_of_what_the_old_winner_would(path) -> None:
    regrets, kept = [], []
    for seed in range(2):
        factors = shifts({tactic: 1.0 for cell in cells(path) for tactic in cell.truth}, seed)
        for cell in cells(path):
            truth = {tactic: time_us * factors[tactic] for tactic, time_us in cell.truth.items()}
            now = Cell(cell.load, cell.rows, truth, cell.default, cell.noise, cell.predicted_us)
            same_load = sorted(
                (other for other in cells(path) if other.load == cell.load),
                key=lambda other: abs(math.log(other.rows / cell.rows)),
            )
            old = [min(other.truth, key=lambda tactic: other.truth[tactic]) for other in same_load]
            regrets.append(checked(now, old, seed))
            kept.append(truth[old[0]] / now.best_us)
    assert geomean(regrets) - 1 < 0.5 * (geomean(kept) - 1)
    assert geomean(regrets) < 1.035
    assert max(regrets) < 1.16


def of_other_loads(path: Path) -> list[tuple[Cell, list[Tactic]]]:
    """Each cell with the winners of another load, that of its own row count first."""
    by = {(cell.load, cell.rows): cell for cell in cells(path)}
    found = []
    for (load, rows), cell in by.items():
        for other in sorted({name for name, _ in by if name != load}):
            if (other, rows) in by:
                past = sorted(
                    (one for (name, _), one in by.items() if name == other),
                    key=lambda one: abs(math.log(one.rows / rows)),
                )
                old = [min(one.truth, key=lambda tactic: one.truth[tactic]) for one in past]
                if old[0] in cell.truth:
                    found.append((cell, old))
    return found


@pytest.mark.no_cover
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_on_recorded_tables_the_winner_of_another_load_leads_to_the_best(path) -> None:
    regrets = [checked(cell, old, cell.rows) for cell, old in of_other_loads(path)]
    kept = [cell.truth[old[0]] / cell.best_us for cell, old in of_other_loads(path)]
    assert len(regrets) > 20
    assert geomean(kept) > 1.03
    assert geomean(regrets) < 1.01
    assert max(regrets) < 1.13


@pytest.mark.no_cover
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_on_recorded_tables_more_rounds_finalists_and_samples_hardly_find_better_ones(path) -> None:
    more = {"rounds": 8, "finalists": 6, "final_rounds": SAMPLES[1]}
    few, many = (
        geomean([checked(cell, old, seed, **options) for cell, old in of_other_loads(path) for seed in range(3)])
        for options in ({}, more)
    )
    assert few - many < 0.001


@pytest.mark.no_cover
@pytest.mark.parametrize("path", PAIR_TABLES[1:2], ids=lambda path: path.stem)
def test_on_recorded_pairs_a_changed_compiler_costs_less_than_a_percent(path) -> None:
    ladder = dict(recorded_pairs(path))
    winners = {rows: min(times, key=times.__getitem__) for rows, times in ladder.items()}
    chance, factors = random.Random(0), {}
    regrets, kept = [], []
    for rows, times in ladder.items():
        for tactic in times:
            for item in tactic.items():
                factors.setdefault(item, math.exp(chance.gauss(0, 0.02)))
        truth = {
            tactic: us * math.sqrt(math.prod(factors[item] for item in tactic.items())) for tactic, us in times.items()
        }
        nearest = sorted(winners, key=lambda other: abs(math.log(other / rows)))
        winner, *others = (winners[other] for other in nearest)
        neighbors = partial(exchanged, tuple(truth), others=others)
        first = first_tactics(winner, (winner,), others, neighbors(winner), tuple(truth))
        batches, finalists = play(revalidate(first, winner, neighbors), truth)
        assert sum(len(batch.tactics) for batch in batches) <= MOST + 1
        regrets.append(min(truth[tactic] for tactic in finalists) / min(truth.values()))
        kept.append(truth[winner] / min(truth.values()))
    assert geomean(regrets) < 1.01
    assert geomean(regrets) - 1 < 0.7 * (geomean(kept) - 1)
