import json
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import LOADS, TABLES, cells, load_of, replay

from moetune.search.base import Batch
from moetune.search.exhaustive import exhaustive
from moetune.search.prior_guided import halving
from moetune.spec.tactic import Tactic
from moetune.stats import geomean

GRID = tuple(Tactic(x=x, y=y) for x in range(20) for y in range(20))


def bowl(tactic: Tactic) -> float:
    return 1.0 + ((int(tactic["x"]) - 13) ** 2 + (int(tactic["y"]) - 4) ** 2) / 100


def finish(search, time_us):
    """Returns the batches of a search and its finalists; `time_us` returns None for a tactic that fails."""
    batches: list[Batch] = []
    try:
        batches.append(next(search))
        while True:
            taken = {tactic: time_us(tactic) for tactic in batches[-1].tactics}
            batches.append(search.send({tactic: us for tactic, us in taken.items() if us is not None}))
    except StopIteration as stop:
        return batches, stop.value


def test_without_a_prior_it_finds_the_bottom_of_a_bowl_in_a_tenth_of_the_measurements():
    batches, finalists = finish(halving(GRID, share=0.1), bowl)
    assert len({tactic for batch in batches for tactic in batch.tactics}) <= len(GRID) // 10
    assert bowl(finalists[0]) <= 1.05


def test_a_prior_whose_best_lies_elsewhere_is_corrected():
    prior = {tactic: bowl(Tactic(x=int(tactic["x"]) + 3, y=int(tactic["y"]) - 3)) for tactic in GRID}
    assert bowl(min(prior, key=prior.__getitem__)) > 1.15
    _, finalists = finish(halving(GRID, predicted_us=prior, share=0.1), bowl)
    assert bowl(finalists[0]) <= 1.05


def test_the_default_and_the_warm_starts_are_in_the_first_batch():
    starts = (Tactic(x=5, y=5), Tactic(x=6, y=5))
    batches, _ = finish(halving(GRID, starts=starts), bowl)
    assert {GRID[0], *starts} <= set(batches[0].tactics)


def test_a_start_that_is_no_candidate_is_ignored():
    batches, _ = finish(halving(GRID, starts=(Tactic(x=99, y=99),)), bowl)
    assert all(tactic in GRID for batch in batches for tactic in batch.tactics)


def test_the_last_rung_times_a_quarter_again_and_more_often():
    batches, finalists = finish(halving(GRID, rounds=3, more_rounds=11), bowl)
    *first, last = batches
    measured = [tactic for batch in first for tactic in batch.tactics]
    assert {batch.rounds for batch in first} == {3}
    assert last.rounds == 11
    assert len(last.tactics) == len(measured) // 4
    assert set(last.tactics) <= set(measured)
    assert set(finalists) <= set(last.tactics)


def test_what_it_says_is_likely_next_comes_next_where_the_prior_holds():
    prior = {tactic: bowl(tactic) for tactic in GRID}
    batches, _ = finish(halving(GRID, predicted_us=prior, share=0.1), bowl)
    *first, last = batches
    assert len(first) > 2
    for batch, following in pairwise(first):
        assert batch.likely_next[: len(following.tactics)] == following.tactics
    assert first[-1].likely_next == last.likely_next == ()


@given(
    size=st.integers(1, 60),
    failing=st.sets(st.integers(0, 59)),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_whatever_fails_no_tactic_is_proposed_twice_in_the_first_rungs_and_finalists_ran(size, failing, share, seed):
    chance = random.Random(seed)
    tactics = tuple(Tactic(n=number) for number in range(size))
    prior = {tactic: chance.uniform(1, 9) for tactic in tactics}
    times = {tactic: None if tactic["n"] in failing else chance.uniform(1, 9) for tactic in tactics}
    batches, finalists = finish(halving(tactics, predicted_us=prior, share=share), times.__getitem__)
    first = [tactic for batch in batches if batch.rounds == 4 for tactic in batch.tactics]
    assert len(first) == len(set(first)) == min(size, max(8, int(share * size)))
    assert all(times[tactic] is not None for tactic in finalists)
    assert list(finalists) == sorted(finalists, key=times.__getitem__)


def test_no_tactics_no_finalists():
    with pytest.raises(StopIteration) as stop:
        next(halving(()))
    assert stop.value.value == ()


@pytest.mark.no_cover
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_loads_beside_a_table_are_those_of_its_routings(path):
    """One draw of each cell: the sixteenth cell is checked by its sixteenth draw."""
    table, loads = json.loads(path.read_text()), json.loads((LOADS / path.name).read_text())
    for number, (cell, of_cell) in enumerate(zip(table["cells"], loads, strict=True)):
        assert len(of_cell) == cell["regime"]["draws"]
        draw = number % len(of_cell)
        assert of_cell[draw] == load_of(table, number, draw)


@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_on_recorded_tables_a_twentieth_of_the_measurements_is_enough(path, capsys):
    """The bar: geomean regret of 1 %, worst of 3 %, over 20 seeds, with the noise of each cell replayed."""
    regrets: dict[str, list[float]] = {}
    shares = []
    for seed in range(20):
        chance, load, starts = random.Random(seed), "", ()
        for cell in cells(path):
            starts = starts if cell.load == load else ()
            load = cell.load
            search = halving(tuple(cell.truth), predicted_us=cell.predicted_us, starts=starts)
            played = replay(search, cell, chance)
            starts = played.finalists
            regrets.setdefault(load, []).append(played.regret)
            shares.append(played.measured / len(cell.truth))
    everything = [regret for of_load in regrets.values() for regret in of_load]
    with capsys.disabled():
        print(f"\n{path.stem}: measured at most {max(shares):.1%} of the configurations")
        for load, values in {**regrets, "all": everything}.items():
            mean = geomean([1 + regret for regret in values]) - 1
            print(f"  {load:>12}: geomean regret {mean:.2%}, worst {max(values):.2%}, {len(values)} searches")
    assert max(shares) <= 0.05
    assert geomean([1 + regret for regret in everything]) <= 1.01
    assert max(everything) <= 0.03


@pytest.mark.no_cover
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_on_recorded_tables_most_of_what_is_proposed_was_said_to_be_likely(path):
    said, proposed = 0, 0
    for cell in cells(path):
        (first, *following, _), _ = finish(halving(tuple(cell.truth), predicted_us=cell.predicted_us), cell.truth.get)
        likely = set(first.likely_next)
        for batch in following:
            said += len(likely & set(batch.tactics))
            proposed += len(batch.tactics)
            likely |= set(batch.likely_next)
    assert said >= 0.7 * proposed


@pytest.mark.no_cover
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_exhaustive_search_has_next_to_no_regret_on_recorded_tables(path):
    """The replay's own control: what is left is the noise of the final alone."""
    for cell in cells(path):
        played = replay(exhaustive(tuple(cell.truth)), cell, random.Random(0))
        assert played.measured == len(cell.truth)
        assert played.regret <= 0.01


@pytest.mark.no_cover
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_prior_ranks_better_than_chance(path):
    """In nine cells of ten its thirty best hold a tactic within 10 % of the best of some thousand."""
    fronts = [sorted(cell.truth, key=cell.predicted_us.__getitem__)[:30] for cell in cells(path)]
    near = [
        min(cell.truth[tactic] for tactic in front) <= 1.1 * cell.best_us
        for cell, front in zip(cells(path), fronts, strict=True)
    ]
    assert sum(near) >= 0.9 * len(near)
