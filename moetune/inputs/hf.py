"""Reads a `MoELayer` from a Hugging Face `config.json`.

Each family names its fields in its own way; `FAMILIES` says how, with the defaults of the family's config class in
transformers where a routing field may be left out. The four sizes (experts, top-k, hidden, intermediate) have no
default here: a config that lacks one is refused by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moetune.errors import UsageError
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.words import Precision

Config = Mapping[str, Any]
Meaning = TypeVar("Meaning")
NESTED = ("text_config", "language_config", "llm_config")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU,
    "gelu_new": Activation.GELU,
    "gelu_fast": Activation.GELU,
}
DTYPES = {
    "bfloat16": Precision.BF16,
    "float16": Precision.FP16,
    "float32": Precision.FP32,
}
MODELOPT = {"NVFP4": Precision.NVFP4, "FP8": Precision.FP8_TENSOR}
PRECISION_HINT = f"Name one with --precision: {', '.join(Precision)}."


@dataclass(frozen=True, slots=True)
class Family:
    """How one `model_type` spells its MoE layer. The tuples list alternative field names.

    `shared` counts the shared experts; where it ends in `_size` it is their joint intermediate size instead.
    `defaults` are the values of the optional fields of the config class; `fixed` sets `MoELayer` fields that the
    model's code decides.
    """

    num_experts: tuple[str, ...]
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    intermediate_size: str = "moe_intermediate_size"
    shared: str | None = None
    scoring: str = "softmax"
    bias: bool | str = False
    renormalize: bool = True
    group_score: str = "top2"
    defaults: Config = field(default_factory=dict)
    fixed: Config = field(default_factory=dict)


def _deepseek(scaling: float, groups: tuple[int, int], shared: int) -> Family:
    return Family(
        num_experts=("n_routed_experts", "num_local_experts"),
        shared="n_shared_experts",
        scoring="sigmoid",
        bias="topk_method",
        defaults={
            "routed_scaling_factor": scaling,
            "n_group": groups[0],
            "topk_group": groups[1],
            "n_shared_experts": shared,
            "topk_method": "noaux_tc",
        },
    )


_DEEPSEEK_V3 = _deepseek(2.5, (8, 4), 1)
_GLM_MOE = _deepseek(1.0, (1, 1), 1)
_QWEN_MOE = Family(num_experts=("num_experts", "num_local_experts"), renormalize=False)
_QWEN_SHARED = Family(
    num_experts=("num_experts",),
    shared="shared_expert_intermediate_size",
    defaults={"shared_expert_intermediate_size": 512},
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": Family(
        num_experts=("n_routed_experts",),
        shared="n_shared_experts",
        renormalize=False,
        group_score="max",
        defaults={"n_shared_experts": 2, "topk_method": "greedy"},
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": _GLM_MOE,
    "glm_moe_dsa": _deepseek(2.5, (1, 1), 1),
    "mimo_v2_flash": _deepseek(1.0, (1, 1), 0),
    "qwen2_moe": Family(
        num_experts=("num_experts",),
        shared="shared_expert_intermediate_size",
        renormalize=False,
        defaults={"shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": _QWEN_MOE,
    "qwen3_vl_moe_text": Family(num_experts=("num_experts",)),
    "qwen3_next": _QWEN_SHARED,
    "qwen3_5_moe_text": _QWEN_SHARED,
    "mixtral": Family(num_experts=("num_local_experts",), intermediate_size="intermediate_size"),
    "minimax_m2": Family(
        num_experts=("num_local_experts",),
        intermediate_size="intermediate_size",
        shared="shared_intermediate_size",
        scoring="sigmoid",
        bias="use_routing_bias",
        defaults={"use_routing_bias": True},
    ),
    "gpt_oss": Family(
        num_experts=("num_local_experts",),
        top_k=("num_experts_per_tok", "experts_per_token"),
        intermediate_size="intermediate_size",
        fixed={"activation": Activation.SWIGLU_CLAMPED, "expert_bias": True},
    ),
    "llama4_text": Family(
        num_experts=("num_local_experts",),
        intermediate_size="intermediate_size",
        scoring="sigmoid",
        renormalize=False,
        fixed={"weight_on_input": True, "num_shared_experts": 1},
    ),
    "ernie4_5_moe": Family(
        num_experts=("moe_num_experts",),
        top_k=("moe_k", "num_experts_per_tok"),
        shared="moe_num_shared_experts",
        bias="moe_use_aux_free",
        defaults={"moe_num_shared_experts": 2, "moe_use_aux_free": True},
    ),
}


def layer_from_config(
    source: str | os.PathLike[str] | Config, name: str | None = None, precision: Precision | str | None = None
) -> MoELayer:
    """The MoE layer of a model, from its `config.json`, the folder that holds it, or the parsed object.

    `precision` overrides what the config says of its quantization; `name` the layer's name (the folder's else).
    Beside a `config.json` without `quantization_config`, ModelOpt's `hf_quant_config.json` is read too.

    Raises:
        UsageError: the file cannot be read, is no MoE of a known family, lacks a field or has a value that cannot be
            used; the message names the file and the field.
    """
    if isinstance(source, Mapping):
        return _layer(source, source, "config", name or "custom", precision)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    config = _read(path)
    quantized = config
    beside = path.with_name("hf_quant_config.json")
    if _quantization(config) is None and beside.is_file():
        quantized = {**config, "quantization_config": {**_object(_read(beside), "quantization", str(beside))}}
        quantized["quantization_config"].setdefault("quant_method", "modelopt")
    default_name = path.absolute().parent.name if path.name == "config.json" else path.stem
    return _layer(config, quantized, str(path), name or default_name or "custom", precision)


def _read(path: Path) -> Config:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}.", "Give a config.json, its folder or a model's name."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}.") from None
    if not isinstance(parsed, dict):
        raise UsageError(f"{path} is not a config: a JSON object is expected, found {type(parsed).__name__}.")
    return parsed


def _object(config: Config, key: str, where: str) -> Config:
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: {key} must be an object, given {value!r}.")
    return value


def _layer(config: Config, quantized: Config, where: str, name: str, precision: Precision | str | None) -> MoELayer:
    text = _text_config(config)
    family = _family(text, where)
    fields = _Fields(text, family.defaults, where)
    intermediate = fields.size(family.intermediate_size)
    values: dict[str, Any] = {
        "name": name,
        "num_experts": fields.size(*family.num_experts),
        "top_k": fields.size(*family.top_k),
        "hidden_size": fields.size("hidden_size"),
        "intermediate_size": intermediate,
        "num_shared_experts": _shared(fields, family, intermediate),
        "activation": family.fixed.get("activation") or fields.choice("hidden_act", ACTIVATIONS, "silu"),
        "precision": precision or _precision(quantized, where),
        "routing": _routing(fields, family),
        **family.fixed,
    }
    try:
        return MoELayer(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.hint) from None


def _text_config(config: Config) -> Config:
    """The language model's part of a multimodal config, else the config itself."""
    for key in NESTED:
        if isinstance(config.get(key), Mapping):
            return _text_config(config[key])
    return config


