import random
from itertools import product
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import PAIR_TABLES, recorded_pairs

from moetune.search.coordinate import ETA, HOPELESS, LEAST, PROMISING, SCAN, coordinate, promising
from moetune.spec.tactic import Tactic

FIRST, SECOND = range(45), range(45, 126)
UNTUNED = Tactic(gemm1=-1, gemm2=-1)
PAIRS = (UNTUNED, *(Tactic(gemm1=a, gemm2=b) for a in FIRST for b in SECOND))


def planted(seed=0):
    """µs of two GEMMs as seen on an H200: a few good tactics of each, the median twice as slow, some ten times."""
    chance = random.Random(seed)
    times1 = {a: 100 * (1 + chance.expovariate(1)) for a in FIRST}
    times2 = {b: 60 * (1 + chance.expovariate(1)) for b in SECOND}
    first = {t: times1[t["gemm1"]] + times2[t["gemm2"]] for t in PAIRS[1:]}
    return {UNTUNED: 900.0, **first}


def finish(search, times, noise=0.0, seed=0):
    """Runs a search on a table; noise falls with the root of the rounds. Returns the batches and the finalists."""
    chance, batches = random.Random(seed), []
    try:
        batch = next(search)
        while True:
            batches.append(batch)
            sigma = noise / batch.rounds**0.5
            batch = search.send({t: times[t] * chance.gauss(1, sigma) for t in batch.tactics if t in times})
    except StopIteration as stop:
        return batches, stop.value


def measurements(batches):
    return sum(len(batch.tactics) for batch in batches)


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_the_best_pair_of_a_sum_is_found_by_about_two_sweeps(seed):
    times = planted(seed)
    batches, finalists = finish(coordinate(PAIRS, turn=seed), times)
    assert finalists[0] == min(times, key=times.get)
    assert measurements(batches) < 1.6 * (len(FIRST) + len(SECOND))


def test_finalists_are_the_two_best_of_each_and_the_third_beside_the_best():
    times = planted()
    _, finalists = finish(coordinate(PAIRS), times)
    by = {
        name: sorted({t[name] for t in PAIRS[1:]}, key=lambda v: min(times[t] for t in PAIRS if t[name] == v))
        for name in ("gemm1", "gemm2")
    }
    (a1, a2, a3), (b1, b2, b3) = by["gemm1"][:3], by["gemm2"][:3]
    expected = {(a1, b1), (a1, b2), (a2, b1), (a2, b2), (a3, b1), (a1, b3)}
    assert {(t["gemm1"], t["gemm2"]) for t in finalists} == expected
    assert finalists[0] == Tactic(gemm1=a1, gemm2=b1)


@pytest.mark.no_cover
def test_noise_of_a_few_percent_costs_little_regret():
    regrets = []
    for seed in range(20):
        times = planted(seed)
        _, finalists = finish(coordinate(PAIRS, turn=seed), times, noise=0.04, seed=seed)
        chance = random.Random(seed)
        winner = min(finalists, key=lambda tactic: times[tactic] * chance.gauss(1, 0.01))  # a final's 16 rounds
        regrets.append(times[winner] / min(times.values()) - 1)
    assert max(regrets) < 0.03
    assert sum(regrets) / len(regrets) < 0.01


@pytest.mark.parametrize("seed", range(10))
def test_a_best_pair_that_gets_in_its_own_way_is_passed_over_in_the_final(seed):
    times = planted(seed)
    times[min(times, key=times.get)] *= 1.15
    _, finalists = finish(coordinate(PAIRS, turn=seed), times)
    assert times[finalists[0]] < 1.01 * min(times.values())


