import pytest
from sampling_cases import deepseek_r1, moe, regime_of

from moetune.errors import UsageError
from moetune.spec.regime import Regime
from moetune.tuning.plan import plan
from moetune.workload.achieved import achieved, miss
from moetune.workload.rank_law import scope_preferences
from moetune.workload.skew import effective_experts


@pytest.mark.parametrize("view", ["none", "allgather", "deduplicated", "slot"])
@pytest.mark.parametrize("spelled", ["ddist:2", "zipf:1", "powerlaw:1.01"])
def test_the_achieved_skew_is_the_asked_one_and_draws_have_it(view, spelled):
    layer, regime = moe(128, 8), regime_of(view, 8, spelled)
    found = achieved(layer, regime, 4096, 2)
    assert found.num_experts == 128
    assert found.effective_experts == pytest.approx(found.asked_effective_experts, rel=1e-4)
    assert found.drawn_effective_experts == pytest.approx(found.rank_effective_experts, rel=0.05)
    assert found.drawn_max_over_mean == pytest.approx(found.rank_max_over_mean, rel=0.05)
    assert miss(layer, regime, 2, simulate=True) is None
    if spelled == "zipf:1":
        assert found.asked_max_over_mean == pytest.approx(23.56, abs=0.01)
        assert found.max_over_mean == pytest.approx(16.0, rel=1e-4)  # 1/8 of the slots, and the mean is 1/128
    if spelled == "ddist:2":
        assert found.asked_max_over_mean is None


def test_packed_rows_have_the_skew_of_the_rank_itself():
    found = achieved(moe(128, 4), regime_of("packed", 4, "ddist:2"), 1024)
    assert (found.num_experts, found.rank_load) == (32, 1.0)
    assert found.asked_effective_experts == 16.0
    assert found.rank_effective_experts == pytest.approx(16.0, rel=1e-4)
    assert found.rank_effective_experts == pytest.approx(found.effective_experts)


def test_the_fullest_ranks_load_is_over_the_mean_and_a_balancer_evens_it_out():
    layer = moe(128, 8)
    plain, placed = (
        regime_of("allgather", 8, "ddist:4"),
        Regime(ep_size=8, dispatch="allgather", distribution="ddist:4", redundant_experts=32, eplb="sglang"),
    )
    loads = [achieved(layer, plain, 64, rank).rank_load for rank in range(8)]
    assert sum(loads) == pytest.approx(8.0)
    assert max(loads) > 1.3
    balanced = [achieved(layer, placed, 64, rank).rank_load for rank in range(8)]
    assert sum(balanced) == pytest.approx(8.0)
    assert max(balanced) < 1.01


@pytest.mark.parametrize(
    ("view", "spelled", "words", "hint"),
    [
        (
            "none",
            "ddist:16",
            "ddist:16 asks for 8 effective experts of 128, and 9.056 ",
            "up to ddist:14.84.",
        ),
        ("none", "zipf:2", "zipf:2 asks for 2.476 effective experts of 128, and 8 are achieved", "up to zipf:1.3."),
        ("none", "powerlaw:1.6", "powerlaw:1.6 asks for 4.328 ", "Reachable are 8 to 128 effective experts."),
        ("packed", "ddist:4", "asks for 4 effective experts of the 16 of a rank, and 8.6", "Reachable are 8.6"),
    ],
)
def test_a_skew_that_distinct_ids_cannot_have_is_missed(view, spelled, words, hint):
    error = miss(moe(128, 8), regime_of(view, 8, spelled))
    assert isinstance(error, UsageError)
    assert words in error.message
    assert "a row selects 8 distinct ones, so none has more than 1/8 of the slots" in error.message
    assert hint in (error.hint or "")


def test_a_group_limit_alone_does_not_miss_a_skew():
    """The busiest 16 experts lie in all 8 groups, and a token may use 4 of them."""
    found = scope_preferences(deepseek_r1(), regime_of("none", 8, "ddist:16"))
    assert effective_experts(found.chances) == pytest.approx(16.0, rel=0.05)
    assert miss(deepseek_r1(), regime_of("none", 8, "ddist:16"), simulate=True) is None


def test_random_and_balanced_cannot_miss():
    assert miss(moe(8, 2), Regime()) is None
    with pytest.raises(UsageError, match="Distribution random is not skewed"):
        achieved(moe(8, 2), Regime(), 64)


def test_a_plan_has_the_skew_and_one_of_random_has_none():
    layer = moe(64, 4)
    regime = Regime(ep_size=8, layout="deduplicated", distribution="zipf:1", ladder=[16, 512])
    found = plan(layer, regime, "torch", "cpu", rank="fullest")
    assert found.skew is not None
    assert found.skew.rank_load > 1.0
    assert found.skew.drawn_rows == 512
    assert found.buckets[-1].active_experts <= 8
    assert plan(layer, Regime(ladder=[16]), "torch", "cpu").skew is None


def test_effective_experts_are_those_of_the_glossary():
    assert effective_experts([0.5, 0.25, 0.25]) == pytest.approx(1 / (0.25 + 0.0625 + 0.0625))
