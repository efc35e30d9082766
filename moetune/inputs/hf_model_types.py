"""Lists the names of the mixture-of-experts fields in each model type's `config.json`.

`ModelType.source` names the config class or the model's code that defines the fields and the routing. `tf` is
transformers 5.24.0, `vllm` is vLLM 0.33.0, `sglang` is SGLang 0.5.23; paths are below the package, and `NAME/` of tf is
its folder `models/NAME`. The four sizes have no default: if a config lacks one, the error names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moetune.inputs.hf_fields import Config, Names
from moetune.spec.layer import Activation

GATED: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU,
    "gelu_new": Activation.GELU,
    "gelu_fast": Activation.GELU,
}
SCORES: Mapping[str, str] = {"softmax": "softmax", "sigmoid": "sigmoid"}


@dataclass(frozen=True, slots=True)
class ModelType:
    """The field names of one `model_type`. Tuples list alternatives; `a.b` is the field b of the object a.

    Attributes:
        shared: the number of shared experts. A field that ends in `_size`, `_dim` or `_dims` has their joint
            intermediate size instead.
        score_field: None if the code has one score only, `scoring`.
        bias: the name of a flag, or whether the code has a bias.
        clamp: a field that makes silu the clamped one if it is positive.
        switch: a flag without which the model is dense.
        zero_experts: the number of experts that compute nothing.
        experts: the experts' module in a decoder layer.
        first_of_list: whether lists have one entry a modality, text first.
        expert_dtype: the value for fp8 checkpoints without the field `expert_dtype`.
        defaults: the values of the optional fields in the config class.
        fixed: `MoELayer` fields that the model's code decides.
    """

    source: str
    num_experts: Names
    top_k: Names = ("num_experts_per_tok",)
    hidden_size: Names = ("hidden_size",)
    intermediate_size: Names = ("moe_intermediate_size",)
    shared: Names = ()
    activation: Names = ("hidden_act",)
    activations: Mapping[str, Activation] = field(default_factory=lambda: GATED)
    clamp: Names = ()
    scoring: str = "softmax"
    score_field: str | None = "scoring_func"
    scores: Mapping[str, str] = field(default_factory=lambda: SCORES)
    bias: bool | str = False
    renormalize: bool = True
    renormalize_field: Names = ("norm_topk_prob",)
    scaling: Names = ("routed_scaling_factor",)
    groups: Names = ("n_group",)
    top_k_groups: Names = ("topk_group",)
    group_score: str = "top2"
    switch: str | None = None
    zero_experts: Names = ()
    experts: Names = ("mlp.experts",)
    first_of_list: bool = False
    expert_dtype: str | None = None
    defaults: Config = field(default_factory=dict)
    fixed: Config = field(default_factory=dict)


def _deepseek(source: str, scaling: float, groups: tuple[int, int], shared: int, bias: bool | str = True) -> ModelType:
    """Returns a model type with DeepSeek-V3's router: a sigmoid with a bias, in groups."""
    return ModelType(
        source,
        num_experts=("n_routed_experts", "num_local_experts", "num_experts"),
        shared=("n_shared_experts", "num_shared_experts"),
        scoring="sigmoid",
        bias=bias,
        defaults={
            "routed_scaling_factor": scaling,
            "n_group": groups[0],
            "topk_group": groups[1],
            "n_shared_experts": shared,
            "topk_method": "noaux_tc",
        },
    )


