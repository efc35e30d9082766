"""Reads the precision of a model's experts from `quantization_config`.

Sources: vLLM 0.33.0, `model_executor/layers/quantization/`, `models/deepseek_v4/quant_config.py` (`expert_dtype`);
SGLang 0.5.23, `srt/configs/model_config.py` (`moe_quant_algo`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetune.errors import UsageError
from moetune.inputs.hf_experts import ExpertModules
from moetune.inputs.hf_fields import Config
from moetune.inputs.hf_schemes import METHODS, MODELOPT, compressed_tensors, gptq, quark
from moetune.quoting import quoted
from moetune.spec.enums import Precision

DTYPES: Mapping[str, Precision] = {
    "bfloat16": Precision.BF16,
    "float16": Precision.FP16,
    "float32": Precision.FP32,
    "float8_e4m3fn": Precision.FP8_TENSOR,
}
EXPERT_DTYPES = {"fp4": Precision.MXFP4, "mxfp4": Precision.MXFP4, "fp8": None}
"""Maps `expert_dtype` of DeepSeek-V4 to a precision. None means that of the other matrices."""
LEFT_OUT = ("ignore", "ignored_layers", "exclude_modules", "modules_to_not_convert", "llm_int8_skip_modules", "exclude")
"""The fields that list the modules that are not quantized: of compressed-tensors and ModelOpt, vLLM's fp8, ModelOpt,
transformers, bitsandbytes and Quark."""
LINEAR = ("linear", "routedexperts", "fusedmoe")
"""The module classes in the targets of a compressed-tensors group that include the experts (vLLM
`compressed_tensors.py: _add_fused_moe_to_target_scheme_map`)."""
MOST_NAMES = 50_000
"""In one list. A model of 61 layers of 256 experts has 46,848 matrices of experts."""
PRECISION_HINT = f"Pass one with --precision: {', '.join(Precision)}."
_SAID = (
    "quant_method", "quant_algo", "moe_quant_algo", "expert_dtype", "format", "weight_block_size", "bits", "group_size",
    "sym", "type", "num_bits", "strategy", "block_structure", "symmetric", "dtype", "qscheme",
)  # fmt: skip

ByLayer = dict[int, Precision | None]


@dataclass(frozen=True, slots=True)
class Stored:
    """The precision of most layers' experts, and for each other precision the number of layers that have it."""

    precision: Precision
    others: Mapping[Precision, int]


def stored_experts(
    quantization: Any, modules: ExpertModules, unquantized: Precision, where: str, expert_dtype: Any = None
) -> Stored:
    """Returns the precision of the experts of a quantized checkpoint.

    Args:
        quantization: `quantization_config`.
        modules: the experts' modules.
        unquantized: the precision of experts that are not quantized.
        where: the file, for errors.
        expert_dtype: the field of that name, which checkpoints with other fp8 matrices have (DeepSeek-V4), or None.

    Raises:
        UsageError: no precision is known for it.
    """
    if not isinstance(quantization, Mapping):
        raise UsageError(f"{where}: quantization_config must be an object, given {quoted(quantization)}.")
    said = _Said(quantization, modules, where)
    left_out = said.left_out()
    if left_out.issuperset(modules.layers):
        return Stored(unquantized, {})
    by_layer = said.by_layer(expert_dtype)
    counts = Counter(unquantized if layer in left_out else found or unquantized for layer, found in by_layer.items())
    # If two precisions are equally frequent, the quantized one is used.
    precision = max(counts, key=lambda known: (counts[known], known is not unquantized))
    return Stored(precision, {known: count for known, count in counts.items() if known is not precision})


def stored_dtype(config: Config, where: str) -> Precision:
    """Returns the precision of weights that are not quantized; bf16 by default.

    Raises:
        UsageError: no weight has such a dtype.
    """
    given = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key)), "bfloat16")
    dtype = str(given).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(f"{where}: dtype must be one of {', '.join(DTYPES)}; given {quoted(given)}.", PRECISION_HINT)
    return DTYPES[dtype]


