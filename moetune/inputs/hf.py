"""Reads a `MoELayer` from a Hugging Face `config.json`, or from Mistral's `params.json`.

`hf_model_types.MODEL_TYPES` has the field names of each model type. `hf_quantization` reads the precision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.hf_experts import ExpertModules, mentioned_layers
from moetune.inputs.hf_fields import SIZES_HINT, Config, Fields
from moetune.inputs.hf_model_types import MODEL_TYPES, PARAMS_JSON, ModelType
from moetune.inputs.hf_quantization import named_modules, stored_dtype, stored_experts
from moetune.quoting import enumerated, quoted, shown_path
from moetune.spec.enums import Precision
from moetune.spec.layer import SWIGLU_ALPHA, SWIGLU_BETA, SWIGLU_LIMIT, Activation, MoELayer
from moetune.untrusted import read_json

NESTED = ("text_config", "thinker_config", "language_config", "llm_config")
"""The fields in which a multimodal config has its language model."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
SWIGLU_CLAMPED = {"swiglu_alpha": SWIGLU_ALPHA, "swiglu_limit": SWIGLU_LIMIT, "swiglu_beta": SWIGLU_BETA}
"""Maps the names that configs use for the constants of `Activation.SWIGLU_CLAMPED` to their values."""


class Reading(NamedTuple):
    """A layer, and notes for the user about its config, one sentence each."""

    layer: MoELayer
    notes: tuple[str, ...]


def layer_from_config(
    source: str | os.PathLike[str] | Config, name: str | None = None, precision: Precision | str | None = None
) -> MoELayer:
    """Returns the MoE layer of a model's `config.json`.

    If the config has no `quantization_config`, ModelOpt's `hf_quant_config.json` in the same folder is read too.

    Args:
        source: the path of a config, of the folder that contains it, or the parsed object.
        name: the layer's name. None means the name of the folder.
        precision: the weights' precision. None means the one that the config states.

    Raises:
        UsageError: the file cannot be read, has no known model type, lacks a field or has an invalid value.
        UnsupportedError: moetune does not model its experts.
    """
    return read_config(source, name, precision).layer


def read_config(
    source: str | os.PathLike[str] | Config,
    name: str | None = None,
    precision: Precision | str | None = None,
    overrides: Config | None = None,
) -> Reading:
    """Returns the same layer as `layer_from_config`, with notes.

    Args:
        source, name, precision: as in `layer_from_config`.
        overrides: fields that replace the config's, objects field by field (vLLM's `--hf-overrides`).

    Raises:
        UsageError, UnsupportedError: as `layer_from_config`.
    """
    if isinstance(source, Mapping):
        config = _merged(source, overrides or {})
        return _reading(config, _quantization(config), "config", name or "custom", precision)
    path = Path(source)
    path = path / "config.json" if os.path.isdir(path) else path
    config = _merged(_read(path), overrides or {})
    quantization = _quantization(config)
    beside = path.with_name("hf_quant_config.json")
    if quantization is None and os.path.isfile(beside):
        found = _read(beside).get("quantization")
        if not isinstance(found, Mapping):
            raise UsageError(
                f"{beside}: quantization must be an object, given {quoted(found)}.",
                "Correct the file, or pass --precision.",
            )
        quantization = {"quant_method": "modelopt", **found}
    default_name = path.absolute().parent.name if path.name in ("config.json", "params.json") else path.stem
    default_name = "".join(char if char.isprintable() else "_" for char in default_name)
    return _reading(config, quantization, str(path), name or default_name or "custom", precision)


def _read(path: Path) -> Config:
    try:
        parsed = read_json(path)
    except OSError as error:
        raise UsageError(
            f"{shown_path(path)} cannot be read: {error.strerror or error}.",
            "Pass a config.json, its folder or a model's name.",
        ) from None
    except ValueError as error:
        raise UsageError(f"{shown_path(path)} is not JSON: {error}.", "Pass a model's config.json.") from None
    if not isinstance(parsed, dict):
        raise UsageError(
            f"{path} is not a config: a JSON object is expected, found {type(parsed).__name__}.",
            "Pass a model's config.json.",
        )
    return parsed


def _merged(config: Config, overrides: Config) -> Config:
    changed = {
        key: _merged(config[key], value)
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping)
        else value
        for key, value in overrides.items()
    }
    return {**config, **changed}


