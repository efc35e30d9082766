"""The fp32 reference of one MoE layer that every backend is checked against, and the error against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch

from moetune.spec.layer import SWIGLU_ALPHA, SWIGLU_BETA, SWIGLU_LIMIT, Activation

SILU_LIMIT: Final = 10.0
"""`swiglu_limit` in the config.json of DeepSeek-V4."""
CLAMPED: Final[Mapping[Activation, tuple[float, float, float]]] = {
    Activation.SWIGLU_CLAMPED: (SWIGLU_ALPHA, SWIGLU_BETA, SWIGLU_LIMIT),
    Activation.SILU_CLAMPED: (1.0, 0.0, SILU_LIMIT),
}
"""(α, β, limit) of gate·sigmoid(α·gate)·(up + β), gate ≤ limit, |up| ≤ limit: vLLM's `silu_and_mul_with_clamp`,
FlashInfer's `SwigluBiasAdaptor`."""


def moe_reference(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: range,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    weight_on_input: bool = False,
) -> torch.Tensor:
    """Computes the layer's output on one rank in fp32, one expert after the other: `[M, H]` float32.

    Ids outside `experts`, −1 among them, add nothing. The products are true fp32: TF32 is switched off meanwhile.

    Args:
        x: inputs `[M, H]`, any dtype.
        topk_ids: global expert slots `[M, k]`.
        topk_weights: the router's weights `[M, k]`, float32.
        experts: the global slots of the rank.
        expert: computes one expert, by its place in `experts` and its rows `[S, H]` float32; returns `[S, H]` float32.
        weight_on_input: the router's weight multiplies an expert's input and not its output.
    """
    x = x.float()
    out = torch.zeros_like(x)
    with _full_precision():
        for index, slot in enumerate(experts):
            rows, columns = torch.where(topk_ids == slot)
            if not len(rows):
                continue
            weights = topk_weights[rows, columns].unsqueeze(1)
            if weight_on_input:
                out.index_add_(0, rows, expert(index, x[rows] * weights))
            else:
                out.index_add_(0, rows, expert(index, x[rows]) * weights)
    return out


def reference_activation(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns a gated activation of fp32 `[S, I]` in plain torch: fp32 `[S, I]`."""
    if activation in CLAMPED:
        alpha, beta, limit = CLAMPED[activation]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * (alpha * gate).sigmoid() * (up + beta)
    if activation is Activation.GELU:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    return torch.nn.functional.silu(gate) * up


def relative_error(result: torch.Tensor, reference: torch.Tensor, *, ignore_nonfinite: bool = False) -> float:
    """Returns the relative Frobenius error ‖result − reference‖ / ‖reference‖; ‖result‖ if the reference is all zero.

    NaN if a compared number of `result` is NaN.

    Args:
        result: any shape and dtype.
        reference: the same shape, any dtype.
        ignore_nonfinite: compare only where the reference is finite.
    """
    result, reference = result.float(), reference.float()
    if ignore_nonfinite:
        finite = reference.isfinite()
        result, reference = result[finite], reference[finite]
    difference, scale = _norm(result - reference), _norm(reference)
    return difference / scale if scale else difference


def _norm(values: torch.Tensor) -> float:
    """Sums in float64: squares of large values overflow float32."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


@contextmanager
def _full_precision() -> Iterator[None]:
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