def named_modules(quantization: Any) -> list[str]:
    """Returns every module name or pattern in a `quantization_config`."""
    if not isinstance(quantization, Mapping):
        return []
    lists = [quantization.get(key) for key in LEFT_OUT]
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping):
        lists += [group.get("targets") for group in groups.values() if isinstance(group, Mapping)]
    lists += [list(quantization[key]) for key in _KEYED if isinstance(quantization.get(key), Mapping)]
    return [name for found in lists if isinstance(found, list) for name in found if isinstance(name, str)]


_KEYED = ("quantized_layers", "layer_quant_config", "dynamic", "extra_config")


@dataclass(frozen=True, slots=True)
class _Said:
    """One `quantization_config`, and the modules that it is read for."""

    config: Config
    modules: ExpertModules
    where: str

    def by_layer(self, expert_dtype: Any) -> ByLayer:
        """Returns the precision of each layer's experts; None for layers that the config does not name."""
        config, method = self.config, str(self.config.get("quant_method") or "").lower().replace("_", "-")
        if config.get("moe_quant_algo") is not None:
            return self._everywhere(self._algorithm(config, "moe_quant_algo"))
        if config.get("quantized_layers"):
            return self._quantized_layers()
        if config.get("quant_algo") is not None:
            return self._everywhere(self._algorithm(config, "quant_algo"))
        if method == "compressed-tensors":
            return self._groups()
        if method == "quark":
            return self._quark()
        if method.startswith("gptq"):
            return self._gptq()
        if expert_dtype is not None and (stored := self._expert_dtype(expert_dtype)) is not None:
            return self._everywhere(stored)
        scheme = METHODS.get(method)
        return self._everywhere(self._known(scheme and scheme(config), config))

    def left_out(self) -> frozenset[int]:
        """Returns the layers whose experts are not quantized, whatever `by_layer` returns for them."""
        found: frozenset[int] = frozenset()
        for key in LEFT_OUT:
            found |= self.modules.meant_by(self._names(self.config.get(key), key), f"{self.where}: {key}")
        wide = [name for name, entry in self._object("extra_config").items() if _bits(entry) in (16, 32)]
        return found | self.modules.meant_by(wide, f"{self.where}: extra_config")

    def _quantized_layers(self) -> ByLayer:
        """Reads ModelOpt's MIXED_PRECISION, which has one entry for each module."""
        names: dict[str, list[str]] = {}
        for name, entry in self._object("quantized_layers").items():
            names.setdefault(str(self._entry(entry, name).get("quant_algo")), []).append(name)
        found: ByLayer = dict.fromkeys(self.modules.layers)
        for algorithm, modules in names.items():
            for layer in self.modules.meant_by(modules, f"{self.where}: quantized_layers"):
                found[layer] = self._algorithm({"quant_algo": algorithm}, "quant_algo")
        return found

    def _groups(self) -> ByLayer:
        """Reads compressed-tensors. A group that names the experts overrides a group of all linear layers."""
        groups = [self._entry(group, name) for name, group in self._object("config_groups").items()]
        if not groups:
            self._known(None, self.config)
        found: ByLayer = dict.fromkeys(self.modules.layers)
        wide: list[Config] = []
        for group in groups:
            targets = self._names(group.get("targets", ["Linear"]), "targets")
            wide += [group] * any(target.lower() in LINEAR for target in targets)
            named = [target for target in targets if target.lower() not in LINEAR]
            for layer in self.modules.meant_by(named, f"{self.where}: targets"):
                found[layer] = found[layer] or self._scheme(group)
        return {layer: known or (self._scheme(wide[0]) if wide else None) for layer, known in found.items()}

    def _scheme(self, group: Config) -> Precision:
        weights = group.get("weights")
        said = {"quant_method": "compressed-tensors", **(weights if isinstance(weights, Mapping) else {})}
        if "input_activations" in group:
            said["input_activations"] = group["input_activations"]
        return self._known(compressed_tensors(group), said)

    def _quark(self) -> ByLayer:
        """Reads Quark: the first entry of `layer_quant_config` that matches a layer, else `global_quant_config`."""
        found: ByLayer = dict.fromkeys(self.modules.layers)
        for name, entry in self._object("layer_quant_config").items():
            for layer in self.modules.meant_by([name], f"{self.where}: layer_quant_config"):
                found[layer] = found[layer] or self._quark_scheme(self._entry(entry, name))
        overall = self.config.get("global_quant_config")
        if overall is None:
            return found
        entry = self._entry(overall, "global_quant_config")
        return {layer: known or self._quark_scheme(entry) for layer, known in found.items()}

    def _quark_scheme(self, entry: Config) -> Precision:
        weight = entry.get("weight")
        return self._known(quark(entry), {"quant_method": "quark", **(weight if isinstance(weight, Mapping) else {})})

    def _gptq(self) -> ByLayer:
        """Reads GPTQ. Patterns in `dynamic` exclude modules (`-:`) or change their bits (`+:`).

        If there is a list of modules, only these are quantized.
        """
        overall = self._known(gptq(self.config), self.config)
        listed = self.config.get("modules_in_block_to_quantize")
        if listed:
            entries = listed if isinstance(listed, list) else [listed]
            flat = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
            meant = self.modules.meant_by(self._names(flat, "modules_in_block_to_quantize"), self.where)
            return {layer: overall if layer in meant else None for layer in self.modules.layers}
        found: ByLayer = self._everywhere(overall)
        for pattern, changes in reversed(list(self._object("dynamic").items())):
            leaves_out, text = pattern.startswith("-:"), pattern.removeprefix("+:").removeprefix("-:")
            if not leaves_out and (not isinstance(changes, Mapping) or "bits" not in changes):
                continue
            for layer in self.modules.meant_by([f"re:{text}"], f"{self.where}: dynamic"):
                found[layer] = None if leaves_out else self._known(gptq(changes), {"quant_method": "gptq", **changes})
        return found

    def _everywhere(self, precision: Precision) -> ByLayer:
        return dict.fromkeys(self.modules.layers, precision)

    def _algorithm(self, entry: Config, key: str) -> Precision:
        return self._known(MODELOPT.get(str(entry.get(key)).upper()), entry)

    def _expert_dtype(self, given: Any) -> Precision | None:
        if not isinstance(given, str) or given not in EXPERT_DTYPES:
            raise UsageError(
                f"{self.where}: expert_dtype must be one of {', '.join(EXPERT_DTYPES)}; given {quoted(given)}.",
                PRECISION_HINT,
            )
        return EXPERT_DTYPES[given]

    def _known(self, precision: Precision | None, said: Config) -> Precision:
        if precision is None:
            spelled = ", ".join(f"{key} = {quoted(said[key])}" for key in (*_SAID, "input_activations") if key in said)
            raise UsageError(
                f"{self.where}: no precision is known for quantization_config ({spelled}).", PRECISION_HINT
            )
        return precision

    def _object(self, key: str) -> Config:
        value = self.config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise UsageError(f"{self.where}: {key} must be an object, given {quoted(value)}.")
        return value or {}

    def _entry(self, value: Any, name: str) -> Config:
        if not isinstance(value, Mapping):
            raise UsageError(f"{self.where}: quantization_config: {name} must be an object, given {quoted(value)}.")
        return value

    def _names(self, value: Any, key: str) -> list[str]:
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UsageError(f"{self.where}: {key} must be a list of module names, given {quoted(value)}.")
        if len(value) > MOST_NAMES:
            raise UsageError(f"{self.where}: {key} has more than {MOST_NAMES:,} module names.", PRECISION_HINT)
        return value


def _bits(entry: Any) -> Any:
    return entry.get("bits") if isinstance(entry, Mapping) else None
