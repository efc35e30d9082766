"""Computes references that round as the Triton kernel does, and the resources that a compiled tactic uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import triton

from moetune.backends.grouped_triton.ahead import compile_gemms
from moetune.backends.grouped_triton.quantize import dequantize_rows, quantize_rows_reference
from moetune.backends.grouped_triton.runner import TritonRunner
from moetune.backends.grouped_triton.space import Shapes
from moetune.backends.reference import relative_error


def rounded_reference(runner: TritonRunner, draw: int = 0) -> torch.Tensor:
    """Computes the layer with the kernel's own roundings: quantized operands, bf16 intermediates and products."""
    return _staged(runner, draw, None)[1]


def staged_errors(runner: TritonRunner, tactic: Mapping[str, Any], draw: int = 0) -> tuple[float, float]:
    """Returns the relative errors of both stages of a run; see `errors_of_stages`."""
    return errors_of_stages(runner, *run_in_stages(runner, tactic, draw), draw)


def run_in_stages(runner: TritonRunner, tactic: Mapping[str, Any], draw: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a tactic, and returns the activated intermediate `[slots, I]` and the output `[M, H]`."""
    out = runner.run(tactic, draw).clone()
    return runner._activated.clone(), out


def errors_of_stages(
    runner: TritonRunner, activated: torch.Tensor, out: torch.Tensor, draw: int = 0
) -> tuple[float, float]:
    """Returns the relative Frobenius error of each stage against the rounded reference of its own input.

    The first stage ends with the activated intermediate. In fp8 it is then quantized, and one bf16 rounding in the
    other direction can change the scale of 128 values. This changes the output of the whole layer by half a percent,
    and that of a single row by up to 1.1 %. So errors of the whole layer are taken over several rows. The error of a
    single stage does not have this effect.
    """
    expected, expected_out = _staged(runner, draw, activated)
    ids = runner._topk_ids[draw].view(-1)
    local = (ids >= runner._first) & (ids < runner._first + runner._shapes.num_local)
    return relative_error(activated[local], expected[local]), relative_error(out, expected_out)


def _staged(runner: TritonRunner, draw: int, activated: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rounded intermediate and output. `activated`, if not None, is the second stage's input."""

    def quantized(values: torch.Tensor) -> torch.Tensor:
        return dequantize_rows(*quantize_rows_reference(values)) if runner._shapes.fp8 else values

    ids, weights, experts = runner._topk_ids[draw], runner._topk_weights[draw], runner._experts
    x = quantized(runner._input(draw).float())
    expected = torch.zeros(runner._activated.shape, dtype=torch.float32, device=x.device)
    out = torch.zeros_like(x)
    for expert in range(runner._shapes.num_local):
        rows, columns = torch.where(ids == runner._first + expert)
        slots = rows * ids.shape[1] + columns
        expected[slots] = _rounded(runner._activate(_rounded(x[rows] @ experts.w1.fp32(expert).T)))
        entering = expected[slots] if activated is None else activated[slots].float()
        products = quantized(entering) @ experts.w2.fp32(expert).T
        out.index_add_(0, rows, _rounded(products * weights[rows, columns].unsqueeze(1)))
    return expected, out


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def compile_tactic(
    shapes: Shapes,
    tactic: Mapping[str, Any],
    *,
    capability: tuple[int, int],
    kernel: str = "builtin",
    zero_remote: bool = False,
) -> dict[str, int]:
    """Compiles both GEMMs of one tactic; see `compile_gemms`.

    Returns:
        `registers` per thread, `shared_bytes` per block and `spill_bytes` (stack) per thread, each the larger value of
        the two GEMMs.
    """
    compiled = compile_gemms(shapes, tactic, capability=capability, kernel=kernel, zero_remote=zero_remote)
    usages = [_resource_usage(gemm.asm["cubin"]) | {"shared_bytes": gemm.metadata.shared} for gemm in compiled]
    return {name: max(usage[name] for usage in usages) for name in usages[0]}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Returns the registers and the stack bytes per thread of a cubin's kernel, from `cuobjdump -res-usage`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {printed!r}")
    return {"registers": int(found[1]), "spill_bytes": int(found[2])}
