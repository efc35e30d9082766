"""The tactics that FlashInfer's own runner lists for each GEMM of `cutlass_fused_moe`."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from moetune.backends.flashinfer_cutlass.formats import Format
from moetune.backends.flashinfer_cutlass.op import MODULES, activation_type, require_flags
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime


@dataclass(frozen=True, slots=True)
class GemmTactics:
    """Holds the tactics of one GEMM as positions in the list of both GEMMs' tactics that FlashInfer's runner has.

    `unsuitable`: those that the device cannot run, or in kernels for mixed input those whose tile does not fit the
    GEMM's sizes.
    """

    runnable: tuple[int, ...]
    unsuitable: tuple[int, ...]


def gemm_tactics(layer: MoELayer, regime: Regime, fmt: Format, device: str) -> tuple[GemmTactics, GemmTactics]:
    """Returns the tactics of GEMM1 and GEMM2 that FlashInfer's own runner lists for this device. GEMM1's come first.

    Raises:
        UnsupportedError: this version of FlashInfer lacks the kernels.
    """
    core = importlib.import_module("flashinfer.fused_moe.core")
    module = core.get_cutlass_fused_moe_module(MODULES[torch.cuda.get_device_capability(device)])
    runner = module.MoERunner(**_runner_arguments(module.MoERunner, layer, regime, fmt))
    first = runner.fused_moe_runner.get_gemm1_tactic_count()
    both = first + runner.fused_moe_runner.get_gemm2_tactic_count()
    found = []
    for number, everything in ((1, range(first)), (2, range(first, both))):
        runner.gemm_idx_for_tuning = number
        runnable = tuple(runner.get_valid_tactics(_inputs(layer, regime, fmt), None))
        found.append(GemmTactics(runnable, tuple(sorted(set(everything) - set(runnable)))))
    return found[0], found[1]


def _inputs(layer: MoELayer, regime: Regime, fmt: Format) -> list[torch.Tensor | None]:
    """Returns the inputs of a tuner call without storage: x, and the weights and biases of both GEMMs."""
    hidden, inner = fmt.padded(layer.hidden_size, regime.intermediate_size(layer))

    def empty(dtype: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    w1 = empty(fmt.weights, 1, 2 * inner, hidden // fmt.packed)
    w2 = empty(fmt.weights, 1, hidden, inner // fmt.packed)
    return [empty(fmt.inputs, 1, hidden), w1, None, w2, None]


def _runner_arguments(runner: type, layer: MoELayer, regime: Regime, fmt: Format) -> dict[str, Any]:
    """Returns what `cutlass_fused_moe` gives to its runner, without parameters that this version's runner lacks."""
    given = {
        "x_dtype": getattr(torch, fmt.inputs),
        "weight_dtype": getattr(torch, fmt.weights),
        "output_dtype": torch.bfloat16,
        "top_k": regime.row_top_k(layer),
        "tp_size": regime.tp_size,
        "tp_rank": 0,
        "ep_size": regime.ep_size,
        "ep_rank": 0,
        "cluster_size": 1,
        "cluster_rank": 0,
        "enable_pdl": True,
        "activation_type": activation_type(layer),
    }
    names = list(inspect.signature(runner).parameters)
    require_flags(names, fmt)
    off = {name: False for name in names if name.startswith("use_") or name in ("enable_alltoall", "min_latency_mode")}
    return {name: value for name, value in {**off, **given, **fmt.parameters}.items() if name in names}
