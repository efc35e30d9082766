"""The gated activations between Marlin's two GEMMs, in one kernel each."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from moetune.backends.grouped_triton.activation import activate_and_multiply
from moetune.backends.reference import CLAMPED
from moetune.spec.layer import Activation

_BLOCK: Final = 1024


def activate(activation: Activation, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the activation of each slot, computed in fp32 and rounded once.

    Args:
        activation: a gated one.
        gate_up: contiguous bf16 `[S, 2·I]`, the gate half before the up half.
        out: contiguous bf16 `[S, I]`.
    """
    if activation not in CLAMPED:
        activate_and_multiply(gate_up, out, gelu=activation is Activation.GELU)
        return
    num_slots, width = out.shape
    alpha, beta, limit = CLAMPED[activation]
    _clamped[(num_slots, triton.cdiv(width, _BLOCK))](gate_up, out, width, alpha, beta, limit, BLOCK=_BLOCK)


@triton.jit
def _clamped(gate_up_ptr, out_ptr, width, alpha, beta, limit, BLOCK: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_up_ptr += slot * 2 * width
    gate = tl.load(gate_up_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    activated = gate * tl.sigmoid(alpha * gate) * (up + beta)
    tl.store(out_ptr + slot * width + columns, activated.to(out_ptr.dtype.element_ty), mask=inside)
