"""Computes one MoE layer on one rank with plain PyTorch algorithms, and their fp32 reference.

Every algorithm takes (`experts`, `x`, `topk_ids`, `topk_weights`): the rank's `TorchExperts`, `[M, H]`, `[M, k]` int32
global expert slots (-1: nothing) and `[M, k]` float32, and returns `[M, H]` in the type of `x`. Slots of other
ranks' experts add nothing. All of a call's work is inside: finding the local slots, sorting, counting.

`eager`, `batched_mm` and `grouped_mm` are the algorithms that Hugging Face transformers' experts interface calls so
(`config.experts_implementation`, src/transformers/integrations/moe.py). Everywhere the products are scaled by the
router's weights and summed over a row's experts in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moetune.backends.reference import moe_reference
from moetune.errors import UnsupportedError
from moetune.spec.layer import SWIGLU_ALPHA, SWIGLU_BETA, SWIGLU_LIMIT, Activation


@dataclass(frozen=True, slots=True)
class TorchExperts:
    """Holds the L experts of a rank, global slots `first … first + L − 1`.

    `w1` `[L, 2·I, H]`, the gate half before the up half (checkpoints that interleave them, such as gpt-oss's, differ in
    layout only), `w2` `[L, H, I]`, `b1` `[L, 2·I]`, `b2` `[L, H]`. `weight_on_input`: the router's weight
    multiplies the expert's input and not its output (llama4).
    """

    first: int
    w1: Tensor
    w2: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None
    activation: Activation = Activation.SILU
    weight_on_input: bool = False

    @property
    def count(self) -> int:
        """L."""
        return self.w1.shape[0]

    def gated(self, gate_up: Tensor) -> Tensor:
        """Applies the activation between the two GEMMs: `[…, 2·I]` → `[…, I]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        match self.activation:
            case Activation.SILU:
                return functional.silu(gate) * up
            case Activation.GELU:
                return functional.gelu(gate, approximate="tanh") * up
            case Activation.SWIGLU_CLAMPED:
                gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
                return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + SWIGLU_BETA)
            case other:
                raise UnsupportedError(f"The torch backend computes no {other.value}.")

    def entering(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns the rows `[S, H]` as they enter their experts, given their router weights `[S]`."""
        return (rows * weights[:, None]).to(rows.dtype) if self.weight_on_input else rows

    def leaving(self, products: Tensor, weights: Tensor) -> Tensor:
        """Returns the experts' outputs `[S, H]` as they are summed, in a new float32 tensor."""
        return products.to(torch.float32, copy=True) if self.weight_on_input else products * weights[:, None]


@dataclass(frozen=True, slots=True)
class Slots:
    """Holds (row, expert) pairs: `rows` and `experts` int64 `[S]`, `weights` float32 `[S]`.

    Local experts are 0 … L−1. If `with_non_local` is true, some may be L, which marks a non-local expert.
    """

    rows: Tensor
    experts: Tensor
    weights: Tensor
    with_non_local: bool = False

    def sorted(self) -> Slots:
        """Returns the same slots sorted by expert, non-local ones at the end."""
        experts, order = torch.sort(self.experts, stable=True)
        return Slots(self.rows[order], experts, self.weights[order], self.with_non_local)

    def ends(self, count: int) -> Tensor:
        """Returns where the slots of each of `count` experts end, int64 `[count]`. The slots must be sorted."""
        return torch.searchsorted(self.experts, torch.arange(count, device=self.experts.device), right=True)


def _local_ids(experts: TorchExperts, topk_ids: Tensor) -> Tensor:
    """Returns local ids from 0 to L−1, and L for everything that is not on this rank; int64 `[M, k]`."""
    local = topk_ids.long() - experts.first
    return torch.where((local >= 0) & (local < experts.count), local, experts.count)


def _all_slots(experts: TorchExperts, topk_ids: Tensor, topk_weights: Tensor) -> Slots:
    """Returns all M·k slots, local or not. The host knows this shape, as a CUDA graph needs."""
    rows = torch.arange(topk_ids.shape[0], device=topk_ids.device).repeat_interleave(topk_ids.shape[1])
    return Slots(rows, _local_ids(experts, topk_ids).flatten(), topk_weights.flatten(), with_non_local=True)


def _local_slots(experts: TorchExperts, topk_ids: Tensor, topk_weights: Tensor) -> Slots:
    """Returns only the local slots. On a GPU the host waits for their number."""
    ids = _local_ids(experts, topk_ids)
    rows, columns = torch.where(ids < experts.count)
    return Slots(rows, ids[rows, columns], topk_weights[rows, columns])


def _slots(experts: TorchExperts, topk_ids: Tensor, topk_weights: Tensor) -> Slots:
    """Returns the local slots on the CPU, where counting them is free, and all slots on a GPU."""
    return (_all_slots if topk_ids.is_cuda else _local_slots)(experts, topk_ids, topk_weights)


def _combine(experts: TorchExperts, x: Tensor, products: Tensor, slots: Slots) -> Tensor:
    """Sums the experts' outputs `[S, H]` into their rows, without the non-local slots."""
    scaled = experts.leaving(products, slots.weights)
    if slots.with_non_local:
        scaled.masked_fill_((slots.experts == experts.count)[:, None], 0.0)
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, slots.rows, scaled).to(x.dtype)


def eager(experts: TorchExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Loops over the active experts: takes an expert's rows, runs two GEMMs and adds the result to the rows."""
    out = torch.zeros_like(x, dtype=torch.float32)
    chosen = functional.one_hot(_local_ids(experts, topk_ids), experts.count + 1).permute(2, 1, 0)[:-1]
    for expert in chosen.sum(dim=(1, 2)).nonzero().flatten().tolist():
        columns, rows = torch.where(chosen[expert])
        weights = topk_weights[rows, columns]
        gate_up = functional.linear(experts.entering(x[rows], weights), experts.w1[expert], _of(experts.b1, expert))
        products = functional.linear(experts.gated(gate_up), experts.w2[expert], _of(experts.b2, expert))
        out.index_add_(0, rows, experts.leaving(products, weights))
    return out.to(x.dtype)


def batched_mm(experts: TorchExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Copies the weights of every slot's expert and multiplies all slots at once. Suits few slots."""
    slots = _slots(experts, topk_ids, topk_weights)
    chosen = slots.experts.clamp(max=experts.count - 1)
    rows = experts.entering(x[slots.rows], slots.weights)
    gate_up = torch.bmm(experts.w1[chosen], rows[:, :, None])[:, :, 0]
    if experts.b1 is not None:
        gate_up += experts.b1[chosen]
    products = torch.bmm(experts.w2[chosen], experts.gated(gate_up)[:, :, None])[:, :, 0]
    if experts.b2 is not None:
        products += experts.b2[chosen]
    return _combine(experts, x, products, slots)


def grouped_mm(experts: TorchExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Sorts the slots by expert and leaves each GEMM over all experts to torch's grouped GEMM."""
    multiply = grouped_gemm()
    assert multiply is not None
    slots = _slots(experts, topk_ids, topk_weights).sorted()
    ends = slots.ends(experts.count).to(torch.int32)
    chosen = slots.experts.clamp(max=experts.count - 1)
    rows = experts.entering(x[slots.rows], slots.weights)
    gate_up = multiply(rows, experts.w1.transpose(1, 2), offs=ends)
    if experts.b1 is not None:
        gate_up = gate_up + experts.b1[chosen]
    products = multiply(experts.gated(gate_up), experts.w2.transpose(1, 2), offs=ends)
    if experts.b2 is not None:
        products = products + experts.b2[chosen]
    return _combine(experts, x, products, slots)


def segment_mm(experts: TorchExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Sorts the slots by expert and runs one GEMM for each expert's segment, and everything else once for all."""
    slots = _local_slots(experts, topk_ids, topk_weights).sorted()
    ends = slots.ends(experts.count).tolist()
    bounds = enumerate(zip([0, *ends[:-1]], ends, strict=True))
    segments = [(expert, slice(start, end)) for expert, (start, end) in bounds if start < end]
    rows = experts.entering(x[slots.rows], slots.weights)
    gate_up = x.new_empty(rows.shape[0], experts.w1.shape[1])
    for expert, segment in segments:
        torch.mm(rows[segment], experts.w1[expert].T, out=gate_up[segment])
    if experts.b1 is not None:
        gate_up += experts.b1[slots.experts]
    hidden = experts.gated(gate_up)
    products = torch.empty_like(rows)
    for expert, segment in segments:
        torch.mm(hidden[segment], experts.w2[expert].T, out=products[segment])
    if experts.b2 is not None:
        products += experts.b2[slots.experts]
    return _combine(experts, x, products, slots)


def padded_bmm(experts: TorchExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Pads every expert's rows to those of the busiest and multiplies all experts at once. Suits balanced loads."""
    slots = _local_slots(experts, topk_ids, topk_weights).sorted()
    ends = slots.ends(experts.count)
    starts = functional.pad(ends, (1, 0))[:-1]
    place = torch.arange(slots.rows.shape[0], device=x.device) - starts[slots.experts]
    padded = x.new_zeros(experts.count, int((ends - starts).max()), x.shape[1])
    padded[slots.experts, place] = experts.entering(x[slots.rows], slots.weights)
    gate_up = torch.bmm(padded, experts.w1.transpose(1, 2))
    if experts.b1 is not None:
        gate_up += experts.b1[:, None]
    products = torch.bmm(experts.gated(gate_up), experts.w2.transpose(1, 2))
    if experts.b2 is not None:
        products += experts.b2[:, None]
    return _combine(experts, x, products[slots.experts, place], slots)


def dense(experts: TorchExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Computes every row with every local expert and weights the unwanted ones with zero, without any sorting."""
    slots = _all_slots(experts, topk_ids, topk_weights)
    weights = topk_weights.new_zeros(experts.count + 1, x.shape[0])
    weights = weights.index_put_((slots.experts, slots.rows), slots.weights, accumulate=True)[:-1]
    gate_up = functional.linear(x, experts.w1.flatten(0, 1)).view(x.shape[0], *experts.w1.shape[:2])
    leaving = weights
    if experts.weight_on_input:
        gate_up = (gate_up * weights.T[:, :, None]).to(x.dtype)
        leaving = torch.zeros_like(functional.pad(weights, (0, 0, 0, 1)))
        leaving = leaving.index_put_((slots.experts, slots.rows), torch.ones_like(slots.weights))[:-1]
    if experts.b1 is not None:
        gate_up += experts.b1
    hidden = (experts.gated(gate_up).transpose(0, 1) * leaving[:, :, None]).to(x.dtype)
    out = torch.bmm(hidden, experts.w2.transpose(1, 2)).sum(dim=0, dtype=torch.float32)
    if experts.b2 is not None:
        out += leaving.T @ experts.b2.float()
    return out.to(x.dtype)


def reference(experts: TorchExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Computes the same layer in full float32, one expert after the other: `[M, H]` float32."""

    def expert(index: int, rows: Tensor) -> Tensor:
        gate_up = functional.linear(rows, experts.w1[index].float(), _of(experts.b1, index, torch.float32))
        return functional.linear(
            experts.gated(gate_up), experts.w2[index].float(), _of(experts.b2, index, torch.float32)
        )

    slots = range(experts.first, experts.first + experts.count)
    return moe_reference(x, topk_ids, topk_weights, slots, expert, weight_on_input=experts.weight_on_input)


def _of(bias: Tensor | None, expert: int, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if bias is None else bias[expert].to(dtype or bias.dtype)


def grouped_gemm() -> Callable[..., Tensor] | None:
    """Returns torch's grouped GEMM, or None if this build has none."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_mm_missing(hidden_size: int, intermediate_size: int, dtype: torch.dtype, device: str) -> str | None:
    """Returns why `grouped_mm` cannot run these sizes on `device`, or None; runs a tiny trial to find out.

    The trial's sizes are equal to the real ones modulo 16, because the kernels need aligned strides.
    """
    multiply = grouped_gemm()
    if multiply is None:
        return f"torch {torch.__version__} has no grouped GEMM (it came with 2.8)"
    hidden, inner = 16 + hidden_size % 16, 16 + intermediate_size % 16
    ends = torch.tensor([1, 2], dtype=torch.int32, device=device)
    try:
        for fan_in, fan_out in ((hidden, 2 * inner), (inner, hidden)):
            rows = torch.zeros(2, fan_in, dtype=dtype, device=device)
            weights = torch.zeros(2, fan_out, fan_in, dtype=dtype, device=device)
            multiply(rows, weights.transpose(1, 2), offs=ends)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return f"torch {torch.__version__}'s grouped GEMM refuses {dtype} on {device}: {str(error).splitlines()[0]}"
    return None


Algorithm = Callable[[TorchExperts, Tensor, Tensor, Tensor], Tensor]

ALGORITHMS: Mapping[str, Algorithm] = {
    "eager": eager,
    "batched_mm": batched_mm,
    "grouped_mm": grouped_mm,
    "segment_mm": segment_mm,
    "padded_bmm": padded_bmm,
    "dense": dense,
}