_CLAMPED = ("swiglu_limit",)
_BLOCK = ("block_sparse_moe.experts", "mlp.experts")
_SMALL = ("intermediate_size",)
_DEEPSEEK_V3 = _deepseek("tf deepseek_v3/, vllm model_executor/models/deepseek_v2.py", 2.5, (8, 4), 1, "topk_method")
_QWEN_SHARED = ModelType(
    "tf qwen3_next/, qwen3_5_moe/, qwen4_exp/",
    num_experts=("num_experts",),
    shared=("shared_expert_intermediate_size",),
    defaults={"shared_expert_intermediate_size": 512},
)
_MIXTRAL = ModelType("tf mixtral/", num_experts=("num_local_experts",), intermediate_size=_SMALL, experts=_BLOCK)
_SIGMOID = ModelType("", num_experts=("num_experts",), scoring="sigmoid", score_field=None, bias=True)
_GRANITE = replace(_MIXTRAL, source="tf granitemoe/, granitemoeshared/, granitemoehybrid/ (softmax over the chosen)")
_ERNIE = ModelType(
    "tf ernie4_5_moe/, vllm model_executor/models/ernie45_moe.py",
    num_experts=("moe_num_experts",),
    top_k=("moe_k", "num_experts_per_tok"),
    shared=("moe_num_shared_experts",),
    bias="moe_use_aux_free",
    defaults={"moe_num_shared_experts": 2, "moe_use_aux_free": True},
)
_ERNIE_VL = replace(
    _ERNIE,
    source="tf ernie4_5_vl_moe/, vllm model_executor/models/ernie45_vl_moe.py (the text's experts; images have others)",
    first_of_list=True,
)
_MINIMAX_M3 = ModelType(
    "tf minimax_m3_vl/, vllm transformers_utils/configs/minimax_m3.py and models/minimax_m3/nvidia/model.py",
    num_experts=("num_local_experts",),
    intermediate_size=_SMALL,
    shared=("n_shared_experts",),
    scoring="sigmoid",
    bias="use_routing_bias",
    experts=_BLOCK,
    defaults={"n_shared_experts": 1, "use_routing_bias": True, "routed_scaling_factor": 2.0},
    fixed={"activation": Activation.SWIGLU_CLAMPED},
)
_STEP3P5 = ModelType(
    "tf step3p7/, vllm model_executor/models/step3p5.py, sglang srt/configs/step3p5.py",
    num_experts=("moe_num_experts", "n_routed_experts"),
    top_k=("moe_top_k", "num_experts_per_tok"),
    shared=("share_expert_dim", "share_expert_dims"),
    clamp=("swiglu_limits",),
    scoring="sigmoid",
    score_field="moe_router_activation",
    bias="use_moe_router_bias",
    renormalize_field=("norm_expert_weight",),
    scaling=("moe_router_scaling_factor",),
    experts=("moe.experts", "moe", "mlp.experts"),
    defaults={"use_moe_router_bias": True, "share_expert_dim": 1280},
)
_BAILING = ModelType(
    "vllm model_executor/models/bailing_moe.py and bailing_moe_linear.py (Ling, Ring)",
    num_experts=("num_experts",),
    shared=("num_shared_experts",),
    score_field="score_function",
    bias="moe_router_enable_expert_bias",
)
_KIMI_LINEAR = ModelType(
    "tf kimi_linear/, vllm transformers_utils/configs/kimi_linear.py and models/kimi_k3/nvidia/model.py",
    num_experts=("num_experts", "num_local_experts"),
    top_k=("num_experts_per_token", "num_experts_per_tok"),
    hidden_size=("routed_expert_hidden_size", "hidden_size"),
    shared=("num_shared_experts", "n_shared_experts"),
    activations={**GATED, "situ": Activation.SITU},
    scoring="sigmoid",
    score_field="moe_router_activation_func",
    bias=True,
    renormalize_field=("moe_renormalize", "norm_topk_prob"),
    groups=("num_expert_group", "n_group"),
    experts=_BLOCK,
)
_LONGCAT = ModelType(
    "tf longcat_flash/, vllm model_executor/models/longcat_flash.py (zero_experts return their input)",
    num_experts=("n_routed_experts", "num_experts"),
    top_k=("moe_topk", "num_experts_per_tok"),
    intermediate_size=("expert_ffn_hidden_size", "moe_intermediate_size"),
    score_field=None,
    bias=True,
    renormalize=False,
    zero_experts=("zero_expert_num",),
    defaults={"zero_expert_num": 256, "routed_scaling_factor": 6.0},
)
_HUNYUAN = ModelType(
    "tf hunyuan_v1_moe/, sglang srt/models/hunyuan.py (lists: one entry a layer)",
    num_experts=("num_experts",),
    top_k=("moe_topk", "num_experts_per_tok"),
    intermediate_size=("moe_intermediate_size", "intermediate_size"),
    shared=("num_shared_expert",),
    score_field=None,
)
_MISTRAL_PARAMS = ModelType(
    "vllm transformers_utils/configs/mistral.py (Mistral's params.json)",
    num_experts=("moe.num_experts",),
    top_k=("moe.num_experts_per_tok",),
    hidden_size=("dim",),
    intermediate_size=("moe.expert_hidden_dim", "hidden_dim"),
    shared=("moe.num_shared_experts",),
    activation=("activation",),
    score_field=None,
    scaling=("moe.routed_scale",),
    groups=("moe.num_expert_groups",),
    top_k_groups=("moe.num_expert_groups_per_tok",),
    group_score="max",
    experts=_BLOCK,
)

