"""Reads what in a launch line decides whether vLLM or SGLang finds a tuned file for its Triton experts.

Sources: `get_moe_configs` of vLLM 0.33.0 and SGLang 0.5.23. Shared experts: `resolve_shared_experts_config` and
`shared_experts_fusion_disable_reason` in SGLang's models; vLLM fuses them only on ROCm (`fused_moe/utils.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import launch
from moetune.inputs.launch_line import TRUE, Line
from moetune.inputs.launch_sglang import named_kernels
from moetune.inputs.options import read_layer, resolve
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.untrusted import read_json

FOLDER_VARIABLES: Final = {"vllm": "VLLM_TUNED_CONFIG_FOLDER", "sglang": "SGLANG_MOE_CONFIG_DIR"}
"""The variable that names a folder of tuned files. SGLang reads `configs/` below it."""
_ARCHITECTURES: Final = {
    "deepseek-r1": "DeepseekV3ForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "glm-4.5": "Glm4MoeForCausalLM",
    "glm-4.5-air": "Glm4MoeForCausalLM",
    "glm-4.7": "Glm4MoeForCausalLM",
    "glm-5": "GlmMoeDsaForCausalLM",
}
"""The architectures of the presets whose shared expert SGLang can fuse."""
_FUSING: Final[Mapping[str, int | None]] = {
    "DeepseekV3ForCausalLM": 256,
    "GlmMoeDsaForCausalLM": 256,
    "Glm4MoeForCausalLM": None,
    "Glm4MoeLiteForCausalLM": None,
}
"""Maps the architectures with fused shared experts to the number of experts that they need for it; None: any."""
_SEPARATE_SHARED: Final = ("deepep", "deepep_v2", "mooncake", "mori", "pplx", "flashinfer", "flashinfer_megamoe")
"""The dispatchers with which SGLang does not fuse shared experts."""


@dataclass(frozen=True, slots=True)
class TableLine:
    """What of a launch line decides whether a tuned file is read, and which.

    Attributes:
        engine: `vllm` or `sglang`.
        layer: the layer.
        ep_size, tp_size, redundant_experts: as in `Regime`.
        regime: the load; None if moetune does not model the dispatcher's.
        dispatcher: the dispatcher's name, such as `deepep_low_latency`.
        folder: the value of `FOLDER_VARIABLES`; None if the line does not set it.
        named: the MoE backend that the line selects; None if the engine chooses.
        flag: the flag that selects it.
        quantized_online: whether the engine quantizes the experts while it loads them.
        ignores_files: why the engine reads no file with any kernel; empty if it may read one.
        deep_gemm: the line's `VLLM_USE_DEEP_GEMM`; None if it is not set.
        any_rows_deep_gemm: whether vLLM takes DeepGEMM for any row count and size where it is selected. It does unless
            the line turns off that scales are rounded up to powers of two (`VLLM_USE_DEEP_GEMM_E8M0=0`).
        aiter: whether the line selects AITER's kernels.
        fused_experts: the shared experts that each rank's kernel has beside the routed ones.
        has_plugin: whether the line starts moetune's plugin, which can answer a look-up before any file.
        warnings: what in the line was not understood or matters later.
    """

    engine: str
    layer: MoELayer
    ep_size: int
    tp_size: int
    redundant_experts: int
    regime: Regime | None
    dispatcher: str
    folder: str | None
    named: str | None
    flag: str
    quantized_online: bool
    ignores_files: str
    deep_gemm: bool | None
    aiter: bool
    fused_experts: int
    has_plugin: bool = False
    any_rows_deep_gemm: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def num_experts(self) -> tuple[int, ...]:
        """E: the experts in a rank's kernel; two numbers if shards are uneven.

        Raises:
            UsageError: ep does not divide the experts and the engine needs even shards.
        """
        uneven = self.engine == "vllm"
        split = Regime(ep_size=self.ep_size, redundant_experts=self.redundant_experts, uneven_shards=uneven)
        found = {split.shard(self.layer, rank).num_local + self.fused_experts: None for rank in (0, self.ep_size - 1)}
        return tuple(found)

    @property
    def intermediate_size(self) -> int:
        """N: the intermediate size on one rank.

        Raises:
            UsageError: tp does not divide the intermediate size.
        """
        split = Regime(tp_size=self.tp_size)
        split.shard(self.layer)
        return split.intermediate_size(self.layer)


def read(spelled: str, given: Mapping[str, Any] | None = None) -> TableLine:
    """Returns what of a launch line decides whether a tuned file is read.

    Args:
        spelled: the line.
        given: options of a layer and of the ladder, which override the line.

    Raises:
        UsageError: as `launch.read`, or the line is one of TensorRT-LLM's, which has no such files.
        UnsupportedError: as `launch.read`, but not for kernels or dispatchers that moetune does not tune.
    """
    beside = {name: value for name, value in (given or {}).items() if value is not None}
    server, line = launch.parsed(spelled)
    if server.engine not in FOLDER_VARIABLES:
        raise UsageError(
            "The launch line starts TensorRT-LLM, which reads no tuned file for Triton experts.",
            "Give a line of vllm serve or of SGLang's server.",
        )
    # the kernels are looked at here, also those that moetune does not tune
    found = launch.read(spelled, {**beside, "backend": "triton"})
    options = {**found.options, **beside}
    layer, notes = read_layer(options)
    dispatcher = str(options.get("dispatch", "")).partition(":")[2]
    ep, tp = options.get("ep") or 1, options.get("tp") or 1
    vllm = server.engine == "vllm"
    named, flag = _vllm_named(line) if vllm else named_kernels(line)
    return TableLine(
        engine=server.engine,
        layer=layer,
        ep_size=ep,
        tp_size=tp,
        redundant_experts=options.get("redundant_experts") or 0,
        regime=_regime(options),
        dispatcher=dispatcher,
        folder=line.variable(FOLDER_VARIABLES[server.engine]),
        named=named,
        flag=flag,
        quantized_online=line.text("quantization") == "fp8",
        ignores_files=_ignores_files(line, vllm=vllm),
        deep_gemm=_deep_gemm(line) if vllm else None,
        aiter=_true(line.variable("VLLM_ROCM_USE_AITER" if vllm else "SGLANG_USE_AITER")),
        fused_experts=0 if vllm else _fused(line, layer, options, ep, dispatcher, named),
        has_plugin="MOETUNE_REGIME" in server.variables,
        any_rows_deep_gemm=_true(line.variable("VLLM_USE_DEEP_GEMM_E8M0") or "1"),
        warnings=(*found.warnings, *notes),
    )


def _regime(options: Mapping[str, Any]) -> Regime | None:
    try:
        return resolve(**{name: value for name, value in options.items() if name != "backend"}).regime
    except UnsupportedError:
        return None


def _vllm_named(line: Line) -> tuple[str | None, str]:
    named = line.text("moe-backend")
    return None if named == "auto" else named, "--moe-backend"


def _ignores_files(line: Line, *, vllm: bool) -> str:
    if vllm and _true(line.variable("VLLM_BATCH_INVARIANT")):
        return "VLLM_BATCH_INVARIANT makes vLLM run its default configuration."
    if not vllm and line.switch("enable-deterministic-inference"):
        return "--enable-deterministic-inference makes SGLang run its default configuration."
    return ""


def _deep_gemm(line: Line) -> bool | None:
    found = [line.variable(name) for name in ("VLLM_USE_DEEP_GEMM", "VLLM_MOE_USE_DEEP_GEMM")]
    given = [value for value in found if value is not None]
    return all(map(_true, given)) if given else None


def _fused(line: Line, layer: MoELayer, options: Mapping[str, Any], ep: int, dispatcher: str, named: str | None) -> int:
    """Returns how many shared experts SGLang fuses into a rank's kernel on a GPU of NVIDIA."""
    architecture = _architecture(layer, options.get("model"))
    if architecture not in _FUSING or line.switch("disable-shared-experts-fusion"):
        return 0
    if (named or "").startswith(("flashinfer_trtllm", "flashinfer_cutedsl", "experimental_sgl_trtllm", "lora_")):
        return 0
    is_glm = architecture.startswith("Glm4Moe")
    if line.switch("enforce-shared-experts-fusion") and not is_glm:
        return layer.num_shared_experts
    overlaps = line.switch("enable-two-batch-overlap") or line.switch("enable-single-batch-overlap")
    if ep > 1 or dispatcher in _SEPARATE_SHARED or (overlaps and not is_glm):
        return 0
    if _FUSING[architecture] not in (None, layer.num_experts) or (layer.num_shared_experts != 1 and not is_glm):
        return 0
    return layer.num_shared_experts


def _architecture(layer: MoELayer, model: Any) -> str:
    """Returns the first architecture of a config, or that of a preset; empty if it is neither or fuses nothing."""
    if model is None or not os.path.exists(str(model)):
        return _ARCHITECTURES.get(layer.name, "")
    path = Path(str(model))
    try:
        config = read_json(path / "config.json" if path.is_dir() else path)
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""


def _true(value: str | None) -> bool:
    return value is not None and value.lower() in TRUE
