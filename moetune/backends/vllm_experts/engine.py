"""Finds the installed vLLM, and makes one of its experts classes outside of an engine.

vLLM selects experts classes by `--moe-backend` (`fused_moe/oracle/fp8.py`). A class does all that the flag switches but
the quantization of its input, which is `moe_kernel_quantize_input` (`prepare_finalize/no_dp_ep.py`). The constructors,
`apply` and `workspace_shapes` have the same arguments in vLLM 0.26.0 and 0.33.0.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moetune.backends.base import Problem
from moetune.backends.device import without_device
from moetune.errors import UnsupportedError

FUSED_MOE: Final = "vllm.model_executor.layers.fused_moe"
FP8_UTILS: Final = "vllm.model_executor.layers.quantization.utils.fp8_utils"
READ: Final = "0.26.0 … 0.33.0"
"""The versions that were read."""
APPLY: Final = frozenset(
    {
        *("output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts"),
        *("expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta"),
        "apply_router_weight_on_input",
    }
)
"""The arguments of `FusedMoEExpertsModular.apply`."""
Prepared = tuple[Any, Any, Any, Any]
"""Both GEMMs' weights and both GEMMs' scales, as vLLM's experts read them."""
_TOOLKIT: Final = "/usr/local/cuda"


@dataclass(frozen=True, slots=True)
class ExpertsClass:
    """One experts class: its `name` in the `module` of `fused_moe/experts/`."""

    module: str
    name: str


def version() -> str:
    """Returns the version of the installed vLLM; `not installed` without one."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed" if _folder() is None else "unknown"


def _folder() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) if folders else None


def lacking(experts: ExpertsClass) -> tuple[str, str] | None:
    """Returns why vLLM's experts cannot run here, and a hint: vLLM, the class's module or a Hopper GPU is missing.

    vLLM is not imported, which would take seconds.
    """
    folder = _folder()
    if folder is None:
        return "vLLM is not installed", "pip install vllm"
    if not (folder / "model_executor/layers/fused_moe/experts" / f"{experts.module}.py").is_file():
        return f"vLLM {version()} has no experts/{experts.module}.py", f"Install vLLM {READ}."
    return without_device(lambda found: found == (9, 0), "needs compute capability 9.0", "Use --backend triton.")


def lacking_deep_gemm() -> tuple[str, str] | None:
    """Returns why vLLM runs no DeepGEMM here, and a hint: it is off, not installed, or finds no CUDA toolkit.

    DeepGEMM compiles its kernels with nvcc when they first run (`deep_gemm/__init__.py` of 2.5.0 and 2.8.1).
    """
    for name in ("VLLM_USE_DEEP_GEMM", "VLLM_MOE_USE_DEEP_GEMM"):
        if os.environ.get(name) == "0":
            return f"{name}=0 switches DeepGEMM off", f"Unset {name}."
    folder = _folder()
    vendored = folder is not None and (folder / "third_party" / "deep_gemm").is_dir()
    if not vendored and importlib.util.find_spec("deep_gemm") is None:
        return "neither deep_gemm nor vllm.third_party.deep_gemm is installed", f"Install vLLM {READ}, which brings it."
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home and shutil.which("nvcc") is None and not os.path.exists(_TOOLKIT):
        return "DeepGEMM compiles its kernels when they first run, and finds no nvcc", "Install a CUDA toolkit."
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """An experts object of vLLM and what is called with it.

    Attributes:
        experts: the object.
        activation: `MoEActivation.SILU`.
        quant_config: the `FusedMoEQuantConfig`.
    """

    experts: Any
    activation: Any
    quant_config: Any

    def quantized(self, x: Any) -> tuple[Any, Any]:
        """Returns the input as vLLM quantizes it for these experts: e4m3 `[M, H]`, and its scales."""
        config = self.quant_config
        quantize = importlib.import_module(f"{FUSED_MOE}.utils").moe_kernel_quantize_input
        values, scales = quantize(
            x,
            config.a1_scale,
            quant_dtype=config.quant_dtype,
            per_act_token_quant=config.per_act_token_quant,
            block_shape=config.block_shape,
        )
        return values, scales


def prepared_for_deep_gemm(w1: Any, w2: Any, scales1: Any, scales2: Any) -> Prepared:
    """Returns weights and scales in the layout that DeepGEMM reads. Those given may change, but no weight's value."""
    prepare = importlib.import_module(FP8_UTILS).prepare_fp8_moe_layer_for_deepgemm
    w1, w2, scales1, scales2 = prepare(w1, w2, scales1, scales2, (128, 128))
    return w1, w2, scales1, scales2


def make(experts: ExpertsClass, problem: Problem, quant: Mapping[str, Any], **extra: Any) -> Engine:
    """Imports vLLM and makes an experts object for a problem's rank.

    The rank's experts are given as those of an engine without parallelism: the class reads the sizes alone, and the
    expert map that `apply` gets says which experts are local.

    Args:
        experts: the class.
        problem: the problem. Its activation is SiLU.
        quant: the arguments of vLLM's `fp8_w8a8_moe_quant_config`.
        extra: further arguments of the class, such as those of the batched ones.

    Raises:
        UnsupportedError: `apply` has other arguments than those that are known.
    """
    import torch

    config = importlib.import_module(f"{FUSED_MOE}.config")
    activation = importlib.import_module(f"{FUSED_MOE}.activation").MoEActivation.SILU
    made = getattr(importlib.import_module(f"{FUSED_MOE}.experts.{experts.module}"), experts.name)
    arguments = set(inspect.signature(made.apply).parameters) - {"self"}
    if arguments != APPLY:
        differing = ", ".join(sorted(arguments ^ APPLY))
        raise UnsupportedError(
            f"{experts.name}.apply of vLLM {version()} differs from the known one in {differing}.",
            f"Install vLLM {READ}.",
        )
    moe_config = config.FusedMoEConfig(
        num_experts=problem.shard.num_physical,
        experts_per_token=problem.row_top_k,
        hidden_dim=problem.layer.hidden_size,
        intermediate_size=problem.intermediate_size,
        num_local_experts=problem.shard.num_local,
        num_logical_experts=problem.layer.num_experts,
        activation=activation,
        device=torch.device(problem.device),
        routing_method=config.RoutingMethodType.TopK,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        max_num_tokens=problem.rows,
    )
    quant_config = config.fp8_w8a8_moe_quant_config(**quant)
    return Engine(made(moe_config=moe_config, quant_config=quant_config, **extra), activation, quant_config)
