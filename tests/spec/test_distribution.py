import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.spec.distribution import Skew, parse_distribution, skew_of
from moetune.spec.regime import Regime


@pytest.mark.parametrize(
    ("spelled", "canonical"),
    [
        ("Random", "random"),
        (" balanced ", "balanced"),
        ("ddist:2", "ddist:2"),
        ("ddist:2.0", "ddist:2"),
        ("DDIST_1.5", "ddist:1.5"),
        ("zipf:1e0", "zipf:1"),
        ("zipf:-0", "zipf:0"),
        ("powerlaw:1.20", "powerlaw:1.2"),
    ],
)
def test_each_distribution_has_one_spelling(spelled, canonical):
    assert parse_distribution(spelled) == canonical
    assert Regime(distribution=spelled).digest == Regime(distribution=canonical).digest


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("uniform", "must be one of balanced, random, ddist:X, zipf:S, powerlaw:A; given 'uniform'"),
        ("zipf", "distribution zipf takes a number from 0 on, such as zipf:1. Given: 'zipf'"),
        ("ddist:0.9", "distribution ddist takes a number from 1 on, such as ddist:2"),
        ("ddist:inf", "takes a number from 1 on"),
        ("zipf:nan", "takes a number from 0 on"),
        ("zipf:-1", "takes a number from 0 on"),
        ("powerlaw:0", "a number above 0, such as powerlaw:1.2 .equal loads are spelled balanced."),
    ],
)
def test_what_is_not_a_distribution_is_an_error_that_says_what_is(spelled, message):
    with pytest.raises(UsageError, match=message):
        Regime(distribution=spelled)


@given(st.sampled_from(["ddist", "zipf", "powerlaw"]), st.floats(1.0, 1e6))
def test_a_skew_is_read_back(kind, parameter):
    spelled = parse_distribution(f"{kind}:{parameter!r}")
    assert parse_distribution(spelled) == spelled
    found = skew_of(spelled)
    assert found is not None
    assert found == Skew(kind, pytest.approx(parameter, rel=1e-11))
    assert str(found) == spelled


def test_random_and_balanced_are_not_skewed():
    assert skew_of("random") is None
    assert Regime(distribution="balanced").skew is None
    assert Regime(distribution="zipf:1").skew == Skew("zipf", 1.0)


def test_a_skewed_regime_has_16_draws_and_a_slug_without_a_colon():
    regime = Regime(ep_size=8, distribution="ddist:1.5")
    assert regime.draws == 16
    assert regime.slug == "ep8-tp1-nodp-none-ddist1.5"


def test_the_balancer_is_in_the_key_where_it_decides_the_load():
    fields = {"ep_size": 8, "dispatch": "allgather", "redundant_experts": 32}
    plain = Regime(**fields)
    assert Regime(**fields, eplb="vllm") == plain
    assert "eplb" not in plain.model_dump()
    keys = {Regime(**fields, distribution="zipf:1", eplb=engine).digest for engine in ("vllm", "sglang", "trtllm")}
    assert len(keys) == 3
    skewed = Regime(**fields, distribution="zipf:1", eplb="vllm")
    assert skewed.slug == "ep8-tp1-dp-allgather-r32vllm-zipf1"
    assert Regime.model_validate_json(skewed.model_dump_json()) == skewed
    assert skewed.differing(plain) == {"eplb": ("vllm", None), "distribution": ("zipf:1", "random")}
    assert Regime(ep_size=8, distribution="zipf:1", eplb="vllm").eplb is None


def test_redundant_experts_under_a_skew_need_an_engine():
    with pytest.raises(UsageError, match="each engine's balancer has its own rule"):
        Regime(redundant_experts=8, distribution="zipf:1")
