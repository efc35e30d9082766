import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moetune.spec.distribution import Skew, SkewKind
from moetune.workload.skew import (
    _log_gamma_quantile,
    _powerlaw,
    capped,
    effective_experts,
    expected_effective_experts,
    largest_parameter,
    max_over_mean,
    shares,
    symmetric_alpha,
)

GOLDEN = Path(__file__).parents[1] / "data" / "skew_laws.json"
SIZES = st.tuples(st.integers(1, 512), st.integers(1, 32))
PARAMETERS: dict[SkewKind, st.SearchStrategy[float]] = {
    "ddist": st.floats(1.0, 64.0),
    "zipf": st.floats(0.0, 8.0),
    "powerlaw": st.floats(0.01, 8.0),
}
brief = settings(max_examples=60)


@pytest.mark.parametrize("kind", PARAMETERS)
@brief
@given(data=st.data(), size=SIZES, seed=st.integers(0, 3))
def test_the_asked_effective_number_is_achieved_or_the_nearest_that_is_possible(kind, data, size, seed):
    num_experts, top_k = size
    found = shares(Skew(kind, data.draw(PARAMETERS[kind])), num_experts, top_k, seed)
    per_row = min(top_k, num_experts)
    assert math.fsum(found.values) == pytest.approx(1.0, abs=1e-9)
    assert 0.0 <= min(found.values) <= max(found.values) <= 1.0 / per_row + 1e-9
    nearest = min(max(found.asked_effective, found.least_effective), num_experts)
    assert effective_experts(found.values) == pytest.approx(nearest, rel=1e-6)
    assert found.missed == (abs(nearest / found.asked_effective - 1.0) > 0.05)


@pytest.mark.parametrize("kind", ["ddist", "zipf"])
@brief
@given(data=st.data(), size=SIZES)
def test_more_skew_means_fewer_effective_experts(kind, data, size):
    less, more = sorted(data.draw(st.tuples(PARAMETERS[kind], PARAMETERS[kind])))
    one, other = (effective_experts(shares(Skew(kind, each), *size, 0).values) for each in (less, more))
    assert one >= other * (1.0 - 1e-6)


@brief
@given(size=SIZES, seed=st.integers(0, 3))
def test_ddist_1_and_zipf_0_are_uniform(size, seed):
    for skew in (Skew("ddist", 1.0), Skew("zipf", 0.0)):
        assert shares(skew, *size, seed).values == pytest.approx([1.0 / size[0]] * size[0])


@brief
@given(size=SIZES, factor=st.floats(1.0, 64.0))
def test_ddist_asks_for_the_experts_over_x(size, factor):
    assert shares(Skew("ddist", factor), *size, 0).asked_effective == pytest.approx(max(size[0] / factor, 1.0))


def test_zipf_without_a_cap_has_the_shares_of_its_formula():
    found = sorted(shares(Skew("zipf", 0.5), 128, 8, 0).values, reverse=True)
    plain = [rank**-0.5 for rank in range(1, 129)]
    assert found == pytest.approx([each / sum(plain) for each in plain])


def test_a_share_that_passes_the_cap_is_cut_and_the_rest_keeps_the_asked_number():
    found = shares(Skew("zipf", 1.0), 128, 8, 0)
    plain = [1.0 / rank for rank in range(1, 129)]
    assert plain[0] / sum(plain) > 1.0 / 8 == max(found.values)
    assert found.asked_max_over_mean == pytest.approx(max_over_mean(plain)) == pytest.approx(23.56, abs=0.01)
    assert effective_experts(found.values) == pytest.approx(effective_experts(plain)) == pytest.approx(18.03, abs=0.01)
    assert max_over_mean(found.values) == pytest.approx(16.0)


def test_the_seed_decides_which_experts_are_busy_and_nothing_else():
    one, other = (shares(Skew("zipf", 1.0), 64, 4, seed).values for seed in (0, 1))
    assert one != other
    assert sorted(one) == sorted(other)
    assert shares(Skew("zipf", 1.0), 64, 4, 0).values == one


@brief
@given(num_experts=st.integers(4, 512), top_k=st.integers(1, 16), kind=st.sampled_from(["ddist", "zipf"]))
def test_the_largest_parameter_is_the_last_that_is_not_missed(num_experts, top_k, kind):
    assume(num_experts > 2 * top_k)
    least = shares(Skew(kind, 64.0), num_experts, top_k, 0).least_effective
    last = largest_parameter(Skew(kind, 1.0), num_experts, least)
    assert last is not None
    assume(last < 50.0)
    assert not shares(Skew(kind, last * 0.99), num_experts, top_k, 0).missed
    if num_experts / last > 1.01:
        assert shares(Skew(kind, last * 1.02), num_experts, top_k, 0).missed


def test_effective_experts_and_max_over_mean_of_plain_loads():
    assert effective_experts([5, 5, 5, 5]) == 4.0
    assert effective_experts([7, 0, 0]) == 1.0
    assert effective_experts([3, 1]) == pytest.approx(16 / 10)
    assert max_over_mean([3, 1]) == 1.5
    assert (effective_experts([0, 0]), max_over_mean([0, 0])) == (0.0, 0.0)


