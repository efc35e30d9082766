"""Each model_type's own field names and defaults; every bad config is a one-line error that names file and field."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.inputs.hf import MODEL_TYPES, layer_from_config
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation

CONFIGS = Path(__file__).parent.parent / "data" / "hf"
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def config(name: str, **changes: object) -> dict:
    """The stored config of a model; a change to `...` removes the field."""
    merged = {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def weights(**values: object) -> dict:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": values}}}


NVFP4_GROUP = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        (None, Precision.BF16),
        (BLOCK, Precision.FP8_BLOCK),
        ({"quant_method": "fp8"}, Precision.FP8_TENSOR),
        ({"quant_method": "fp8", "weight_block_size": None}, Precision.FP8_TENSOR),
        ({"quant_method": "mxfp4"}, Precision.MXFP4),
        (NVFP4_GROUP, Precision.NVFP4),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Precision.FP8_TENSOR),
        (weights(type="float", num_bits=8, strategy="tensor"), Precision.FP8_TENSOR),
        (weights(type="float", num_bits=8, strategy="block", block_structure=[128, 128]), Precision.FP8_BLOCK),
        (weights(type="float", num_bits=4, strategy="tensor_group", group_size=16), Precision.NVFP4),
        (weights(type="int", num_bits=4, strategy="group", group_size=32, symmetric=True), Precision.MXINT4),
    ],
)
def test_the_quantization_gives_the_precision(quantization, precision):
    assert layer_from_config(config("qwen3-30b-a3b", quantization_config=quantization)).precision is precision


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": None}},
        "fp8",
        {},
    ],
)
def test_an_unknown_quantization_asks_for_a_precision_and_takes_one(quantization):
    unclear = config("qwen3-30b-a3b", quantization_config=quantization)
    with pytest.raises(UsageError, match="quantization_config") as error:
        layer_from_config(unclear)
    assert "\n" not in str(error.value)
    assert layer_from_config(unclear, precision="nvfp4").precision is Precision.NVFP4


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({"torch_dtype": "float16"}, Precision.FP16),
        ({"torch_dtype": "torch.float32"}, Precision.FP32),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, Precision.BF16),
        ({"torch_dtype": ...}, Precision.BF16),
    ],
)
def test_without_quantization_the_dtype_is_the_precision(changes, precision):
    assert layer_from_config(config("mixtral-8x7b", **changes)).precision is precision


def test_modelopts_file_beside_the_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("qwen3-235b-a22b")))
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}})
    )
    assert layer_from_config(tmp_path).precision is Precision.NVFP4


def test_a_modelopt_checkpoints_config_is_read():
    kimi = config("kimi-k2.5", quantization_config=NVFP4_GROUP)
    kimi["text_config"] = {
        **kimi["text_config"],
        "model_type": "deepseek_v3",
    }
    layer = layer_from_config(kimi)
    assert (layer.precision, layer.num_experts, layer.routing.grouped) == (Precision.NVFP4, 384, False)


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        ("qwen3-30b-a3b", {"norm_topk_prob": ...}, {"renormalize": False}),
        ("qwen3-next-80b-a3b", {"norm_topk_prob": ...}, {"renormalize": True}),
        ("deepseek-v3", {"n_group": ..., "topk_group": ...}, {"num_groups": 8, "top_k_groups": 4}),
        ("deepseek-v3", {"n_group": None, "topk_group": None}, {"num_groups": 1, "top_k_groups": 1}),
        ("deepseek-v3", {"routed_scaling_factor": ...}, {"scaling": 2.5}),
        ("deepseek-v3", {"scoring_func": ..., "topk_method": ...}, {"scoring": "sigmoid", "bias": True}),
        ("deepseek-v3", {"n_group": 4, "topk_group": 4}, {"num_groups": 1}),
        ("deepseek-v2", {"topk_method": "greedy"}, {"num_groups": 1, "group_score": "top2"}),
        ("deepseek-v2", {"topk_method": ...}, {"num_groups": 1}),
        ("deepseek-v2", {"norm_topk_prob": ...}, {"renormalize": False}),
        ("glm-4.5-air", {"n_group": ..., "topk_group": ..., "norm_topk_prob": ...}, {"num_groups": 1}),
        ("minimax-m2.5", {"use_routing_bias": False}, {"bias": False}),
        ("minimax-m2.5", {"use_routing_bias": ..., "scoring_func": ...}, {"bias": True, "scoring": "sigmoid"}),
        ("ernie-4.5-21b-a3b", {"moe_use_aux_free": False}, {"bias": False}),
    ],
)
def test_an_absent_routing_field_has_the_config_classes_default(model, changes, expected):
    routing = layer_from_config(config(model, **changes)).routing
    assert {field: getattr(routing, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("model", "changes", "count"),
    [
        ("deepseek-v3", {"n_shared_experts": ...}, 1),
        ("deepseek-v3", {"n_shared_experts": None}, 0),
        ("qwen3-next-80b-a3b", {"shared_expert_intermediate_size": 0}, 0),
        ("qwen3-next-80b-a3b", {"shared_expert_intermediate_size": 1024}, 2),
        ("minimax-m2.5", {"shared_intermediate_size": 1536}, 1),
        ("qwen3-30b-a3b", {"shared_expert_intermediate_size": 768}, 0),
    ],
)
def test_shared_experts_are_counted(model, changes, count):
    assert layer_from_config(config(model, **changes)).num_shared_experts == count


def test_qwen2_moe_is_read():
    qwen2 = {
        "model_type": "qwen2_moe",
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    }
    layer = layer_from_config(qwen2, name="qwen1.5-moe")
    assert (layer.name, layer.num_experts, layer.num_shared_experts) == ("qwen1.5-moe", 60, 4)
    assert not layer.routing.renormalize


def test_gpt_oss_has_its_own_activation_whatever_hidden_act_says():
    layer = layer_from_config(config("gpt-oss-20b", num_experts_per_tok=...))
    assert (layer.activation, layer.expert_bias, layer.top_k) == (Activation.SWIGLU_CLAMPED, True, 4)


@pytest.mark.parametrize("model", ["deepseek-v3", "mixtral-8x7b", "gpt-oss-20b", "ernie-4.5-21b-a3b", "glm-4.5-air"])
def test_a_missing_size_is_named_with_its_file(model, tmp_path):
    full = config(model)
    model_type = MODEL_TYPES[full["model_type"]]
    for names in (model_type.num_experts, model_type.top_k, ("hidden_size",), model_type.intermediate_size):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({key: value for key, value in full.items() if key not in names}))
        with pytest.raises(UsageError) as error:
            layer_from_config(path)
        assert names[0] in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_routed_experts": "many"}, "n_routed_experts"),
        ({"n_routed_experts": True}, "n_routed_experts"),
        ({"n_routed_experts": 256.5}, "n_routed_experts"),
        ({"n_routed_experts": -1}, "n_routed_experts"),
        ({"n_routed_experts": [64, 32]}, "n_routed_experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"hidden_size": "7168"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"moe_intermediate_size": {}}, "moe_intermediate_size"),
        ({"n_shared_experts": "one"}, "n_shared_experts"),
        ({"n_group": 0}, "n_group"),
        ({"topk_group": "4"}, "topk_group"),
        ({"topk_group": 9}, "top_k_groups"),
        ({"n_group": 7}, "num_groups"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring_func"),
        ({"scoring_func": 3}, "scoring_func"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"num_experts_per_tok": 300}, "top_k"),
        ({"quantization_config": ..., "torch_dtype": "float64"}, "dtype"),
        ({"model_type": "deepseek_v9"}, "deepseek_v9"),
        ({"model_type": ["deepseek_v3"]}, "model_type"),
        ({"model_type": ...}, "model_type"),
    ],
)
def test_a_value_that_cannot_be_is_a_one_line_error_that_names_the_field(changes, named):
    with pytest.raises(UsageError) as error:
        layer_from_config(config("deepseek-v3", **changes))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "dense", [{"model_type": "llama", "hidden_size": 4096}, {}, {"model_type": "x", "text_config": {"hidden_size": 1}}]
)
def test_a_dense_model_is_said_to_be_no_mixture_of_experts(dense):
    with pytest.raises(UsageError, match="no mixture of experts"):
        layer_from_config(dense)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b"3", "int"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, named):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=named) as error:
        layer_from_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.config\.json"):
        layer_from_config(tmp_path / "nowhere" / "config.json")
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        layer_from_config(tmp_path)


def test_the_layer_is_named_after_the_folder_or_the_file(tmp_path):
    for path in (tmp_path / "my-model" / "config.json", tmp_path / "other.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config("mixtral-8x7b")))
    assert layer_from_config(tmp_path / "my-model").name == "my-model"
    assert layer_from_config(tmp_path / "other.json").name == "other"
    assert layer_from_config(tmp_path / "other.json", name="mine").name == "mine"
    assert layer_from_config(config("mixtral-8x7b")).name == "custom"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200)
@given(model=st.sampled_from(sorted(path.stem for path in CONFIGS.iterdir())), data=st.data())
def test_any_value_in_any_field_gives_a_layer_or_a_one_line_usage_error(model, data):
    full = config(model)
    field = data.draw(st.sampled_from(sorted(full)))
    try:
        layer_from_config({**full, field: data.draw(JSON)})
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017
