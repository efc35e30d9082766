"""Defines `VllmRunner`, which calls one of vLLM's experts classes on rows that come with their ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from moetune.backends.base import Inputs, Problem
from moetune.backends.prepared import num_inputs
from moetune.backends.reference import moe_reference
from moetune.backends.vllm_experts.engine import Engine


class Matrices(Protocol):
    """One GEMM's weights of all local experts."""

    def fp32(self, expert: int) -> torch.Tensor:
        """Returns one expert's `[N, K]` in fp32."""
        ...


class VllmRunner:
    """Runs one problem as vLLM does: it quantizes bf16 rows and calls `apply`.

    `apply` sorts the rows, computes both GEMMs and what is between them, and adds the slots of a row. vLLM allocates
    tensors in a run and never waits for the GPU, so a CUDA graph can capture `run`.

    Args:
        problem: the problem to compute.
        engine: vLLM's experts object.
        w1, w2: the weights as `apply` gets them.
        matrices: the same weights, for the reference: the gate half of the first GEMM before the up half.
        inputs: a bf16 `[M, H]` for each draw, or fewer, which repeat.
    """

    def __init__(
        self,
        problem: Problem,
        engine: Engine,
        w1: torch.Tensor,
        w2: torch.Tensor,
        matrices: tuple[Matrices, Matrices],
        inputs: list[torch.Tensor],
    ) -> None:
        self._problem, self._engine, self._matrices, self._inputs = problem, engine, matrices, inputs
        device, shard = problem.device, problem.shard
        self._ids = [draw.routing.topk_ids.to(device, torch.int32).contiguous() for draw in problem.draws]
        self._weights = [draw.routing.topk_weights.to(device, torch.float32).contiguous() for draw in problem.draws]
        self._out = torch.empty(problem.rows, problem.layer.hidden_size, dtype=torch.bfloat16, device=device)
        first, second, _ = engine.experts.workspace_shapes(
            problem.rows, w1.shape[1], w1.shape[2], problem.row_top_k, shard.num_physical, shard.num_local, None,
            engine.activation,
        )  # fmt: skip
        workspace: Any = {"dtype": engine.experts.workspace_dtype(torch.bfloat16), "device": device}
        self._fixed: dict[str, Any] = {
            "output": self._out,
            "w1": w1,
            "w2": w2,
            "activation": engine.activation,
            "global_num_experts": shard.num_physical,
            "expert_map": self._expert_map(),
            "a2_scale": engine.quant_config.a2_scale,
            "workspace13": torch.empty(first, **workspace),
            "workspace2": torch.empty(second, **workspace),
            "expert_tokens_meta": None,
            "apply_router_weight_on_input": False,
        }

    def run(self, tactic: Mapping[str, Any], draw: int = 0) -> torch.Tensor:
        """Returns the layer's output, bf16 `[rows, H]`, in a buffer that the next call overwrites."""
        x, ids, weights = self.inputs(draw)
        values, scales = self._engine.quantized(x)
        self._engine.experts.apply(
            hidden_states=values, a1q_scale=scales, topk_ids=ids, topk_weights=weights, **self._fixed
        )
        return self._out

    def inputs(self, draw: int = 0) -> Inputs:
        """See `FillableRunner.inputs`. Draws can share inputs, so only those of one draw should be overwritten."""
        return Inputs(self._inputs[draw % len(self._inputs)], self._ids[draw], self._weights[draw])

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Returns the reference in fp32, from the weights as stored and the inputs before they are quantized."""
        first, count = self._problem.shard.first, self._problem.shard.num_local
        return moe_reference(*self.inputs(draw), range(first, first + count), silu_expert(*self._matrices))

    def _expert_map(self) -> torch.Tensor | None:
        """Returns the local index of each global expert, or −1: int32 `[E]`; None if the rank has all experts."""
        shard = self._problem.shard
        if shard.num_local == shard.num_physical:
            return None
        found = torch.full((shard.num_physical,), -1, dtype=torch.int32, device=self._problem.device)
        found[shard.first : shard.first + shard.num_local] = torch.arange(shard.num_local, dtype=torch.int32)
        return found


def silu_expert(first: Matrices, second: Matrices) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Returns what computes one expert for the reference: by its place and its rows `[S, H]`, `[S, H]` in fp32."""

    def computed(index: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ first.fp32(index).T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ second.fp32(index).T

    return computed


def random_inputs(problem: Problem, state: torch.Tensor) -> list[torch.Tensor]:
    """Draws bf16 inputs `[M, H]` for the draws of a problem, from a generator in this state."""
    from moetune.backends.grouped_triton.weights import normal

    generator = torch.Generator(problem.device)
    generator.set_state(state)
    return [normal((problem.rows, problem.layer.hidden_size), 1.0, generator) for _ in range(num_inputs(problem))]
