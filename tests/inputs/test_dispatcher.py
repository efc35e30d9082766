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
        "moonep",
        "passthrough",
        "mori_high_throughput",
        "mori_low_latency",
        "nixl_ep",
        "flashinfer_all2allv",
        "flashinfer_nvlink_one_sided",
        "flashinfer_nvlink_two_sided",
    },
    "sglang": {
        "none",
        "deepep",
        "mooncake",
        "nixl",
        "mori",
        "ascend_fuseep",
        "flashinfer",
        "megamoe",
        "deepep_v2",
        "pplx",
        "ascend_tp",
        "flashinfer_megamoe",
    },
    "trtllm": {
        "none",
        "tp",
        "attention_dp",
        "allgather",
        "nvlink_one_sided",
        "nvlink_two_sided",
        "deepep",
        "deepep_low_latency",
        "nccl_ep",
    },
}
COMM_METHODS = {
    "NVLINK_ONE_SIDED": "nvlink_one_sided",
    "NVLINK_TWO_SIDED": "nvlink_two_sided",
    "NCCL_EP": "nccl_ep",
    "DEEPEP": "deepep",
    "DEEPEPLOWLATENCY": "deepep_low_latency",
    "ALLGATHER": "allgather",
}
"""`CommunicationFactory._create_forced_method` of TensorRT-LLM."""
ALLTOALL_METHODS = {
    "NotEnabled": "allgather",
    "MNNVL": "nvlink_two_sided",
    "NVLinkOneSided": "nvlink_one_sided",
    "NVLinkTwoSided": "nvlink_two_sided",
    "DeepEP": "deepep",
    "DeepEPLowLatency": "deepep_low_latency",
}
"""`AlltoallMethodType` of TensorRT-LLM, which `TRTLLM_FORCE_ALLTOALL_METHOD` named before."""
TUNABLE = [str(known) for known in dispatcher.dispatchers() if known.tunable]
UNTUNABLE = [str(known) for known in dispatcher.dispatchers() if not known.tunable]


@pytest.mark.parametrize("engine", WORDS)
def test_every_value_of_an_engines_option_is_known(engine):
    assert {known.name for known in dispatcher.dispatchers() if known.engine == engine} == WORDS[engine]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("vllm:allgather_reducescatter", ("allgather", None, "adaptive")),
        ("vllm:deepep_high_throughput", ("alltoall", "deduplicated", "adaptive")),
        ("vllm:flashinfer_nvlink_one_sided", ("alltoall", "pool", "hybrid")),
        ("vllm:deepep_low_latency", ("alltoall", "batched", "2048")),
        ("vllm:nixl_ep", ("alltoall", "batched", "2048")),
        ("sglang:none", ("allgather", None, "adaptive")),
        ("sglang:flashinfer", ("alltoall", "pool", "hybrid")),
        ("trtllm:none", ("none", None, "pow2")),
        ("trtllm:attention_dp", ("alltoall", "packed", "pow2/8")),
        ("trtllm:allgather", ("allgather", None, "pow2")),
        ("trtllm:nvlink_two_sided", ("alltoall", "pool", "pow2")),
        ("trtllm:deepep", ("alltoall", "pool", "pow2")),
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
    same = "adaptive" if brought.layout == "batched" else brought.ladder.name
    assert (regime.ladder.name, regime.ladder.divisor) == (same, 1)


def test_without_attention_dp_vllms_uneven_shards_stay():
    assert dispatcher.resolve("vllm:naive", LAYER, 6, attention_dp=False)["uneven_shards"]


@pytest.mark.parametrize("word", UNTUNABLE)
def test_a_word_without_a_tactic_table_says_what_runs_there(word):
    runs = r"DeepGEMM|AITER|Ascend|grouped GEMM|MegaMoE|megakernels|expert-major buffer|rank-major buffer"
    with pytest.raises(UnsupportedError, match=runs) as error:
        dispatcher.resolve(word, LAYER, 8)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["sglang:deepep", "sglang:pplx", "trtllm:deepep_low_latency"])
def test_expert_major_layouts_without_a_triton_kernel_are_untunable(word):
    assert word in UNTUNABLE


def test_tensorrt_llms_low_latency_deepep_names_its_buffer():
    with pytest.raises(UnsupportedError, match=r"L \* ep \* T rows with k = 1.*T \* k are valid"):
        dispatcher.resolve("trtllm:deepep_low_latency", LAYER, 8)


@pytest.mark.parametrize(("value", "word"), [*COMM_METHODS.items(), *ALLTOALL_METHODS.items()])
def test_tensorrt_llms_spelling_of_a_method_is_its_word(value, word):
    assert dispatcher.trtllm_name(value) == word
    assert dispatcher.trtllm_name(f" {value.lower()}") == word  # the engine folds the case