def test_hopeless_values_are_timed_once_and_the_rest_with_more_rounds():
    batches, _ = finish(coordinate(PAIRS, rounds=(1, 4, 16)), times := planted())
    assert [batch.rounds for batch in batches] == [1, 1, 4, 16, 1, 4, 16]
    for once, again, best in (batches[1:4], batches[4:7]):
        assert set(best.tactics) < set(again.tactics) < set(once.tactics)
        fastest = min(times[t] for t in once.tactics)
        assert len(again.tactics) <= max(LEAST, len(once.tactics) // ETA)
        assert all(times[t] <= HOPELESS * fastest for t in again.tactics[LEAST:])
        assert best.tactics == tuple(sorted(once.tactics, key=times.get)[:LEAST])


def test_warm_starts_are_tried_first_and_shrink_the_sweeps():
    times = planted()
    near = sorted(PAIRS[1:], key=times.get)[:10]
    batches, finalists = finish(coordinate(PAIRS, starts=near, explore=12), times)
    cold, _ = finish(coordinate(PAIRS), times)
    assert batches[0].tactics == tuple(near[:SCAN])
    values = {t["gemm1"] for t in near}
    explored = {11, 23, 35}  # of -1, which no line has, and FIRST
    assert [t["gemm1"] for t in batches[1].tactics] == sorted(values | explored)
    assert measurements(batches) < 0.5 * measurements(cold)
    assert finalists[0] == near[0]


@pytest.mark.parametrize("explore", [1, 3, 5])
@pytest.mark.parametrize("first", [0, 7])
def test_what_no_start_has_is_explored_in_as_many_turns_in_a_row(explore, first):
    times = planted()
    start = [max(PAIRS[1:], key=times.get)]
    tried = []
    for turn in range(first, first + explore):
        batches, _ = finish(coordinate(PAIRS, starts=start, explore=explore, turn=turn), times)
        tried.append([{t[name] for batch in batches for t in batch.tactics} for name in ("gemm1", "gemm2")])
    for values, in_turn in zip((FIRST, SECOND), zip(*tried, strict=True), strict=True):
        assert set.union(*in_turn) == set(values)
        assert all(len(of_turn) <= len(values) / explore + 4 for of_turn in in_turn)


@pytest.mark.no_cover
def test_along_a_ladder_warm_starts_follow_a_best_that_moves():
    """The best tile grows with the rows; each bucket knows only what its neighbor measured."""
    starts, counts = (), []
    for bucket in range(21):
        times = {t: 200.0 + 3 * abs(t["gemm1"] - 2 * bucket) + 2 * abs(t["gemm2"] - 50 - 3 * bucket) for t in PAIRS[1:]}
        measured = {}
        search = coordinate(PAIRS[1:], starts=starts, turn=bucket)
        batches, finalists = finish(search, times)
        for batch in batches:
            measured |= {t: times[t] for t in batch.tactics}
        starts = promising(measured)
        counts.append(measurements(batches))
        assert times[finalists[0]] / min(times.values()) < 1.03
    assert max(counts) <= 1.6 * (len(FIRST) + len(SECOND))


def test_warm_starts_that_are_no_candidates_are_ignored():
    times = planted()
    foreign = [Tactic(gemm1=999, gemm2=46), Tactic(algorithm="dense")]
    assert finish(coordinate(PAIRS, starts=foreign), times) == finish(coordinate(PAIRS), times)


@pytest.mark.parametrize("starts", [(), (UNTUNED, PAIRS[77])])
def test_a_tactic_off_the_grid_is_no_base_but_stays_in_the_final_when_it_leads(starts):
    few = PAIRS[: SCAN + 200]
    times = {t: 100.0 + t["gemm1"] + t["gemm2"] for t in few} | {UNTUNED: 1.0}
    turn = next(t for t in range(999) if UNTUNED in random.Random(t).sample(list(few), SCAN))
    _, finalists = finish(coordinate(few, starts=starts, turn=turn, explore=1), times)
    assert finalists[:2] == (UNTUNED, PAIRS[1])


@pytest.mark.no_cover
def test_only_what_is_legal_is_proposed_and_failures_are_left_out():
    legal = [t for t in PAIRS if (t["gemm1"] + t["gemm2"]) % 3]
    times = {t: us for t, us in planted().items() if t in set(legal) and t["gemm1"] % 5}
    batches, finalists = finish(coordinate(legal), times)
    assert {t for batch in batches for t in batch.tactics} <= set(legal)
    assert finalists
    assert set(finalists) <= set(times)


def test_six_coordinates_and_two_passes_find_what_depends_on_one_another():
    names = ("m", "n", "k", "group", "warps", "stages")
    grid = [
        Tactic(dict(zip(names, values, strict=True)))
        for values in product(range(4), range(4), range(3), range(4), range(2), range(4))
    ]
    times = {
        t: 10.0 + abs(t["m"] - 2) + abs(t["n"] - t["m"]) + t["k"] + abs(t["stages"] - 3) + abs(t["warps"] - t["m"] // 2)
        for t in grid
    }
    _, finalists = finish(coordinate(grid, passes=4), times)
    assert times[finalists[0]] == min(times.values())
    assert len(finalists) == 6


def test_one_coordinate_one_tactic_or_none_are_no_special_cases():
    line = [Tactic(algorithm=name) for name in "abcdef"]
    times = {t: 10.0 + i for i, t in enumerate(line)}
    assert finish(coordinate(line), times)[1][0] == line[0]
    assert finish(coordinate(line[:1]), times)[1] == (line[0],)
    assert finish(coordinate([]), times) == ([], ())
    assert finish(coordinate(line), {})[1] == ()


def test_promising_are_those_near_the_best_in_order():
    a, b, c = (Tactic(number=n) for n in range(3))
    assert promising({a: 10.0 * PROMISING, b: 10.0, c: 10.1 * PROMISING}) == (b, a)
    assert promising({}) == ()


def test_promising_is_what_is_near_the_best_of_its_own_line():
    """GEMM1 was swept beside a poor GEMM2. Its second best value is far slower than the best pair, and promising."""
    times = {Tactic(gemm1=a, gemm2=50): 100.0 + us for a, us in enumerate((0.0, 10.0, 60.0))}
    times |= {Tactic(gemm1=0, gemm2=b): us for b, us in ((51, 50.0), (52, 90.0))}
    alone = Tactic(gemm1=7, gemm2=70)
    kept = promising({**times, alone: 20.0, UNTUNED: 10.0})
    assert kept == (Tactic(gemm1=0, gemm2=51), Tactic(gemm1=0, gemm2=50), Tactic(gemm1=1, gemm2=50))


def drawn(search, times, chance, sigma=0.02, noise=0.003):
    """Runs a search on draws of which each favors other values of each GEMM; the finalists, and what was measured."""
    leads, measured, spent = {}, {}, 0.0

    def once(tactic, draw):
        lead = sum(leads.setdefault((*part, draw), chance.gauss(0, sigma / 2**0.5)) for part in tactic.items())
        return times[tactic] * (1 + lead + chance.gauss(0, noise))

    try:
        batch = next(search)
        while True:
            taken = {t: fmean(once(t, draw % 16) for draw in range(batch.rounds)) for t in batch.tactics}
            measured |= taken
            spent += sum(times[tactic] for tactic in batch.tactics) * batch.rounds
            batch = search.send(taken)
    except StopIteration as stop:
        return stop.value, measured, spent


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("table", PAIR_TABLES, ids=lambda path: path.stem.removeprefix("flashinfer_cutlass-"))
def test_along_a_recorded_ladder_a_finalist_is_as_good_as_the_best(table, seed):
    """21 buckets of Qwen3-235B on an H200; of 3645 pairs about 90 are timed in each."""
    chance, starts, known, losses = random.Random(seed), (), (), []
    for turn, (_, times) in enumerate(recorded_pairs(table)):
        search = coordinate(list(times), starts=(*starts, *known) if starts else (), rounds=(1, 4, 8), turn=turn)
        finalists, measured, spent = drawn(search, times, chance)
        best = min(times.values())
        losses.append(min(times[tactic] for tactic in finalists) / best - 1)
        assert spent < (450 if starts else 700) * best
        starts, known = finalists[:4], promising(measured)
    assert len(losses) == 21
    assert fmean(losses) < 0.002
    assert max(losses) < 0.02