def _family(text: Config, where: str) -> Family:
    model_type = text.get("model_type")
    known = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if known is not None:
        return known
    if not any(count in text for count in EXPERT_COUNTS):
        raise UsageError(
            f"{where} is no mixture of experts: none of {', '.join(EXPERT_COUNTS)} is there, "
            f"model_type is {model_type!r}."
        )
    raise UsageError(f"{where}: unknown model_type {model_type!r}.", f"Known: {', '.join(FAMILIES)}.")


@dataclass(frozen=True, slots=True)
class _Fields:
    """Checked access to a config's fields; every error names the file and the field."""

    config: Config
    defaults: Config
    where: str

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, the config class's default or `default`; an explicit null is None."""
        return self.config.get(name, self.defaults.get(name, default))

    def size(self, *names: str) -> int:
        """A required positive integer under the first of `names` that is there."""
        name = next((name for name in names if self.config.get(name) is not None), None)
        if name is None:
            raise UsageError(f"{self.where} lacks the field {' or '.join(names)}.")
        return self.integer(name, least=1)

    def integer(self, name: str, default: int = 0, least: int = 0) -> int:
        """An integer of at least `least`; null is `default`."""
        value = self.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{self.where}: {name} must be an integer of at least {least}, given {value!r}.")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite positive number; null is `default`."""
        value = self.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UsageError(f"{self.where}: {name} must be a positive number, given {value!r}.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; null is `default`."""
        value = self.get(name, default)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UsageError(f"{self.where}: {name} must be true or false, given {value!r}.")
        return value

    def choice(self, name: str, choices: Mapping[str, Meaning], default: str) -> Meaning:
        """The meaning of one of a few strings."""
        value = self.get(name, default) or default
        if not isinstance(value, str) or value not in choices:
            raise UsageError(f"{self.where}: {name} must be one of {', '.join(choices)}; given {value!r}.")
        return choices[value]


def _shared(fields: _Fields, family: Family, intermediate_size: int) -> int:
    if family.shared is None:
        return 0
    given = fields.integer(family.shared)
    return -(-given // intermediate_size) if family.shared.endswith("_size") else given


def _routing(fields: _Fields, family: Family) -> dict[str, Any]:
    routing: dict[str, Any] = {
        "scoring": fields.choice("scoring_func", {"softmax": "softmax", "sigmoid": "sigmoid"}, family.scoring),
        "bias": family.bias,
        "renormalize": fields.flag("norm_topk_prob", family.renormalize),
        "scaling": fields.number("routed_scaling_factor", 1.0),
    }
    if family.bias == "topk_method":
        routing["bias"] = fields.get("topk_method") == "noaux_tc"
    elif isinstance(family.bias, str):
        routing["bias"] = fields.flag(family.bias, False)
    groups, chosen = fields.integer("n_group", 1, least=1), fields.integer("topk_group", 1, least=1)
    if fields.get("topk_method") != "greedy" and chosen != groups:
        routing |= {"num_groups": groups, "top_k_groups": chosen, "group_score": family.group_score}
    return routing


def _quantization(config: Config) -> Any:
    found = config.get("quantization_config")
    return _text_config(config).get("quantization_config") if found is None else found


def _precision(config: Config, where: str) -> Precision:
    if _quantization(config) is None:
        text = _text_config(config)
        given = next((c[key] for c in (text, config) for key in ("dtype", "torch_dtype") if c.get(key)), "bfloat16")
        dtype = str(given).removeprefix("torch.")
        if dtype not in DTYPES:
            raise UsageError(f"{where}: dtype must be one of {', '.join(DTYPES)}; given {given!r}.", PRECISION_HINT)
        return DTYPES[dtype]
    quantization = _quantization(config)
    if not isinstance(quantization, Mapping):
        raise UsageError(f"{where}: quantization_config must be an object, given {quantization!r}.")
    method = quantization.get("quant_method")
    found: Precision | None = None
    if quantization.get("quant_algo") is not None:
        found = MODELOPT.get(str(quantization["quant_algo"]))
    elif method == "mxfp4":
        found = Precision.MXFP4
    elif method == "fp8":
        found = _fp8(quantization.get("weight_block_size"))
    elif method == "compressed-tensors":
        found = _compressed_tensors(quantization)
    if found is None:
        spelled = ", ".join(
            f"{key} = {quantization[key]!r}"
            for key in ("quant_method", "quant_algo", "format", "weight_block_size")
            if key in quantization
        )
        raise UsageError(f"{where}: no precision is known for quantization_config ({spelled}).", PRECISION_HINT)
    return found


def _fp8(block: Any) -> Precision | None:
    if block is None:
        return Precision.FP8_TENSOR
    return Precision.FP8_BLOCK if block == [128, 128] else None


def _compressed_tensors(quantization: Config) -> Precision | None:
    """One group of weights, for all experts; anything mixed is left to the user."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return None
    match weights.get("type"), weights.get("num_bits"), weights.get("strategy"):
        case "float", 8, "tensor":
            return Precision.FP8_TENSOR
        case "float", 8, "block":
            return _fp8(weights.get("block_structure"))
        case "float", 4, "tensor_group" if weights.get("group_size") == 16:
            return Precision.NVFP4
        case "int", 4, "group" if weights.get("group_size") == 32 and weights.get("symmetric"):
            return Precision.MXINT4
        case _:
            return None
