"""`KernelsAnswers`: what moetune's store says of the flags with which vLLM's triton_kernels run."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moetune.engine.call_answers import CallAnswers
from moetune.errors import MissError

if TYPE_CHECKING:
    from moetune.store.match import Match

_SCALES = ("HOPPER_SCALE", 8)
"""The order in which vLLM stores scales on Hopper, and the number of warps that reads it."""


class KernelsAnswers(CallAnswers):
    """The answers to vLLM's calls of `triton_kernel_fused_experts`, by shape."""

    kernels = "triton_kernels' experts"
    own = "triton_kernels' formula chooses"
    command = "--backend triton-kernels"

    def rows(self, call: Mapping[str, Any]) -> int | None:
        """Returns M."""
        rows: int = call["hidden_states"].shape[0]
        return rows or None

    def key(self, call: Mapping[str, Any]) -> Hashable:
        """Returns the shapes of weights, the top-k, the type of the rows, and what is read of the other arguments."""
        weights = (tuple(call["w1"].shape), tuple(call["w2"].shape))
        return (weights, call["topk"], call["hidden_states"].dtype, _read(call))

    def name(self, call: Mapping[str, Any]) -> str:
        """Returns the local experts and I/tp."""
        return f"triton_kernels' experts E={call['w1'].shape[0]}, N={call['w2'].shape[1]}"

    def is_other(self, call: Mapping[str, Any]) -> bool:
        """Returns whether a call is not of the session's layer on one of the regime's ranks, in bf16 on Hopper."""
        from moetune.backends.triton_kernels.space import gemms
        from moetune.spec.layer import SWIGLU_ALPHA, SWIGLU_LIMIT

        layer, regime = self.session.layer, self.session.regime
        first, second = gemms(layer, regime, 1)
        count = call["w1"].shape[0]
        return (
            count not in self.local_experts()
            or tuple(call["w1"].shape) != (count, first.K, first.N)
            or tuple(call["w2"].shape) != (count, second.K, second.N)
            or call["topk"] != regime.row_top_k(layer)
            or str(call["hidden_states"].dtype) != "torch.bfloat16"
            or _read(call) != (layer.expert_bias, False, SWIGLU_ALPHA, SWIGLU_LIMIT, (_SCALES, _SCALES))
        )

    def obstacle(self) -> str | None:
        """Returns the variable that forbids other flags, or why the backend does not tune the layer or the package."""
        from moetune.backends.triton_kernels import package
        from moetune.backends.triton_kernels.backend import TritonKernelsBackend

        if getattr(sys.modules.get("vllm.envs"), "VLLM_BATCH_INVARIANT", False):
            return "VLLM_BATCH_INVARIANT is set"
        if found := package.obstacle():
            return found[0]
        reason = TritonKernelsBackend().unsupported(self.session.layer, self.session.regime)
        return None if reason is None else f"moetune's backend triton-kernels {reason}"

    def match(self) -> Match | None:
        """Returns the stored profile, if it was measured with this Triton and these sources of triton_kernels."""
        from moetune.backends.triton_kernels.backend import TritonKernelsBackend
        from moetune.tuning.question import Question

        session = self.session
        with suppress(MissError):
            question = Question.of(
                session.layer, session.regime, TritonKernelsBackend(), session.store, rank=self._rank
            )
            return question.match()
        return None


def _read(call: Mapping[str, Any]) -> Hashable:
    """Returns whether there are biases, whether weights multiply inputs, the activation's constants, and the scales."""
    config = call["quant_config"]
    scales = tuple(_order(precision.weight_scale) for precision in (config.w1_precision, config.w2_precision))
    weight_on_input = bool(call["apply_router_weight_on_input"])
    return (config.w1_bias is not None, weight_on_input, call["swiglu_alpha"], call["swiglu_limit"], scales)


def _order(scale: Any) -> tuple[str | None, int | None]:
    """Returns the name of the order in which scales are stored, and its number of warps; None for what it lacks."""
    layout = getattr(getattr(scale, "storage", None), "layout", None)
    return getattr(layout, "name", None), getattr(layout, "num_warps", None)
