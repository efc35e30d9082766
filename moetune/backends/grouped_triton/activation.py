"""What stands around the two GEMMs: the gated activation between them and the sum over a row's slots at the end."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def activate_and_multiply(gate_up: torch.Tensor, out: torch.Tensor, *, gelu: bool) -> None:
    """`out[s] = f(gate_up[s, :I]) · gate_up[s, I:]` with f silu or tanh-gelu; contiguous bf16 `[S, 2I]` and `[S, I]`.

    Computed in fp32 and rounded once.
    """
    num_slots, width = out.shape
    _activate_and_multiply[(num_slots, triton.cdiv(width, _BLOCK))](gate_up, out, width, BLOCK=_BLOCK, GELU=gelu)


def sum_slots(products: torch.Tensor, out: torch.Tensor) -> None:
    """`out[r]` = the sum over k of `products[r, k]`, in fp32; contiguous bf16 `[rows, k, H]` and `[rows, H]`."""
    rows, top_k, width = products.shape
    _sum_slots[(rows, triton.cdiv(width, _BLOCK))](products, out, width, BLOCK=_BLOCK, TOP_K=top_k)


@triton.jit
def _activate_and_multiply(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr, GELU: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_up_ptr += slot * 2 * width
    gate = tl.load(gate_up_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + width + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # tanh-gelu(x) = x · sigmoid(2 · sqrt(2 / pi) · (x + 0.044715 · x³))
        gated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gated = gate * tl.sigmoid(gate)
    tl.store(out_ptr + slot * width + columns, (gated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_slots(products_ptr, out_ptr, width, BLOCK: tl.constexpr, TOP_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    products_ptr += row * TOP_K * width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for column in tl.static_range(TOP_K):
        total += tl.load(products_ptr + column * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
