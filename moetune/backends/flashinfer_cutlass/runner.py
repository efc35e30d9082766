"""Prepares one problem's weights, inputs and workspace for `cutlass_fused_moe`, and calls the op on them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetune.backends.base import Inputs, Problem
from moetune.backends.flashinfer_cutlass.op import ACTIVATIONS, MODULES
from moetune.backends.prepared import E4M3_MAX
from moetune.backends.reference import moe_reference
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

MIDDLE_MAX = 32.0
"""The largest intermediate value in fp8. silu(gate) · up of normal values rarely exceeds it, and is saturated if so."""


@dataclass(frozen=True, slots=True)
class GemmTactics:
    """Holds the tactics of one GEMM as positions in the list of both GEMMs' tactics that FlashInfer's runner has."""

    runnable: tuple[int, ...]
    too_big: tuple[int, ...]


def gemm_tactics(layer: MoELayer, regime: Regime, device: str) -> tuple[GemmTactics, GemmTactics]:
    """Returns the tactics of GEMM1 and GEMM2 that FlashInfer's own runner lists for this device. GEMM1's come first."""
    core = importlib.import_module("flashinfer.fused_moe.core")
    module = core.get_cutlass_fused_moe_module(MODULES[torch.cuda.get_device_capability(device)])
    runner = module.MoERunner(**_runner_arguments(module.MoERunner, layer, regime))
    first = runner.fused_moe_runner.get_gemm1_tactic_count()
    both = first + runner.fused_moe_runner.get_gemm2_tactic_count()
    found = []
    for number, everything in ((1, range(first)), (2, range(first, both))):
        runner.gemm_idx_for_tuning = number
        runnable = tuple(runner.get_valid_tactics([], None))
        found.append(GemmTactics(runnable, tuple(sorted(set(everything) - set(runnable)))))
    return found[0], found[1]


def _runner_arguments(runner: type, layer: MoELayer, regime: Regime) -> dict[str, Any]:
    """Returns what `cutlass_fused_moe` gives to its runner, without parameters that this version's runner lacks."""
    dtype = torch.float8_e4m3fn if layer.precision is Precision.FP8_TENSOR else torch.bfloat16
    given = {
        "x_dtype": dtype,
        "weight_dtype": dtype,
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
        "use_fused_finalize": True,
    }
    names = list(inspect.signature(runner).parameters)
    off = {name: False for name in names if name.startswith("use_") or name in ("enable_alltoall", "min_latency_mode")}
    return {name: value for name, value in {**off, **given}.items() if name in names}


def activation_type(layer: MoELayer) -> Any:
    """Returns FlashInfer's `ActivationType` of a layer."""
    return getattr(importlib.import_module("flashinfer.fused_moe").ActivationType, ACTIVATIONS[layer.activation])


@dataclass(frozen=True, slots=True)
class CutlassExperts:
    """Holds a rank's weights: `w1` `[L, 2·I, H]`, up before gate; `w2` `[L, H, I]`; in fp8 one f32 scale an expert."""

    w1: torch.Tensor
    w2: torch.Tensor
    scale1: torch.Tensor | None
    scale2: torch.Tensor | None

    def matrix1(self, expert: int) -> torch.Tensor:
        """Returns `w1` of one expert in fp32: `[2·I, H]`."""
        return _dequantized(self.w1, self.scale1, expert)

    def matrix2(self, expert: int) -> torch.Tensor:
        """Returns `w2` of one expert in fp32: `[H, I]`."""
        return _dequantized(self.w2, self.scale2, expert)


