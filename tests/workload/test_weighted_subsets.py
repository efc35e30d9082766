import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.workload.distribution import seeded_generator
from moetune.workload.skew import capped
from moetune.workload.weighted_subsets import fitted_odds, inclusion, local_slots, sample, sample_with

brief = settings(max_examples=60)
ODDS = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=7)


def law_of(odds: list[float], size: int) -> dict[tuple[int, ...], float]:
    """The chance of each set, by enumeration."""
    sets = {chosen: math.prod(odds[i] for i in chosen) for chosen in itertools.combinations(range(len(odds)), size)}
    total = sum(sets.values())
    return {chosen: weight / total for chosen, weight in sets.items()}


@brief
@given(odds=ODDS, data=st.data())
def test_inclusion_and_local_slots_are_those_of_all_sets(odds, data):
    size = data.draw(st.integers(1, len(odds)))
    law = law_of(odds, size)
    found = inclusion(torch.tensor(odds, dtype=torch.float64), size).tolist()
    assert found == pytest.approx([sum(p for chosen, p in law.items() if i in chosen) for i in range(len(odds))])
    local = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(odds), max_size=len(odds)))
    expected = [0.0] * (size + 1)
    for chosen, chance in law.items():
        for here in itertools.product((0, 1), repeat=size):
            way = math.prod(local[i] if at else 1 - local[i] for i, at in zip(chosen, here, strict=True))
            expected[sum(here)] += chance * way
    assert local_slots(odds, local, size) == pytest.approx(expected)


@pytest.mark.parametrize("below", [None, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sets_are_drawn_with_their_chances(size, below):
    odds = torch.tensor([0.05, 0.3, 1.0, 0.6, 0.2], dtype=torch.float64)
    rows = 40000
    generator = seeded_generator("sets", size)
    found = sample(generator, odds, size, rows) if below is None else sample_with(generator, odds, size, rows, below)
    drawn = found.sort(1).values.tolist()
    law = {
        chosen: chance for chosen, chance in law_of(odds.tolist(), size).items() if below is None or min(chosen) < below
    }
    total = sum(law.values())
    assert {tuple(row) for row in drawn} <= law.keys()
    for chosen, chance in law.items():
        expected = rows * chance / total
        assert abs(drawn.count(list(chosen)) - expected) < 5 * math.sqrt(expected) + 1


def test_every_place_of_a_row_is_equally_likely():
    odds = torch.tensor([1.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    drawn = sample(seeded_generator("order"), odds, 3, 9000)
    places = (drawn == 0).sum(0).tolist()
    assert max(places) - min(places) < 5 * math.sqrt(3000)


@brief
@given(st.integers(2, 256), st.integers(1, 16), st.integers(0, 10**6))
def test_the_fitted_odds_have_the_asked_chances(num_experts, size, seed):
    size = min(size, num_experts)
    weights = torch.rand(num_experts, dtype=torch.float64, generator=seeded_generator(seed)) ** 4 + 1e-3
    chances = size * torch.tensor(capped(weights.tolist(), 1.0 / size), dtype=torch.float64)
    odds = fitted_odds(chances, size)
    assert torch.allclose(inclusion(odds, size), chances, atol=1e-6)


@brief
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 60))
def test_equal_odds_give_the_law_of_a_uniform_router(num_experts, size, local):
    size, local = min(size, num_experts), min(local, num_experts)
    ways = [math.comb(local, c) * math.comb(num_experts - local, size - c) for c in range(size + 1)]
    parts = [1.0] * local + [0.0] * (num_experts - local)
    assert local_slots([1.0] * num_experts, parts, size) == pytest.approx(
        [way / math.comb(num_experts, size) for way in ways]
    )
    assert torch.equal(
        fitted_odds(torch.full((num_experts,), size / num_experts).double(), size), torch.ones(num_experts)
    )


def test_a_certain_expert_is_in_every_set():
    chances = torch.tensor([1.0, 0.5, 0.3, 0.2], dtype=torch.float64)
    drawn = sample(seeded_generator("certain"), fitted_odds(chances, 2), 2, 5000)
    assert (drawn == 0).any(1).all()


def test_a_condition_that_almost_never_holds_is_met():
    odds = torch.tensor([1e-18, 1.0, 1.0, 1.0], dtype=torch.float64)
    drawn = sample_with(seeded_generator("rare"), odds, 2, 100, 1)
    assert (drawn == 0).any(1).all()
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