def test_every_method_of_tensorrt_llm_has_a_spelling():
    spelled = {dispatcher.trtllm_name(value) for value in COMM_METHODS}
    assert spelled == WORDS["trtllm"] - {"none", "tp", "attention_dp"}


@pytest.mark.parametrize("value", ["", "none", "attention_dp", "DEEPEP_LOW_LATENCY", "AUTO"])
def test_what_is_no_method_of_tensorrt_llm_lists_those_that_are(value):
    with pytest.raises(UsageError, match="DEEPEPLOWLATENCY") as error:
        dispatcher.trtllm_name(value)
    assert all(known in str(error.value) for known in COMM_METHODS)


@pytest.mark.parametrize("word", sorted(WORDS["trtllm"] - {"none", "tp"}))
def test_tensorrt_llm_gathers_all_rows_where_ranks_share_an_expert(word):
    arguments = dispatcher.resolve(f"trtllm:{word}", LAYER, 8, tp_size=2)
    assert arguments == {"attention_dp": True, "dispatch": "allgather", "ladder": "pow2"}


@pytest.mark.parametrize("word", ["trtllm:none", "trtllm:tp"])
def test_without_attention_dp_ranks_that_share_an_expert_change_nothing(word):
    assert dispatcher.resolve(word, LAYER, 8, tp_size=2) == dispatcher.resolve(word, LAYER, 8)


@pytest.mark.parametrize("word", [word for word in TUNABLE if not word.startswith("trtllm:")])
def test_the_other_engines_dispatch_alike_where_ranks_share_an_expert(word):
    assert dispatcher.resolve(word, LAYER, 8, tp_size=2) == dispatcher.resolve(word, LAYER, 8)


def test_an_explicit_option_beside_a_word_wins():
    arguments = dispatcher.resolve("vllm:deepep_high_throughput", LAYER, 8) | {"ladder": "hybrid"}
    regime = Regime(ep_size=8, **arguments)
    assert (regime.layout, str(regime.ladder)) == ("deduplicated", "hybrid")


def test_uneven_shards_are_vllms_and_of_two_methods_of_tensorrt_llm_where_ep_does_not_divide():
    takes = {word for word in TUNABLE if dispatcher.resolve(word, LAYER, 6).get("uneven_shards", False)}
    assert {word for word in takes if not word.startswith("vllm:")} == {"trtllm:allgather", "trtllm:nvlink_one_sided"}
    assert takes >= {word for word in TUNABLE if word.startswith("vllm:")}


@pytest.mark.parametrize("word", ["vllm:deepep_high_throughput", "trtllm:allgather", "trtllm:nvlink_one_sided"])
def test_the_first_ranks_take_the_experts_that_are_left(word):
    regime = Regime(ep_size=6, **dispatcher.resolve(word, LAYER, 6))
    assert [regime.shard(LAYER, rank).num_local for rank in range(6)] == [43, 43, 43, 43, 42, 42]


@pytest.mark.parametrize(("ep_size", "first", "last"), [(6, 6, 6144), (12, 12, 6144), (8, 8, 8192)])
def test_tensorrt_llms_pools_are_powers_of_two_a_block(ep_size, first, last):
    regime = Regime(ep_size=ep_size, **dispatcher.resolve("trtllm:nvlink_one_sided", LAYER, ep_size))
    assert (regime.buckets[0], regime.buckets[-1]) == (first, last)
    assert all(rows % ep_size == 0 and (rows // ep_size).bit_count() == 1 for rows in regime.buckets)


def test_tensorrt_llm_splits_unevenly_only_if_it_dispatches():
    assert "uneven_shards" not in dispatcher.resolve("trtllm:allgather", LAYER, 6, attention_dp=False)
    assert dispatcher.resolve("trtllm:nvlink_two_sided", LAYER, 6, tp_size=2)["uneven_shards"]  # it gathers then


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
    assert dispatcher.matching("alltoall", "packed") == ("trtllm:attention_dp",)
    assert dispatcher.matching("alltoall", "deduplicated") == ("vllm:deepep_high_throughput",)
    assert "vllm:allgather_reducescatter" in dispatcher.matching("allgather")
    assert set(dispatcher.matching("alltoall", "pool")) < set(dispatcher.matching("alltoall"))
    assert not set(UNTUNABLE) & {
        word for load in ("none", "allgather", "alltoall") for word in dispatcher.matching(load)
    }


def test_resolving_leaves_the_table_as_it_is():
    dispatcher.resolve("trtllm:attention_dp", LAYER, 8)["ladder"] = "spoiled"
    assert dispatcher.resolve("trtllm:attention_dp", LAYER, 4)["ladder"] == "pow2/4"