def random_experts(problem: Problem) -> CutlassExperts:
    """Draws normal weights of variance 1/fan-in, the same for the same layer, shard and seed."""
    hidden, inner, count = problem.layer.hidden_size, problem.intermediate_size, problem.shard.num_local
    fp8 = problem.layer.precision is Precision.FP8_TENSOR
    generator = torch.Generator(problem.device).manual_seed(problem.regime.seed)

    def normal(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        values = torch.empty(count, height, width, dtype=dtype, device=problem.device)
        scales = torch.ones(count, dtype=torch.float32, device=problem.device)
        for expert in range(count):  # one at a time, because all experts in fp32 would need twice the memory
            made = torch.randn(height, width, generator=generator, device=problem.device).mul_(width**-0.5)
            if fp8:
                scales[expert] = made.abs().max() / E4M3_MAX
                made /= scales[expert]
            values[expert] = made.to(dtype)
        return values, scales if fp8 else None

    w1, scale1 = normal(2 * inner, hidden)
    w2, scale2 = normal(hidden, inner)
    return CutlassExperts(w1, w2, scale1, scale2)


class CutlassRunner:
    """Runs one problem on its weights, inputs, routings and workspace.

    Draw d has the inputs `d … d + M − 1` of one buffer, so no row has the same input in two draws. Output and workspace
    are allocated once and the op never waits for the GPU, so a CUDA graph can capture `run`. The op gets global ids and
    drops those of other ranks and −1.
    """

    def __init__(self, problem: Problem, experts: CutlassExperts) -> None:
        self._op = importlib.import_module("flashinfer.fused_moe").cutlass_fused_moe
        self._experts, self._problem = experts, problem
        device, layer, regime = problem.device, problem.layer, problem.regime
        generator = torch.Generator(device).manual_seed(regime.seed + 1)
        shape = (problem.rows + len(problem.draws) - 1, layer.hidden_size)
        inputs = torch.randn(shape, generator=generator, device=device)
        self._input_scale = torch.tensor(1.0, device=device)
        if experts.scale1 is not None:
            self._input_scale = inputs.abs().max() / E4M3_MAX
            inputs /= self._input_scale
        self._inputs = inputs.to(experts.w1.dtype)
        self._ids = [draw.routing.topk_ids.to(device, torch.int32).contiguous() for draw in problem.draws]
        self._weights = [draw.routing.topk_weights.to(device, torch.float32).contiguous() for draw in problem.draws]
        self._out = torch.empty(problem.rows, layer.hidden_size, dtype=torch.bfloat16, device=device)
        self._fixed: dict[str, Any] = {
            "fc1_expert_weights": experts.w1,
            "fc2_expert_weights": experts.w2,
            "output_dtype": torch.bfloat16,
            "quant_scales": self._quant_scales(),
            "tp_size": regime.tp_size,
            "tp_rank": 0,
            "ep_size": regime.ep_size,
            "ep_rank": problem.shard.rank,
            "output": self._out,
            "tune_max_num_tokens": regime.tune_max_num_tokens,
            "activation_type": activation_type(layer),
        }
        if "workspace_buffer" in inspect.signature(self._op).parameters:
            self._fixed["workspace_buffer"] = self._workspace()

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        self._op(**self.arguments(draw), profile_ids=[tactic["gemm1"], tactic["gemm2"]])
        return self._out

    def inputs(self, draw: int = 0) -> Inputs:
        """See `FillableRunner.inputs`. In fp8, x is already divided by the input's scale."""
        return Inputs(self._inputs[draw : draw + self._problem.rows], self._ids[draw], self._weights[draw])

    def arguments(self, draw: int = 0) -> dict[str, Any]:
        """Returns the op's arguments on a draw without `profile_ids`. Without them FlashInfer's autotuner chooses."""
        return {
            "input": self._inputs[draw : draw + self._problem.rows],
            "token_selected_experts": self._ids[draw],
            "token_final_scales": self._weights[draw],
            **self._fixed,
        }

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from inputs and weights as stored. The intermediate is not rounded."""
        x = self._inputs[draw : draw + self._problem.rows].float() * self._input_scale
        first, count = self._problem.shard.first, self._problem.shard.num_local
        return moe_reference(x, self._ids[draw], self._weights[draw], range(first, first + count), self._expert)

    def _expert(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        up, gate = (rows @ self._experts.matrix1(index).T).chunk(2, dim=-1)
        if self._problem.layer.activation is Activation.GELU:
            gated = torch.nn.functional.gelu(gate, approximate="tanh")
        else:
            gated = torch.nn.functional.silu(gate)
        return (gated * up) @ self._experts.matrix2(index).T

    def _quant_scales(self) -> list[torch.Tensor]:
        """Returns the op's f32 scales in fp8, and nothing in bf16.

        They are the scales of GEMM1's dequantization `[L]`, of the intermediate's quantization `[]`, of GEMM2's
        dequantization `[L]` and of the input's dequantization `[]`.
        """
        scale1, scale2 = self._experts.scale1, self._experts.scale2
        if scale1 is None or scale2 is None:
            return []
        middle = torch.tensor(MIDDLE_MAX / E4M3_MAX, device=scale1.device)
        return [scale1 * self._input_scale, 1 / middle, scale2 * middle, self._input_scale]

    def _workspace(self) -> torch.Tensor:
        problem, dtype = self._problem, self._experts.w1.dtype
        size = importlib.import_module("flashinfer.fused_moe.core").cutlass_fused_moe_workspace_size(
            problem.rows,
            problem.layer.hidden_size,
            problem.intermediate_size,
            problem.shard.num_physical,
            problem.row_top_k,
            x_dtype=dtype,
            weight_dtype=dtype,
            output_dtype=torch.bfloat16,
            activation_type=activation_type(problem.layer),
            tp_size=problem.regime.tp_size,
            ep_size=problem.regime.ep_size,
            ep_rank=problem.shard.rank,
            device=torch.device(problem.device),
        )
        return torch.empty(size, dtype=torch.uint8, device=problem.device)


def _dequantized(weights: torch.Tensor, scales: torch.Tensor | None, expert: int) -> torch.Tensor:
    values = weights[expert].float()
    return values if scales is None else values * scales[expert]