MODEL_TYPES: Mapping[str, ModelType] = {
    "deepseek": ModelType(
        "sglang srt/models/deepseek.py (DeepSeek-MoE)",
        num_experts=("n_routed_experts",),
        shared=("n_shared_experts",),
        renormalize=False,
        defaults={"n_shared_experts": 2},
    ),
    "deepseek_v2": ModelType(
        "tf deepseek_v2/",
        num_experts=("n_routed_experts",),
        shared=("n_shared_experts",),
        renormalize=False,
        group_score="max",
        defaults={"n_shared_experts": 2, "topk_method": "greedy"},
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "deepseek_v4": replace(
        _deepseek("tf deepseek_v4/, vllm models/deepseek_v4/ (the hash layers route by token id)", 1.5, (1, 1), 1),
        clamp=_CLAMPED,
        scoring="sqrtsoftplus",
        scores={**SCORES, "sqrtsoftplus": "sqrtsoftplus"},
        experts=("ffn.experts", "mlp.experts"),
        expert_dtype="fp4",
        defaults={"routed_scaling_factor": 1.5, "n_shared_experts": 1, "swiglu_limit": 10.0},
    ),
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_linear": _KIMI_LINEAR,
    "kimi_k3": _KIMI_LINEAR,
    "glm4_moe": _deepseek("tf glm4_moe/", 1.0, (1, 1), 1, "topk_method"),
    "glm4_moe_lite": _deepseek("tf glm4_moe_lite/ (GLM-4.7-Flash)", 1.8, (1, 1), 1),
    "glm4v_moe_text": _deepseek("tf glm4v_moe/ (GLM-4.5V)", 1.0, (1, 1), 1),
    "glm_moe_dsa": _deepseek("tf glm_moe_dsa/", 2.5, (1, 1), 1, "topk_method"),
    "glm5_next_text": replace(_deepseek("tf glm5_next/", 2.5, (1, 1), 1), clamp=_CLAMPED),
    "axk1": _deepseek("tf axk1/, vllm model_executor/models/AXK1.py", 2.5, (8, 4), 1),
    "solar_open": _deepseek("tf solar_open/", 1.0, (1, 1), 1),
    "exaone_moe": _deepseek("tf exaone_moe/", 2.5, (1, 1), 1),
    "sarvam_moe": _deepseek("tf sarvam_moe/, vllm model_executor/models/sarvam.py", 2.5, (1, 1), 1),
    "dots1": replace(_deepseek("tf dots1/ (always a sigmoid)", 1.0, (1, 1), 0), score_field=None, renormalize=False),
    "mimo_v2_flash": _deepseek("tf mimo_v2_flash/", 1.0, (1, 1), 0, "topk_method"),
    "nemotron_h": replace(
        _deepseek("tf nemotron_h/, vllm model_executor/models/nemotron_h.py", 1.0, (1, 1), 1),
        hidden_size=("moe_latent_size", "hidden_size"),
        activation=("mlp_hidden_act",),
        activations={"relu2": Activation.RELU2},
        score_field=None,
        experts=("mixer.experts",),
        defaults={"n_shared_experts": 1, "mlp_hidden_act": "relu2"},
    ),
    "qwen2_moe": ModelType(
        "tf qwen2_moe/",
        num_experts=("num_experts",),
        shared=("shared_expert_intermediate_size",),
        renormalize=False,
        defaults={"shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": ModelType("tf qwen3_moe/", num_experts=("num_experts", "num_local_experts"), renormalize=False),
    "qwen3_vl_moe_text": ModelType("tf qwen3_vl_moe/", num_experts=("num_experts",)),
    "qwen3_omni_moe_text": ModelType("tf qwen3_omni_moe/ (the thinker)", num_experts=("num_experts",)),
    "qwen3_next": _QWEN_SHARED,
    "qwen3_5_moe_text": _QWEN_SHARED,
    "qwen4_exp_text": _QWEN_SHARED,
    "mixtral": _MIXTRAL,
    "minimax": replace(_MIXTRAL, source="tf minimax/ (MiniMax-Text-01)"),
    "minimax_text_01": replace(_MIXTRAL, source="tf minimax/ (MiniMax-Text-01)", shared=("shared_intermediate_size",)),
    "minimax_m2": ModelType(
        "tf minimax_m2/, vllm model_executor/models/minimax_m2.py",
        num_experts=("num_local_experts",),
        intermediate_size=_SMALL,
        shared=("shared_intermediate_size",),
        scoring="sigmoid",
        bias="use_routing_bias",
        experts=_BLOCK,
        defaults={"use_routing_bias": True},
    ),
    "minimax_m3": _MINIMAX_M3,
    "minimax_m3_text": _MINIMAX_M3,
    "minimax_m3_vl_text": _MINIMAX_M3,
    "gpt_oss": ModelType(
        "tf gpt_oss/",
        num_experts=("num_local_experts",),
        top_k=("num_experts_per_tok", "experts_per_token"),
        intermediate_size=_SMALL,
        fixed={"activation": Activation.SWIGLU_CLAMPED, "expert_bias": True},
    ),
    "llama4_text": ModelType(
        "tf llama4/",
        num_experts=("num_local_experts",),
        intermediate_size=_SMALL,
        scoring="sigmoid",
        renormalize=False,
        experts=("feed_forward.experts",),
        fixed={"weight_on_input": True, "num_shared_experts": 1},
    ),
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_moe_vl": _ERNIE_VL,
    "ernie4_5_vl_moe_text": _ERNIE_VL,
    "step3_text": ModelType(
        "vllm transformers_utils/configs/step3_vl.py and model_executor/models/step3_text.py",
        num_experts=("moe_num_experts",),
        top_k=("moe_top_k",),
        shared=("share_expert_dim",),
        score_field=None,
        renormalize=False,
        renormalize_field=("norm_expert_weight",),
        experts=("moe.experts", "moe"),
        defaults={"share_expert_dim": 5120},
    ),
    "step3p5": _STEP3P5,
    "step3p7": _STEP3P5,
    "bailing_moe": _BAILING,
    "bailing_moe_v2": _BAILING,
    "bailing_moe_linear": _BAILING,
    "bailing_hybrid": replace(
        _deepseek("tf bailing_hybrid/, vllm model_executor/models/bailing_moe_v3.py", 2.5, (8, 4), 1),
        top_k=("num_experts_per_tok", "num_experts_per_token"),
        score_field=None,
    ),
    "longcat_flash": _LONGCAT,
    "hunyuan_v1_moe": _HUNYUAN,
    "hunyuan": _HUNYUAN,
    "hy_v3": replace(
        _SIGMOID,
        source="tf hy_v3/, vllm model_executor/models/hy_v3.py",
        intermediate_size=("expert_hidden_dim", "moe_intermediate_size"),
        shared=("num_shared_experts",),
        renormalize_field=("route_norm",),
        scaling=("router_scaling_factor",),
        defaults={"num_shared_experts": 1, "router_scaling_factor": 2.826},
    ),
    "afmoe": replace(
        _SIGMOID,
        source="tf afmoe/, vllm model_executor/models/afmoe.py",
        shared=("num_shared_experts",),
        score_field="score_func",
        renormalize_field=("route_norm",),
        scaling=("route_scale",),
        defaults={"num_shared_experts": 2},
    ),
    "lfm2_moe": replace(
        _SIGMOID,
        source="tf lfm2_moe/",
        bias="use_expert_bias",
        experts=("feed_forward.experts",),
        defaults={"use_expert_bias": True},
    ),
    "gemma4_text": ModelType(
        "tf gemma4/, vllm model_executor/models/gemma4.py",
        num_experts=("num_experts",),
        top_k=("top_k_experts",),
        intermediate_size=("moe_intermediate_size", "expert_intermediate_size"),
        activation=("hidden_activation", "hidden_act"),
        score_field=None,
        switch="enable_moe_block",
        experts=("experts", "moe.experts", "moe"),
        defaults={"hidden_activation": "gelu_pytorch_tanh", "enable_moe_block": False},
    ),
    "olmoe": ModelType("tf olmoe/", num_experts=("num_experts",), intermediate_size=_SMALL, renormalize=False),
    "phimoe": replace(_MIXTRAL, source="tf phimoe/ (two draws of top-1, weights as they are)", renormalize=False),
    "granitemoe": _GRANITE,
    "granitemoeshared": replace(_GRANITE, shared=("shared_intermediate_size",)),
    "granitemoehybrid": replace(
        _GRANITE, shared=("shared_intermediate_size",), defaults={"shared_intermediate_size": 1024}
    ),
    "jamba": ModelType(
        "tf jamba/",
        num_experts=("num_experts",),
        intermediate_size=_SMALL,
        renormalize=False,
        experts=("feed_forward.experts",),
    ),
    "dbrx": ModelType(
        "tf dbrx/, vllm model_executor/models/dbrx.py",
        num_experts=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
        hidden_size=("d_model",),
        intermediate_size=("ffn_config.ffn_hidden_size",),
        activation=("ffn_config.ffn_act_fn.name",),
        score_field=None,
        experts=("ffn.experts",),
    ),
    "arctic": replace(_MIXTRAL, source="Snowflake's ArcticConfig, vLLM 0.10 model_executor/models/arctic.py"),
    "grok-1": ModelType(
        "sglang srt/models/grok.py",
        num_experts=("num_local_experts", "num_experts"),
        intermediate_size=("moe_intermediate_size", "intermediate_size"),
        score_field=None,
        renormalize=False,
        experts=_BLOCK,
        fixed={"activation": Activation.GELU},
    ),
    "mistral params.json": _MISTRAL_PARAMS,
}
PARAMS_JSON = "mistral params.json"
"""The key in `MODEL_TYPES` of Mistral's params.json, which has no `model_type`."""
