import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.spec.distribution import Replay, Skew, parse_distribution, skew_of
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
        (
            "uniform",
            "must be one of balanced, random, ddist:X, zipf:S, powerlaw:A, replay:PATH.@LAYER.; given .uniform.",
        ),
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


@pytest.mark.parametrize(
    ("spelled", "canonical", "replay"),
    [
        ("replay:a.npz", "replay:a.npz", Replay("a.npz")),
        ("Replay: Sub/A b.NPZ@12 ", "replay:Sub/A b.NPZ@12", Replay("Sub/A b.NPZ", 12)),
        ("replay:a@b@3", "replay:a@b@3", Replay("a@b", 3)),
        ("replay:a@b", "replay:a@b", Replay("a@b")),
        ("replay:0123456789abcdef", "replay:0123456789abcdef", Replay("0123456789abcdef")),
    ],
)
def test_a_recording_is_read_back_with_its_case_and_layer(spelled, canonical, replay):
    assert parse_distribution(spelled) == canonical
    assert parse_distribution(canonical) == canonical
    regime = Regime(distribution=spelled)
    assert regime.replay == regime.skew == replay
    assert skew_of(canonical) is None


def test_only_sixteen_hex_digits_are_a_digest():
    assert Replay("0123456789abcdef").digest == "0123456789abcdef"
    for other in ("0123456789ABCDEF", "0123456789abcde", "./0123456789abcdef", "a.npz"):
        assert Replay(other).digest is None
    assert Replay("0123456789abcdef", 3).digest is None


def test_a_regime_whose_recording_was_not_read_has_no_path_in_its_name():
    assert Regime(distribution="replay:../a/b.npz").slug == "ep1-tp1-nodp-none-replay"
    assert Regime(distribution="replay:0123456789abcdef").slug == "ep1-tp1-nodp-none-replay0123456789abcdef"


@pytest.mark.parametrize("spelled", ["replay:", "replay: ", "replay:a\0b", f"replay:{'a' * 5000}"])
def test_a_recording_needs_a_path(spelled):
    with pytest.raises(UsageError, match="replay:PATH or replay:PATH@LAYER"):
        Regime(distribution=spelled)


def test_redundant_experts_are_placed_by_the_recorded_load_so_the_engine_is_needed():
    with pytest.raises(UsageError, match="Name the engine"):
        Regime(ep_size=4, distribution="replay:a.npz", redundant_experts=4)
    assert Regime(ep_size=4, distribution="replay:a.npz", redundant_experts=4, eplb="vllm").eplb == "vllm"
