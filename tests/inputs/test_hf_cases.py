"""Published configs, cut down to what matters: each gives the sizes, precision and routing of its own fields."""

import json
from pathlib import Path

import pytest

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.hf import layer_from_config, read_config
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
QWEN3_30B = (128, 8, 2048, 768)
SIZES = {
    "arctic": (128, 2, 7168, 4864),
    "dbrx": (16, 4, 6144, 10752),
    "deepseek-moe-16b": (64, 6, 2048, 1408),
    "deepseek-vl2-tiny": (64, 6, 1280, 896),
    "dots.llm1": (128, 6, 4096, 1408),
    "dtype-float8": QWEN3_30B,
    "ernie-4.5-300b": (64, 8, 8192, 3584),
    "glm-4.7-flash": (64, 4, 2048, 1536),
    "granite-3.1-3b-a800m": (40, 8, 1536, 512),
    "granite-4-h-small": (72, 10, 4096, 768),
    "grok-1": (8, 2, 6144, 32768),
    "hunyuan-a13b": (64, 8, 4096, 3072),
    "intern-s1": (128, 8, 4096, 1536),
    "internvl3.5-30b": QWEN3_30B,
    "jamba-1.5-mini": (16, 2, 4096, 14336),
    "kimi-k2-trimmed": (384, 8, 7168, 2048),
    "minimax-text-01": (32, 2, 6144, 9216),
    "mistral-params": (8, 2, 4096, 14336),
    "moonlight-16b-a3b": (64, 6, 2048, 1408),
    "nemotron-3-super": (512, 22, 1024, 2688),
    "olmoe-1b-7b": (64, 8, 2048, 1024),
    "phi3.5-moe": (16, 2, 4096, 6400),
    "qwen1.5-moe-a2.7b": (60, 4, 2048, 1408),
    "qwen2-57b-a14b": (64, 8, 3584, 2560),
    "step3": (48, 3, 7168, 5120),
}
PRECISIONS = {
    "dtype-float8": Precision.FP8_TENSOR,
    "q-awq": Precision.AWQ_INT4,
    "q-bnb-4bit": Precision.BNB_4BIT,
    "q-ct-fp8-block": Precision.FP8_BLOCK,
    "q-ct-fp8-block-str": Precision.FP8_BLOCK,
    "q-ct-fp8-channel": Precision.FP8_CHANNEL,
    "q-ct-mixed-experts-nvfp4": Precision.NVFP4,
    "q-ct-mxfp4": Precision.MXFP4,
    "q-ct-nvfp4": Precision.NVFP4,
    "q-ct-nvfp4-experts-ignored": Precision.BF16,
    "q-ct-w4a16-g128": Precision.INT4_G128,
    "q-dsv4-fp4-experts": Precision.MXFP4,
    "q-fbgemm-fp8": Precision.FP8_CHANNEL,
    "q-fp8-block-1x32-mxfp8": Precision.MXFP8,
    "q-fp8-block-64": Precision.FP8_BLOCK_64,
    "q-fp8-experts-not-converted": Precision.BF16,
    "q-gptq-int4": Precision.GPTQ_INT4,
    "q-modelopt-fp4-method": Precision.NVFP4,
    "q-modelopt-fp8": Precision.FP8_TENSOR,
    "q-modelopt-fp8-pb-wo": Precision.FP8_BLOCK,
    "q-modelopt-nvfp4-awq": Precision.NVFP4,
    "q-modelopt-w4a8-awq": Precision.W4A8,
    "q-moe-quant-algo": Precision.NVFP4,
    "q-quark-mxfp4": Precision.MXFP4,
}
CASES = sorted(path.stem for path in CONFIGS.iterdir())


def sizes(layer: MoELayer) -> tuple[int, int, int, int]:
    return layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size


def of_case(name: str, **changes: object) -> dict:
    """A case's config; a change to `...` removes the field."""
    merged = {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}
    return {key: value for key, value in merged.items() if value is not ...}


@pytest.mark.parametrize("case", CASES)
def test_a_published_config_gives_its_own_sizes_and_precision(case):
    layer = layer_from_config(CONFIGS / f"{case}.json")
    assert sizes(layer) == SIZES.get(case, QWEN3_30B)
    assert layer.precision is PRECISIONS.get(case, Precision.BF16)
    assert layer.name == case