def test_capped_loads_keep_their_places():
    assert capped([1, 6, 3], 0.5) == pytest.approx([0.125, 0.5, 0.375])
    assert capped([0.0, 1.0], 0.5) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("alpha", [0.003, 0.05, 0.5, 1.0, 3.7, 19.9, 20.1, 400.0])
def test_the_quantiles_are_those_of_the_gamma_distribution(alpha):
    chances = [(i + 0.5) / 50 for i in range(50)]
    found = torch.tensor([_log_gamma_quantile(alpha, chance) for chance in chances], dtype=torch.float64)
    representable = found > -700
    of_found = torch.special.gammainc(torch.full_like(found, alpha), found.exp())
    tolerance = 1e-9 if alpha < 20 else 5e-4
    assert representable.any()
    assert torch.allclose(
        of_found[representable], torch.tensor(chances, dtype=torch.float64)[representable], 0, tolerance
    )


@pytest.mark.parametrize("alpha", [0.3, 1.01, 1.2, 2.0])
def test_the_power_law_is_that_of_aiconfigurator(alpha):
    """The formula of `sample_power_law` in aiconfigurator's collector/helper.py, with its bounds for 8192 tokens."""
    u = 1.0 - (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    low, high = 1.0, 8192 * 0.8
    expected = ((high ** (1 - alpha) - low ** (1 - alpha)) * u + low ** (1 - alpha)) ** (1 / (1 - alpha))
    assert torch.allclose(torch.tensor(_powerlaw(alpha, 128), dtype=torch.float64).exp(), expected)


def test_the_power_law_is_continuous_at_1():
    assert _powerlaw(1.0, 64) == pytest.approx(_powerlaw(1.0 + 1e-7, 64), rel=1e-5)


@pytest.fixture(scope="module")
def flashinfer_tuner():
    return pytest.importorskip("flashinfer.fused_moe.da_tuner", reason="from FlashInfer 0.7")


@pytest.mark.parametrize("num_experts", [8, 32, 128, 384])
@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0, 4.0])
def test_alpha_and_the_expected_effective_number_are_flashinfers(flashinfer_tuner, num_experts, factor):
    factory = flashinfer_tuner.RoutingRealizationFactory
    alpha = symmetric_alpha(num_experts, num_experts / factor)
    assert alpha == factory._solve_symmetric_alpha(num_experts, num_experts / factor)
    assert expected_effective_experts(num_experts, alpha) == factory._expected_effective_experts(num_experts, alpha)


@pytest.mark.parametrize("num_experts", [128, 384])
@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0, 2.5, 4.0])
def test_flashinfers_one_sample_is_near_and_its_effective_number_is_missed_by_up_to_15_percent(
    flashinfer_tuner, num_experts, factor
):
    asked = flashinfer_tuner.DADistribution.parse(f"ddist:{factor}")
    assert asked.name == str(Skew("ddist", factor))
    theirs = flashinfer_tuner.RoutingRealizationFactory._expert_probabilities(num_experts, asked).numpy()
    ours = shares(Skew("ddist", factor), num_experts, 1, 0).values
    assert np.abs(np.sort(theirs).cumsum() - np.sort(ours).cumsum()).max() < 0.05
    assert effective_experts(theirs.tolist()) == pytest.approx(num_experts / factor, rel=0.15)
    assert effective_experts(ours) == pytest.approx(num_experts / factor)


@pytest.mark.parametrize("num_experts", [16, 128])
@pytest.mark.parametrize("factor", [1.1, 2.0, 4.0])
def test_ddist_is_the_mean_of_sorted_samples(num_experts, factor):
    """The samples are made as FlashInfer makes its one: of a symmetric Dirichlet distribution, with 10 % uniform."""
    alpha, generator = symmetric_alpha(num_experts, num_experts / factor), np.random.default_rng(0)
    samples = 0.9 * generator.dirichlet(np.full(num_experts, alpha), 400) + 0.1 / num_experts
    mean = np.sort(samples, axis=1).mean(0)
    ours = np.sort(shares(Skew("ddist", factor), num_experts, 1, 0).values)
    assert np.abs(mean.cumsum() - ours.cumsum()).max() < 0.05


def test_the_laws_are_those_of_the_golden_file():
    """Rewrite the file with `python tests/workload/test_skew.py` only if a law is meant to change: it is in keys."""
    stored, found = json.loads(GOLDEN.read_text()), laws()
    assert stored.keys() == found.keys()
    for name, values in stored.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name


def laws() -> dict[str, list[float]]:
    cases = [("ddist", 2.0, 128, 8), ("ddist", 4.0, 16, 8), ("ddist", 4.0, 256, 8), ("zipf", 1.0, 128, 8)]
    cases += [("zipf", 0.5, 60, 4), ("powerlaw", 1.2, 128, 8), ("powerlaw", 1.01, 256, 8)]
    return {
        f"{kind}:{parameter:g} of {size}, top-{top_k}": [
            float(f"{value:.9g}")
            for value in shares(Skew(kind, parameter), size, top_k, 0).values  # type: ignore[arg-type]
        ]
        for kind, parameter, size, top_k in cases
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(laws(), indent=1) + "\n")