def _reading(config: Config, quantization: Any, where: str, name: str, precision: Precision | str | None) -> Reading:
    text, kind = _text_and_type(config, where)
    fields = Fields(text, kind.defaults, where)
    _require_experts(fields, kind)
    intermediate = fields.size(*kind.intermediate_size, first_of_list=kind.first_of_list)
    values: dict[str, Any] = {
        "name": name,
        "num_experts": fields.size(*kind.num_experts, first_of_list=kind.first_of_list),
        "top_k": fields.size(*kind.top_k),
        "hidden_size": fields.size(*kind.hidden_size),
        "intermediate_size": intermediate,
        "num_shared_experts": _shared(fields, kind, intermediate),
        "activation": _activation(fields, kind),
        "routing": _routing(fields, kind),
        **kind.fixed,
    }
    notes: list[str] = []
    if precision is None:
        values["precision"], notes = _precision(config, text, quantization, kind, where)
    else:
        values["precision"] = precision
    try:
        return Reading(MoELayer(**values), tuple(notes))
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", error.hint) from None


def _text_and_type(config: Config, where: str) -> tuple[Config, ModelType]:
    """Returns the language model's part of a config (all of it if it has one model only), and its type."""
    outer: list[Any] = []
    text = config
    while nested := next((text[key] for key in NESTED if isinstance(text.get(key), Mapping)), None):
        outer.append(text.get("model_type"))
        text = nested
    # A part without a type, or with a type that is not known, has the type of the whole config.
    names = [
        str(text.get("model_type")),
        *(spelled for whole in reversed(outer) for spelled in (f"{whole}_text", str(whole))),
    ]
    known = next((MODEL_TYPES[spelled] for spelled in names if spelled in MODEL_TYPES), None)
    if known is not None:
        return text, known
    if "model_type" not in text and "dim" in text and isinstance(text.get("moe"), Mapping):
        return text, MODEL_TYPES[PARAMS_JSON]
    signs = sorted(_signs_of_experts(config))
    said = next((spelled for spelled in (text.get("model_type"), *reversed(outer)) if spelled is not None), None)
    if not signs:
        raise UsageError(
            f"{where} is no mixture of experts: no field is about experts, model_type is {quoted(said)}.", SIZES_HINT
        )
    raise UsageError(
        f"{where}: unknown model_type {quoted(said)}; it has experts ({enumerated(signs, most=4)}).",
        f"{SIZES_HINT} Known: {', '.join(MODEL_TYPES)}.",
    )


def _signs_of_experts(config: Config) -> Iterator[str]:
    """Yields the fields, types and architectures whose names are about experts, at any depth."""
    for key, value in config.items():
        word = str(key).lower()
        if isinstance(value, Mapping):
            if word == "moe":
                yield str(key)
            yield from _signs_of_experts(value)
        elif ("expert" in word or "moe" in word.split("_")) and _is_some(value):
            yield str(key)
        elif word == "model_type" and "moe" in str(value).lower():
            yield f"{key} {value}"
        elif word == "architectures" and isinstance(value, list):
            yield from (f"{key} {name}" for name in value if "moe" in str(name).lower())


def _is_some(value: Any) -> bool:
    """Returns whether the value of a field about experts means that there are any. One expert is a dense layer."""
    return isinstance(value, list | str) or (
        isinstance(value, int | float) and not isinstance(value, bool) and value > 1
    )


def _require_experts(fields: Fields, kind: ModelType) -> None:
    name, count = fields.found(*kind.num_experts)
    count = count[0] if isinstance(count, list) and count else count
    if count in (0, 1) and not isinstance(count, bool):
        raise UsageError(f"{fields.where} is no mixture of experts: {name} is {count}.", SIZES_HINT)
    if kind.switch is not None and not fields.flag(kind.switch, default=False):
        raise UsageError(f"{fields.where} is no mixture of experts: {kind.switch} is not set.", SIZES_HINT)
    if zero := fields.integer(*kind.zero_experts) if kind.zero_experts else 0:
        real = fields.size(*kind.num_experts)
        slots = fields.size(*kind.top_k)
        raise UnsupportedError(
            f"{fields.where}: {zero} of its {real + zero} experts compute nothing ({kind.zero_experts[0]}), which "
            f"moetune does not support: about {slots * real / (real + zero):.0f} of {slots} slots a token would count.",
            "Pass the sizes of a layer without them (--experts, --top-k, --hidden, --intermediate).",
        )