def test_every_case_of_a_quantization_has_an_expectation():
    assert {case for case in CASES if case.startswith("q-")} <= PRECISIONS.keys()
    assert SIZES.keys() | PRECISIONS.keys() == set(CASES)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("glm-4.7-flash", {"scoring": "sigmoid", "bias": True, "scaling": 1.8}),
        ("dots.llm1", {"scoring": "sigmoid", "bias": True, "scaling": 2.5, "renormalize": True}),
        ("deepseek-moe-16b", {"scoring": "softmax", "renormalize": False}),
        ("deepseek-vl2-tiny", {"scoring": "softmax", "num_groups": 1}),
        ("nemotron-3-super", {"scoring": "sigmoid", "bias": True, "scaling": 5.0}),
        ("step3", {"scoring": "softmax", "renormalize": False}),
        ("grok-1", {"scoring": "softmax", "renormalize": False}),
        ("dbrx", {"scoring": "softmax", "renormalize": True}),
        ("olmoe-1b-7b", {"renormalize": False}),
        ("ernie-4.5-300b", {"scoring": "softmax", "bias": True}),
    ],
)
def test_a_published_config_gives_its_own_routing(case, expected):
    routing = layer_from_config(CONFIGS / f"{case}.json").routing
    assert {field: getattr(routing, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("case", "count"),
    [("hunyuan-a13b", 1), ("qwen1.5-moe-a2.7b", 4), ("granite-4-h-small", 2), ("step3", 1), ("jamba-1.5-mini", 0)],
)
def test_shared_experts_are_counted_by_number_or_by_joint_size(case, count):
    assert layer_from_config(CONFIGS / f"{case}.json").num_shared_experts == count


def test_experts_without_a_gate_have_two_matrices():
    nemotron = layer_from_config(CONFIGS / "nemotron-3-super.json")
    assert (nemotron.activation, nemotron.activation.gated) == (Activation.RELU2, False)
    assert nemotron.weights_per_expert == 2 * 1024 * 2688
    assert layer_from_config(of_case("nemotron-3-super", moe_latent_size=None)).hidden_size == 4096
    assert layer_from_config(CONFIGS / "step3.json").weights_per_expert == 3 * 7168 * 5120


def test_weights_of_fp8_without_scales_are_read_and_said():
    reading = read_config(CONFIGS / "dtype-float8.json")
    assert "vLLM loads it as bf16" in " ".join(reading.notes)
    assert read_config(CONFIGS / "arctic.json").notes == ()


DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "num_hidden_layers": 43,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
}
QWEN3_OMNI = {
    "model_type": "qwen3_omni_moe",
    "talker_config": {"text_config": {"num_experts": 128, "num_experts_per_tok": 6}},
    "thinker_config": {
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": {
            "model_type": "qwen3_omni_moe_text",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    },
}
KIMI_LINEAR = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "moe_intermediate_size": 1024,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 2.446,
    "num_expert_group": 1,
    "topk_group": 1,
    "hidden_act": "silu",
}
KIMI_K3 = {
    "model_type": "kimi_k3",
    "text_config": {
        **KIMI_LINEAR,
        "hidden_size": 7168,
        "routed_expert_hidden_size": 3584,
        "num_experts": 896,
        "hidden_act": "situ",
    },
}
MINIMAX_M3 = {
    "model_type": "minimax_m3_vl",
    "text_config": {
        "hidden_size": 6144,
        "intermediate_size": 3072,
        "dense_intermediate_size": 12288,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
}
GEMMA_4 = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "moe_intermediate_size": 704,
        "num_experts": 128,
        "top_k_experts": 8,
        "enable_moe_block": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
GLM_4_5V = {
    "model_type": "glm4v_moe",
    "text_config": {
        "model_type": "glm4v_moe_text",
        "hidden_size": 4096,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
    },
}
STEP_3_5 = {
    "model_type": "step3p5",
    "hidden_size": 4096,
    "moe_intermediate_size": 1280,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "share_expert_dim": 1280,
    "moe_router_scaling_factor": 3.0,
    "swiglu_limits": [None, None, None, 7.0],
}
LING = {
    "model_type": "bailing_moe",
    "hidden_size": 8192,
    "moe_intermediate_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
ERNIE_VL = {
    "model_type": "ernie4_5_moe_vl",
    "hidden_size": 8192,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [3584, 1536],
    "moe_k": 8,
    "moe_num_shared_experts": 0,
}
MISTRAL_LARGE_3 = {
    "dim": 7168,
    "n_layers": 61,
    "hidden_dim": 16384,
    "moe": {
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "expert_hidden_dim": 4096,
        "num_shared_experts": 1,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
    },
    "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
}


@pytest.mark.parametrize(
    ("config", "expected", "precision", "activation"),
    [
        (DEEPSEEK_V4, (256, 6, 4096, 2048), Precision.MXFP4, Activation.SILU_CLAMPED),
        ({**DEEPSEEK_V4, "expert_dtype": "fp8"}, (256, 6, 4096, 2048), Precision.FP8_BLOCK, Activation.SILU_CLAMPED),
        (QWEN3_OMNI, QWEN3_30B, Precision.BF16, Activation.SILU),
        (KIMI_LINEAR, (256, 8, 2304, 1024), Precision.BF16, Activation.SILU),
        (KIMI_K3, (896, 8, 3584, 1024), Precision.BF16, Activation.SITU),
        (MINIMAX_M3, (128, 4, 6144, 3072), Precision.BF16, Activation.SWIGLU_CLAMPED),
        (GEMMA_4, (128, 8, 2816, 704), Precision.BF16, Activation.GELU),
        (GLM_4_5V, (128, 8, 4096, 1408), Precision.BF16, Activation.SILU),
        (STEP_3_5, (288, 8, 4096, 1280), Precision.BF16, Activation.SILU),
        (LING, (256, 8, 8192, 2048), Precision.BF16, Activation.SILU),
        (ERNIE_VL, (64, 8, 8192, 3584), Precision.BF16, Activation.SILU),
        (MISTRAL_LARGE_3, (128, 4, 7168, 4096), Precision.FP8_TENSOR, Activation.SILU),
    ],
)
def test_a_model_type_is_read_by_its_config_class(config, expected, precision, activation):
    layer = layer_from_config(config)
    assert sizes(layer) == expected
    assert (layer.precision, layer.activation) == (precision, activation)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DEEPSEEK_V4, {"scoring": "sqrtsoftplus", "bias": True, "num_groups": 1}),
        (MINIMAX_M3, {"scoring": "sigmoid", "bias": True, "scaling": 2.0}),
        (STEP_3_5, {"scoring": "sigmoid", "bias": True, "scaling": 3.0}),
        (LING, {"scoring": "sigmoid", "bias": True, "num_groups": 8, "top_k_groups": 4}),
        (KIMI_LINEAR, {"scoring": "sigmoid", "renormalize": True, "scaling": 2.446}),
        (GEMMA_4, {"scoring": "softmax", "renormalize": True}),
    ],
)
def test_a_model_type_routes_as_its_model_does(config, expected):
    routing = layer_from_config(config).routing
    assert {field: getattr(routing, field) for field in expected} == expected


