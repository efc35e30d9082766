"""The block's output as one process computes it, with the weights of all ranks."""

from __future__ import annotations

import torch

from moetune.backends.base import Backend
from moetune.backends.reference import relative_error
from moetune.dep_bench.experts import Experts, without_dispatch
from moetune.dep_bench.payload import Format
from moetune.dep_bench.router import Router
from moetune.errors import NoResultError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime


def block_reference(
    backend: Backend, layer: MoELayer, regime: Regime, form: Format, router: Router, x: torch.Tensor
) -> torch.Tensor:
    """Returns the layer's output for hidden states `[T, H]` in fp32: `[T, H]` float32.

    The experts of one rank after the other are made here and applied to all tokens. Nothing travels.

    Args:
        backend: makes the weights. It is another object than the block's, whose weights stay on the device.
        layer, regime, form, router, x: as in `Block`.
    """
    plain = without_dispatch(regime)
    ids, weights = router.top_k(router.logits(x))
    seen = form.seen(x)
    if form.routing == "packed_topk":
        weights = weights.bfloat16().float()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for rank in range(regime.ep_size):
        experts = Experts(backend, layer, plain, rank, str(x.device))
        inputs = experts.inputs(len(x))
        inputs.x.copy_(seen)
        inputs.topk_ids.copy_(ids)
        inputs.topk_weights.copy_(weights)
        out += experts.reference(len(x))
    return out


def require_right(out: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    """Returns the relative Frobenius error of an output.

    Args:
        out: what was computed.
        expected: the reference, of the same shape.
        tolerance: the largest error.
        what: names the output in the error message.

    Raises:
        NoResultError: the error is larger, or not a number.
    """
    error = relative_error(out, expected)
    if error <= tolerance:
        return error
    raise NoResultError(
        f"{what} is wrong: its relative error is {error:.1e}, allowed are {tolerance:.0e}.",
        "Report it, with this command.",
    )