def _shared(fields: Fields, kind: ModelType, intermediate_size: int) -> int:
    if not kind.shared:
        return 0
    name, _ = fields.found(*kind.shared)
    given = fields.integer(*kind.shared)
    return -(-given // intermediate_size) if name.endswith(("_size", "_dim", "_dims")) else given


def _activation(fields: Fields, kind: ModelType) -> Activation:
    fixed = kind.fixed.get("activation")
    if fixed is Activation.SWIGLU_CLAMPED:
        for name, constant in SWIGLU_CLAMPED.items():
            if fields.get(name) is not None and fields.number(name, default=constant) != constant:
                raise UnsupportedError(
                    f"{fields.where}: moetune supports {fixed.value} with {name} = {constant}, "
                    f"given {quoted(fields.get(name))}.",
                    SIZES_HINT,
                )
    if fixed is not None:
        return Activation(fixed)
    found = fields.choice(*kind.activation, choices=kind.activations, default="silu")
    limit = fields.get(*kind.clamp) if kind.clamp else None
    if isinstance(limit, list) and limit:  # one entry a layer
        limit = max(limit, key=limit.count)
    return Activation.SILU_CLAMPED if found is Activation.SILU and limit else found


def _routing(fields: Fields, kind: ModelType) -> dict[str, Any]:
    routing: dict[str, Any] = {
        "scoring": kind.scoring
        if kind.score_field is None
        else fields.choice(kind.score_field, choices=kind.scores, default=kind.scoring),
        "bias": kind.bias,
        "renormalize": fields.flag(*kind.renormalize_field, default=kind.renormalize),
        "scaling": fields.number(*kind.scaling, default=1.0),
    }
    if kind.bias == "topk_method":
        routing["bias"] = fields.get("topk_method") == "noaux_tc"
    elif isinstance(kind.bias, str):
        routing["bias"] = fields.flag(kind.bias, default=False)
    groups = fields.integer(*kind.groups, default=1, least=1)
    chosen = fields.integer(*kind.top_k_groups, default=1, least=1)
    if fields.get("topk_method") != "greedy" and chosen != groups:
        routing |= {"num_groups": groups, "top_k_groups": chosen, "group_score": kind.group_score}
    return routing


def _quantization(config: Config) -> Any:
    """Returns `quantization_config` of the config or of its language model, or Mistral's `quantization` as one."""
    text: Any = config
    while isinstance(text, Mapping):
        if text.get("quantization_config") is not None:
            return text["quantization_config"]
        if isinstance(text.get("quantization"), Mapping) and "dim" in text:
            given = text["quantization"]
            return {"quant_method": "fp8", **given} if given.get("qformat_weight") == "fp8_e4m3" else given
        text = next((text[key] for key in NESTED if isinstance(text.get(key), Mapping)), None)
    return None


def _precision(
    config: Config, text: Config, quantization: Any, kind: ModelType, where: str
) -> tuple[Precision, list[str]]:
    """Returns the precision of most layers' experts, and notes for the user."""
    typed = text if text.get("dtype") or text.get("torch_dtype") else config
    if quantization is None:
        found = stored_dtype(typed, where)
        if found is not Precision.FP8_TENSOR:
            return found, []
        return found, [f"{where} has fp8 weights and no quantization_config: vLLM loads it as bf16 (--precision bf16)."]
    dtype = str(typed.get("dtype") or typed.get("torch_dtype")).removeprefix("torch.")
    unquantized = Precision.FP16 if dtype == "float16" else Precision.BF16
    expert_dtype = next((c["expert_dtype"] for c in (text, config) if c.get("expert_dtype") is not None), None)
    if expert_dtype is None and isinstance(quantization, Mapping):
        expert_dtype = quantization.get("expert_dtype") or kind.expert_dtype
    modules = ExpertModules((*dict.fromkeys((*kind.experts, "mlp.experts")),), _layers(text, quantization))
    stored = stored_experts(quantization, modules, unquantized, where, expert_dtype)
    return stored.precision, [
        f"{where}: the experts of {count} of {len(modules.layers)} layers are {other.value}. Those of most layers are "
        f"{stored.precision.value}, which is used; --precision changes it."
        for other, count in stored.others.items()
    ]


def _layers(text: Config, quantization: Any) -> tuple[int, ...]:
    """Returns the numbers of the layers with experts; one that no list mentions if the config has no depth."""
    depth = next((text[key] for key in DEPTHS if isinstance(text.get(key), int)), 0)
    dense = text.get("first_k_dense_replace")
    first = dense if isinstance(dense, int) and 0 <= dense < depth else 0
    if 0 < depth <= 1000:
        return tuple(range(first, depth))
    return (max(mentioned_layers(named_modules(quantization)), default=0) + 1,)