def test_zero_compute_experts_are_refused_by_name():
    longcat = {
        "model_type": "longcat_flash",
        "hidden_size": 6144,
        "expert_ffn_hidden_size": 2048,
        "n_routed_experts": 512,
        "moe_topk": 12,
        "zero_expert_num": 256,
    }
    with pytest.raises(UnsupportedError, match=r"256 of its 768 experts compute nothing .* about 8"):
        layer_from_config(longcat)
    assert sizes(layer_from_config({**longcat, "zero_expert_num": 0})) == (512, 12, 6144, 2048)


def test_another_clamp_than_the_known_one_is_refused_by_name():
    text = {**MINIMAX_M3["text_config"], "swiglu_limit": 5.0}
    with pytest.raises(UnsupportedError, match=r"swiglu_limit = 7\.0, given 5\.0"):
        layer_from_config({**MINIMAX_M3, "text_config": text})


def test_lists_that_differ_between_layers_are_named():
    sizes_of_layers = [3072] * 31 + [1536]
    with pytest.raises(UsageError, match="moe_intermediate_size differs between layers") as error:
        layer_from_config(of_case("hunyuan-a13b", moe_intermediate_size=sizes_of_layers))
    assert "--experts 256 --top-k 8 --hidden 7168 --intermediate 2048" in error.value.hint


@pytest.mark.parametrize(
    "dense",
    [
        {"model_type": "llama", "hidden_size": 4096},
        {},
        {"model_type": "x", "text_config": {"hidden_size": 1}},
        {"model_type": "x", "num_experts": 0},
        {"dim": 4096, "n_layers": 32, "hidden_dim": 14336},
        {"model_type": "granitemoehybrid", "hidden_size": 2048, "num_local_experts": 0},
        {"model_type": "jamba", "hidden_size": 4096, "num_experts": 1, "num_experts_per_tok": 1},
        {**GEMMA_4, "text_config": {**GEMMA_4["text_config"], "enable_moe_block": False}},
    ],
)
def test_a_dense_model_is_said_to_be_no_mixture_of_experts(dense):
    with pytest.raises(UsageError, match="no mixture of experts"):
        layer_from_config(dense)


@pytest.mark.parametrize(
    "unknown",
    [
        {"model_type": "new", "num_experts": 64},
        {"model_type": "new", "text_config": {"ffn": {"n_expert": 64}}},
        {"model_type": "new", "moe_top_k": 4},
        {"model_type": "new", "num_local_experts": [8, 8]},
        {"model_type": "new_moe", "hidden_size": 1024},
        {"model_type": "new", "architectures": ["NewMoeForCausalLM"]},
        {"model_type": "new", "moe": {"count": 8}},
    ],
)
def test_the_error_of_an_unknown_model_type_names_the_options_for_its_sizes(unknown):
    with pytest.raises(UsageError, match="unknown model_type 'new") as error:
        layer_from_config(unknown)
    assert "--experts 256 --top-k 8 --hidden 7168 --intermediate 2048" in error.value.hint
    assert "\n" not in str(error.value)


def test_overrides_replace_fields_and_objects_field_by_field(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GLM_4_5V))
    reading = read_config(tmp_path, overrides={"text_config": {"num_experts_per_tok": 4}})
    assert sizes(reading.layer) == (128, 4, 4096, 1408)
