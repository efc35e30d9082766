"""Equal questions have equal keys, every field counts, and an invalid regime is refused in one line."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moetune.errors import UsageError
from moetune.spec.enums import DISTRIBUTION_VARIABLE
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard

LAYER = MoELayer(name="small", num_experts=64, top_k=4, hidden_size=256, intermediate_size=128)
DISPATCHES = st.sampled_from(
    [{"attention_dp": False, "dispatch": "none"}, {"attention_dp": True, "dispatch": "allgather"}]
    + [
        {"attention_dp": True, "dispatch": "alltoall", "layout": layout}
        for layout in ("packed", "deduplicated", "slot", "pool")
    ]
)
FIELDS = {
    "ep_size": st.sampled_from([1, 2, 4, 8, 64]),
    "tp_size": st.integers(1, 8),
    "redundant_experts": st.integers(0, 64),
    "distribution": st.sampled_from(["random", "balanced"]),
    "seed": st.integers(0, 2**63 - 1),
    "draws": st.integers(1, 32),
    "ladder": st.sampled_from(["pow2", "hybrid", "vllm", "64,128", "pow2/8"]),
    "tune_max_num_tokens": st.integers(128, 100_000),
    "uneven_shards": st.booleans(),
    "rank": st.just(0),
}
REGIMES = st.builds(lambda dispatch, fields: Regime(**dispatch, **fields), DISPATCHES, st.fixed_dictionaries(FIELDS))


@pytest.mark.parametrize("field", FIELDS)
@given(data=st.data())
def test_changing_one_field_changes_the_key_and_names_that_field(field, data):
    regime = data.draw(REGIMES)
    value = data.draw(FIELDS[field])
    other = Regime(**{**dict(regime), field: value})
    changed = getattr(other, field) != getattr(regime, field)
    assert (other.digest != regime.digest) == changed
    assert (other == regime) != changed
    follows = {"tune_max_num_tokens"} if field == "ladder" else set()
    assert set(regime.differing(other)) - follows == ({field} if changed else set())


@given(one=DISPATCHES, other=DISPATCHES, fields=st.fixed_dictionaries(FIELDS))
def test_changing_how_tokens_travel_changes_the_key(one, other, fields):
    first, second = Regime(**one, **fields), Regime(**other, **fields)
    assert (first.digest == second.digest) == (one == other)
    assert set(first.differing(second)) <= {"attention_dp", "dispatch", "layout"}
    if one["attention_dp"] != other["attention_dp"]:
        assert "attention_dp" in first.differing(second)


@given(regime=REGIMES, data=st.data())
def test_a_rank_is_in_the_key_unless_it_is_0(regime, data):
    rank = data.draw(st.integers(0, regime.ep_size - 1))
    other = Regime(**{**dict(regime), "rank": rank})
    assert (other.digest != regime.digest) == (rank != 0) == ("rank" in other.model_dump())
    assert regime.differing(other) == ({"rank": (0, rank)} if rank else {})
    assert other.differing(regime) == ({"rank": (rank, 0)} if rank else {})
    assert Regime.model_validate_json(other.model_dump_json()) == other
    assert other.slug == regime.slug + (f"-rank{rank}" if rank else "")


def test_a_shard_is_the_regimes_ranks_unless_another_is_given():
    regime = Regime(ep_size=4, rank=2)
    assert regime.shard(LAYER).first == 32
    assert regime.shard(LAYER, 0).first == 0
    with pytest.raises(UsageError, match="rank must be 0 … 3, given 4"):
        Regime(ep_size=4, rank=4)


def test_every_field_is_in_the_key():
    others = {"attention_dp", "dispatch", "layout", "eplb", "also", "objective"}  # tested by themselves
    assert set(FIELDS) | others == set(Regime.model_fields)


ALSO = st.lists(
    st.tuples(st.sampled_from(["balanced", "zipf:1", "ddist:2", "powerlaw:1.2"]), st.integers(1, 24)),
    max_size=4,
    unique_by=lambda pair: pair[0],
)


@given(regime=REGIMES, also=ALSO, objective=st.sampled_from(["mean", "worst"]), data=st.data())
def test_further_distributions_and_the_objective_are_in_the_key_in_any_order(regime, also, objective, data):
    fields = {**dict(regime), "distribution": "random"}
    del fields["also"], fields["objective"]
    if fields["redundant_experts"]:
        fields["eplb"] = "vllm"
    plain = Regime(**fields)
    words = [f"{name}={weight / 100}" for name, weight in also]
    mixed = Regime(**fields, also=words, objective=objective) if also else plain
    shuffled = data.draw(st.permutations(words))
    if also:
        assert Regime(**fields, also=shuffled, objective=objective) == mixed
        other = Regime(**fields, also=words, objective="mean" if objective == "worst" else "worst")
        assert mixed.differing(other) == {"objective": (objective, other.objective)}
        assert mixed.differing(plain).keys() >= {"also", "objective"}
        assert len({plain.digest, mixed.digest, other.digest}) == 3
    assert ("also" in mixed.model_dump()) == ("objective" in mixed.model_dump()) == bool(also)
    assert Regime.model_validate_json(mixed.model_dump_json()) == mixed
    assert sum(each.weight for each in mixed.distributions) == pytest.approx(1)
    assert [part.distribution for part in mixed.parts] == [each.distribution for each in mixed.distributions]
    for part in mixed.parts:
        assert not part.also
        assert (part.ladder, part.seed, part.rank) == (mixed.ladder, mixed.seed, mixed.rank)
        assert (part.eplb is not None) == bool(part.skew and mixed.redundant_experts)
        assert min(2, mixed.draws) <= part.draws <= mixed.draws


def test_a_regime_of_one_distribution_keeps_its_key_byte_for_byte():
    assert "also" not in Regime().model_dump_json()
    assert "objective" not in Regime().model_dump_json()
    assert Regime(also=()).digest == Regime(also=None).digest == Regime().digest == "5eb2c8c7089037aa"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"also": "zipf:1"}, "a distribution and its weight between 0 and 1, such as zipf:1=0.3"),
        ({"also": "zipf:1=1"}, "weight between 0 and 1"),
        ({"also": "zipf:1=nan"}, "weight between 0 and 1"),
        ({"also": "uneven=0.1"}, "must be one of balanced"),
        ({"also": ["zipf:1=0.1", "zipf:1=0.2"]}, "The distribution zipf:1 is given twice"),
        ({"also": "random=0.1"}, "The distribution random is given twice"),
        ({"also": ["zipf:1=0.5", "zipf:2=0.5"]}, "leave nothing for the distribution random: they add up to 1"),
        ({"also": [f"zipf:{at}=0.01" for at in range(17)]}, "at most 16 distributions, given 17"),
        ({"objective": "worst"}, "The objective worst is for several distributions, and there is one"),
        ({"also": "zipf:1=0.5", "objective": "best"}, "objective"),
        ({"also": "zipf:1=0.5", "redundant_experts": 8}, "Under zipf:1 the redundant experts are placed by load"),
    ],
)
def test_weights_that_do_not_add_up_and_names_given_twice_are_errors(fields, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Regime(**fields)


def test_the_path_of_a_further_recording_may_have_an_equals_sign():
    regime = Regime(also="replay:a=b/Traffic.npz@3=0.25")
    assert regime.also == ("replay:a=b/Traffic.npz@3=0.25",)
    assert [(each.source, each.layer) for each in regime.recordings] == [("a=b/Traffic.npz", 3)]
    assert regime.slug.endswith("random-also1-mean")


@given(regime=REGIMES)
def test_a_question_given_in_full_has_the_key_of_the_short_one(regime):
    assert Regime(**dict(regime)).digest == regime.digest
    assert Regime.model_validate_json(regime.model_dump_json()) == regime
    assert hash(Regime(**dict(regime))) == hash(regime)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({}, {"dispatch": "none", "attention_dp": False, "layout": None, "draws": 16, "ladder": "pow2"}),
        ({"attention_dp": True}, {"attention_dp": True, "dispatch": "alltoall", "layout": "packed"}),
        ({"dispatch": "alltoall"}, {"attention_dp": True, "layout": "packed"}),
        ({"dispatch": "allgather"}, {"attention_dp": True, "dispatch": "allgather"}),
        ({"layout": "pool"}, {"attention_dp": True, "dispatch": "alltoall", "layout": "pool"}),
        ({"layout": "batched", "ep_size": 8}, {"layout": "batched", "ep_size": 8, "ladder": [2048]}),
        ({"distribution": "Balanced"}, {"distribution": "balanced", "draws": 1}),
        ({"ladder": "1,2,4"}, {"ladder": [1, 2, 4], "tune_max_num_tokens": 8192}),
        ({"ladder": "8193,8194"}, {"ladder": (8193, 8194), "tune_max_num_tokens": 8194}),
        ({"ladder": "1,10000"}, {"ladder": (1, 10000), "tune_max_num_tokens": 10000}),
        ({"ep_size": None, "dispatch": None}, {"ep_size": 1}),
    ],
)
def test_defaults_given_or_not_are_one_question(short, long):
    assert Regime(**short) == Regime(**long)
    assert Regime(**short).digest == Regime(**long).digest


def test_a_regime_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Regime().ep_size = 2  # type: ignore[misc]


def test_the_key_does_not_depend_on_the_process():
    assert Regime(ep_size=8, attention_dp=True).digest == "f81bce1330208237"


def test_only_the_batched_layout_has_a_capacity():
    regime = Regime(ep_size=4, layout="batched")
    assert (regime.capacity, regime.buckets, regime.served(1024)) == (1024, (1024,), range(1, 1025))
    assert Regime(ep_size=4, layout="batched", ladder=[30]).capacity == 30
    with pytest.raises(UsageError, match="given pool"):
        _ = Regime(ep_size=4, layout="pool").capacity


def test_the_slug_is_readable():
    assert Regime(ep_size=8, attention_dp=True).slug == "ep8-tp1-dp-alltoall-packed-random"
    assert Regime(ep_size=4, redundant_experts=8, distribution="balanced").slug == "ep4-tp1-nodp-none-r8-balanced"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ep_size": 0}, "ep_size"),
        ({"ep_size": -4}, "ep_size"),
        ({"ep_size": "two"}, "ep_size"),
        ({"tp_size": 0}, "tp_size"),
        ({"redundant_experts": -1}, "redundant_experts"),
        ({"draws": 0}, "draws"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"tune_max_num_tokens": 0}, "tune_max_num_tokens"),
        ({"dispatch": "broadcast"}, "dispatch"),
        ({"layout": "dense"}, "layout"),
        ({"attention_dp": False, "dispatch": "alltoall"}, "none"),
        ({"attention_dp": False, "dispatch": "allgather"}, "none"),
        ({"attention_dp": True, "dispatch": "none"}, "attention_dp"),
        ({"attention_dp": False, "layout": "packed"}, "layout"),
        ({"dispatch": "allgather", "layout": "packed"}, "layout"),
        ({"distribution": "blanced"}, "balanced, random"),
        ({"ladder": "4,2"}, "ascending"),
        ({"ladder": "fast"}, "ladder"),
        ({"ladder": "1,200", "tune_max_num_tokens": 100}, "200"),
        ({"layout": "batched", "ladder": "vllm"}, "one bucket, the capacity"),
        ({"layout": "batched", "ladder": "16,32"}, "one bucket, the capacity"),
        ({"layout": "batched", "ladder": "16/2"}, "one bucket, the capacity"),
        ({"layout": "batched", "ladder": "4", "ep_size": 8}, "--ladder 2048"),
        ({"layout": "batched", "ep_size": "two"}, "ep_size"),
        ({"layout": "batched", "ladder": "2048", "tune_max_num_tokens": 1024}, "2048"),
        ({"layout": "pool", "ep_size": 3, "ladder": "4,8"}, "multiples of 3"),
        ({"expert_parallel": 2}, "expert_parallel"),
    ],
)
def test_an_invalid_regime_is_a_one_line_usage_error(given, named):
    with pytest.raises(UsageError) as error:
        Regime(**given)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pool_keeps_the_buckets_that_ep_divides_and_names_the_others():
    regime = Regime(ep_size=8, layout="pool", tune_max_num_tokens=64)
    assert regime.buckets == (8, 16, 32, 64)
    assert regime.skipped_buckets == (1, 2, 4)


@pytest.mark.parametrize("spelled", ["balanced", "BALANCED", " Balanced "])
def test_the_variable_gives_the_default_distribution_and_its_draws(spelled):
    regime = Regime(ep_size=8, attention_dp=True, seed=3).with_default_distribution(spelled)
    assert regime == Regime(ep_size=8, attention_dp=True, seed=3, distribution="balanced")
    assert regime.draws == 1


@pytest.mark.parametrize("given", ["random", "balanced"])
def test_an_explicit_distribution_wins_over_the_variable(given):
    regime = Regime(distribution=given)
    other = {"random": "balanced", "balanced": "random"}[given]
    assert regime.with_default_distribution(other) == regime


def test_explicit_draws_stay_under_the_variable():
    assert Regime(draws=5).with_default_distribution("balanced").draws == 5


def test_a_distribution_of_none_was_not_given():
    assert Regime(distribution=None).with_default_distribution("balanced").distribution == "balanced"  # type: ignore[arg-type]


@pytest.mark.parametrize("spelled", [None, ""])
def test_without_the_variable_nothing_changes(spelled):
    assert Regime(ep_size=2).with_default_distribution(spelled) == Regime(ep_size=2)


@pytest.mark.parametrize("regime", [Regime(), Regime(distribution="random")])
def test_a_bad_variable_is_an_error_that_names_it_and_lists_the_values(regime):
    message = f"{DISTRIBUTION_VARIABLE} must be one of balanced, random, ddist:X, zipf:S, powerlaw:A, replay:PATH"
    with pytest.raises(UsageError, match=rf"{message}\[@LAYER\]; given 'foo'"):
        regime.with_default_distribution("foo")


@given(experts=st.integers(1, 300), redundant=st.integers(0, 40), ep_size=st.integers(1, 64), uneven=st.booleans())
def test_shards_are_contiguous_and_cover_every_slot_once(experts, redundant, ep_size, uneven):
    layer = LAYER.model_copy(update={"num_experts": experts, "top_k": 1})
    regime = Regime(ep_size=ep_size, redundant_experts=redundant, uneven_shards=uneven)
    slots = experts + redundant
    if ep_size > slots or (slots % ep_size and not uneven):
        with pytest.raises(UsageError, match="ep_size"):
            regime.shard(layer)
        return
    shards = [regime.shard(layer, rank) for rank in range(ep_size)]
    assert [slot for s in shards for slot in range(s.first, s.first + s.num_local)] == list(range(slots))
    sizes = [shard.num_local for shard in shards]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] == bool(slots % ep_size)
    assert sizes.count(sizes[0]) == (slots % ep_size or ep_size)


def test_vllm_gives_the_first_ranks_one_expert_more():
    regime = Regime(ep_size=3, uneven_shards=True)
    layer = LAYER.model_copy(update={"num_experts": 8})
    assert [regime.shard(layer, rank) for rank in range(3)] == [Shard(0, 0, 3, 8), Shard(1, 3, 3, 8), Shard(2, 6, 2, 8)]


@pytest.mark.parametrize(
    ("given", "rank", "named"),
    [
        ({"ep_size": 3}, 0, "does not divide the 64 experts"),
        ({"ep_size": 128}, 0, "exceeds the 64 experts"),
        ({"ep_size": 8}, 8, "0 … 7"),
        ({"ep_size": 8}, -1, "rank"),
        ({"tp_size": 3}, 0, "tp_size = 3"),
        ({"ep_size": 8, "redundant_experts": 4}, 0, "68 experts"),
    ],
)
def test_a_shard_that_cannot_be_is_a_one_line_usage_error(given, rank, named):
    with pytest.raises(UsageError) as error:
        Regime(**given).shard(LAYER, rank)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("regime", "width"), [(Regime(), 4), (Regime(ep_size=8, layout="packed"), 4), (Regime(ep_size=8, layout="slot"), 1)]
)
def test_a_row_has_k_ids_and_one_in_the_slot_layout(regime, width):
    assert regime.row_top_k(LAYER) == width


def test_tensor_parallel_ranks_share_the_intermediate_size():
    assert Regime(tp_size=4).intermediate_size(LAYER) == 32
