"""The engines' words stand for the loads that their kernels see."""

import pytest

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import dispatcher, presets
from moetune.spec.regime import Regime

LAYER = presets.preset("deepseek-r1")
WORDS = {
    "vllm": {
        "allgather_reducescatter",
        "naive",
        "pplx",
        "deepep_high_throughput",
        "deepep_low_latency",
        "deepep_v2",
        "mori_high_throughput",
        "mori_low_latency",
        "nixl_ep",
        "flashinfer_all2allv",
        "flashinfer_nvlink_one_sided",
        "flashinfer_nvlink_two_sided",
    },
    "sglang": {"none", "deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer", "megamoe"},
    "trtllm": {
        "none",
        "tp",
        "attention_dp",
        "allgather",
        "nvlink_one_sided",
        "nvlink_two_sided",
        "deepep",
        "deepep_low_latency",
    },
}
TUNABLE = [str(known) for known in dispatcher.words() if known.tunable]
UNTUNABLE = [str(known) for known in dispatcher.words() if not known.tunable]


@pytest.mark.parametrize("engine", WORDS)
def test_every_value_of_an_engines_option_is_known(engine):
    assert {known.word for known in dispatcher.words() if known.engine == engine} == WORDS[engine]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("vllm:allgather_reducescatter", ("allgather", None, "vllm")),
        ("vllm:deepep_high_throughput", ("alltoall", "deduplicated", "vllm")),
        ("vllm:flashinfer_nvlink_one_sided", ("alltoall", "pool", "hybrid")),
        ("sglang:none", ("allgather", None, "vllm")),
        ("sglang:flashinfer", ("alltoall", "pool", "hybrid")),
        ("trtllm:none", ("none", None, "pow2")),
        ("trtllm:attention_dp", ("alltoall", "packed", "pow2/8")),
        ("trtllm:allgather", ("allgather", None, "pow2")),
        ("trtllm:nvlink_two_sided", ("alltoall", "pool", "pow2")),
        ("trtllm:deepep", ("alltoall", "deduplicated", "pow2")),
        ("trtllm:deepep_low_latency", ("alltoall", "slot", "pow2")),
    ],
)
def test_a_word_stands_for_its_load(word, expected):
    regime = Regime(ep_size=8, **dispatcher.resolve(word, LAYER, 8))
    assert (regime.dispatch, regime.layout, str(regime.ladder)) == expected
    assert regime.attention_dp == (regime.dispatch != "none")


@pytest.mark.parametrize("word", TUNABLE)
@pytest.mark.parametrize("ep_size", [1, 2, 8, 64])
def test_every_tunable_word_makes_a_regime_with_shards(word, ep_size):
    regime = Regime(ep_size=ep_size, **dispatcher.resolve(word, LAYER, ep_size))
    assert regime.shard(LAYER, ep_size - 1).num_local == 256 // ep_size
    assert not regime.uneven_shards


@pytest.mark.parametrize("word", TUNABLE)
def test_without_attention_dp_no_word_dispatches_anything_or_divides_the_rows(word):
    brought = Regime(ep_size=8, **dispatcher.resolve(word, LAYER, 8))
    regime = Regime(ep_size=8, **dispatcher.resolve(word, LAYER, 8, attention_dp=False))
    assert (regime.attention_dp, regime.dispatch, regime.layout) == (False, "none", None)
    assert (regime.ladder.name, regime.ladder.divisor) == (brought.ladder.name, 1)


def test_without_attention_dp_vllms_uneven_shards_stay():
    assert dispatcher.resolve("vllm:naive", LAYER, 6, attention_dp=False)["uneven_shards"]


@pytest.mark.parametrize("word", UNTUNABLE)
def test_a_word_without_a_tactic_table_says_what_runs_there(word):
    with pytest.raises(UnsupportedError, match=r"DeepGEMM|AITER|Ascend") as error:
        dispatcher.resolve(word, LAYER, 8)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["vllm:deepep_low_latency", "sglang:deepep", "sglang:mooncake", "vllm:nixl_ep"])
def test_expert_major_layouts_are_untunable(word):
    assert word in UNTUNABLE


def test_an_explicit_option_beside_a_word_wins():
    arguments = dispatcher.resolve("vllm:deepep_high_throughput", LAYER, 8) | {"ladder": "hybrid"}
    regime = Regime(ep_size=8, **arguments)
    assert (regime.layout, str(regime.ladder)) == ("deduplicated", "hybrid")


def test_only_vllm_has_uneven_shards_and_only_where_ep_does_not_divide():
    for word in TUNABLE:
        uneven = dispatcher.resolve(word, LAYER, 6).get("uneven_shards", False)
        assert uneven == word.startswith("vllm:")
    regime = Regime(ep_size=6, **dispatcher.resolve("vllm:deepep_high_throughput", LAYER, 6))
    assert [regime.shard(LAYER, rank).num_local for rank in range(6)] == [43, 43, 43, 43, 42, 42]


def test_redundant_experts_that_make_the_shards_even_need_no_rule():
    assert "uneven_shards" not in dispatcher.resolve("vllm:naive", LAYER, 6, redundant_experts=8)
    assert dispatcher.resolve("vllm:naive", LAYER, 8, redundant_experts=1)["uneven_shards"]


def test_more_ranks_than_experts_stay_an_error():
    regime = Regime(ep_size=512, **dispatcher.resolve("vllm:naive", LAYER, 512))
    with pytest.raises(UsageError, match="exceeds the 256 experts"):
        regime.shard(LAYER)


@pytest.mark.parametrize("spelled", ["VLLM:DeepEP_High_Throughput", " vllm:deepep_high_throughput "])
def test_case_and_spaces_are_no_difference(spelled):
    assert dispatcher.resolve(spelled, LAYER, 8)["layout"] == "deduplicated"


@pytest.mark.parametrize("spelled", ["vllm:deepep", "vllm:", "vllm", "vllm:none:x"])
def test_an_unknown_word_lists_that_engines(spelled):
    with pytest.raises(UsageError) as error:
        dispatcher.resolve(spelled, LAYER, 8)
    assert all(word in str(error.value) for word in WORDS["vllm"])
    assert "megamoe" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spelled", ["tgi:deepep", "deepep", "", ":"])
def test_an_unknown_engine_lists_the_engines(spelled):
    with pytest.raises(UsageError, match="vllm, sglang, trtllm"):
        dispatcher.resolve(spelled, LAYER, 8)


def test_the_bringers_of_a_load_are_found():
    assert dispatcher.bringing("alltoall", "packed") == ("trtllm:attention_dp",)
    assert dispatcher.bringing("alltoall", "slot") == ("trtllm:deepep_low_latency",)
    assert "vllm:allgather_reducescatter" in dispatcher.bringing("allgather")
    assert set(dispatcher.bringing("alltoall", "pool")) < set(dispatcher.bringing("alltoall"))
    assert not set(UNTUNABLE) & {
        word for load in ("none", "allgather", "alltoall") for word in dispatcher.bringing(load)
    }


def test_resolving_leaves_the_table_as_it_is():
    dispatcher.resolve("trtllm:attention_dp", LAYER, 8)["ladder"] = "spoiled"
    assert dispatcher.resolve("trtllm:attention_dp", LAYER, 4)["ladder"] == "pow2/4"
