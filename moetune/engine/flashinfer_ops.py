"""Recognizes FlashInfer's MoE ops in the calls of its tuner, and puts a sampled routing into their inputs.

Source: flashinfer-python 0.6.18 and 0.7.2.post1. `MoeRunnerInputs` gives the order of the inputs of the trtllm-gen ops;
`RoutingInputMode` says which of them an op reads. That mode is an argument of the call. It cannot be derived from the
shapes: ops that route from logits may pass uninitialised `(M, k)` buffers as ids, and the tuner enlarges empty ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import TYPE_CHECKING, Any

from moetune.backends.flashinfer_cutlass.formats import OPTIONS, format_of
from moetune.errors import UnsupportedError, UsageError
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard

if TYPE_CHECKING:
    import torch

    from moetune.workload.routing import Routing

LOGITS, IDS, WEIGHTS = 1, 2, 3
"""Positions among the inputs of a trtllm-gen op."""
CUTLASS = "flashinfer-cutlass"
CUTLASS_OPS = ("trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2")
_SWITCHES = (
    "use_deepseek_fp8_block_scale",
    "use_w4_group_scaling",
    "use_mxfp8_act_scaling",
    "use_packed_weights",
    "use_wfp4afp8_humming",
)
"""The attributes of `cutlass_fused_moe`'s runner that select other kernels for the same dtypes."""
_TRTLLM_OP = re.compile(r"flashinfer::trtllm_\w+_moe")


class RoutingInput(Enum):
    """FlashInfer's `RoutingInputMode`, and two more for ops that have no such mode."""

    LOGITS = 0
    PACKED = 1
    UNPACKED = 2
    IDS_ALONE = 3  # CuteDSL: plain ids; the weights stay as they are
    NONE = 4  # cutlass_fused_moe: the inputs of the tuner call contain no routing


@dataclass(frozen=True, slots=True)
class MoEOp:
    """An op that computes the session's layer for a rank.

    `ids_index`: the position of its ids, for `IDS_ALONE`. `options`: those of moetune's backend that differ from the
    default, for `NONE`, where that backend tunes the op.
    """

    name: str
    backend: str
    routing_input: RoutingInput
    rank: int
    ids_index: int = IDS
    options: tuple[tuple[str, str], ...] = ()

    def place(self, inputs: Sequence[Any], routing: Routing, layer: MoELayer, shard: Shard, bias: Any) -> list[Any]:
        """Returns `inputs` with `routing` in them. All other tensors are the same objects.

        Args:
            inputs: the inputs that the tuner made, for M = `len(routing.topk_ids)` rows.
            routing: the sampled routing, ids and weights `[M, k]`.
            layer: the layer, whose routing method the logits are for.
            shard: the experts of this rank.
            bias: the engine's routing bias `[num_experts]`, or None.

        Raises:
            UnsupportedError: no router logits produce these ids, or an input has another shape than the routing.
        """
        from moetune.workload.packing import pack_eager

        placed = list(inputs)
        ids, weights = routing.topk_ids, routing.topk_weights
        match self.routing_input:
            case RoutingInput.LOGITS:
                placed[LOGITS] = _like(inputs[LOGITS], logits_for(layer, routing, shard, bias))
            case RoutingInput.PACKED:
                placed[IDS] = _like(inputs[IDS], pack_eager(ids, weights))
            case RoutingInput.UNPACKED:
                placed[IDS] = _like(inputs[IDS], ids)
                placed[WEIGHTS] = _like(inputs[WEIGHTS], weights)
            case RoutingInput.IDS_ALONE:
                placed[self.ids_index] = _like(inputs[self.ids_index], ids)
            case RoutingInput.NONE:
                pass
        return placed


def recognize(
    layer: MoELayer,
    regime: Regime,
    rank: int | None,
    op: str,
    runner: Any,
    inputs: Sequence[Any],
    arguments: Mapping[str, Any],
) -> MoEOp | None:
    """Returns the MoE op of this tuner call if it computes `layer` under `regime`, otherwise None.

    It does if its experts, its top-k and this rank's range of experts are the layer's. The routing depends on no more.
    None of these ops reads the expert-major rows of the layout batched.

    Args:
        layer: the session's layer.
        regime: the session's regime.
        rank: the rank that the op must be of, or None for any rank.
        op: the tuner's name of the op.
        runner: the runner of the call.
        inputs: the inputs of the call.
        arguments: the keyword arguments that the tuner passes on to the runner.
    """
    if regime.layout == "batched":
        return None
    if op in CUTLASS_OPS:
        return _cutlass(layer, regime, rank, op, runner, inputs)
    if _TRTLLM_OP.fullmatch(op):
        found = _Experts(arguments["num_experts"], runner.top_k, runner.num_local_experts, _offset(arguments))
        mode = _routing_input(inputs, arguments)
        backend = "flashinfer-trtllm" if mode is RoutingInput.LOGITS else "flashinfer-trtllm-routed"
        return _if_ours(layer, regime, rank, found, lambda rank: MoEOp(op, backend, mode, rank))
    if type(runner).__name__.startswith("CuteDsl") and hasattr(runner, "local_expert_offset"):
        found = _Experts(runner.num_experts, runner.top_k, runner.num_local_experts, runner.local_expert_offset)
        at = _int32_position(inputs, found.top_k)
        if at is not None:
            ids = RoutingInput.IDS_ALONE
            return _if_ours(layer, regime, rank, found, lambda rank: MoEOp(op, "flashinfer-cutedsl", ids, rank, at))
    return None


@dataclass(frozen=True, slots=True)
class _Experts:
    """What is compared to recognize an op: physical experts, top-k, and the range of local experts."""

    num_slots: int
    top_k: int
    num_local: int
    first: int


def _if_ours(
    layer: MoELayer, regime: Regime, rank: int | None, found: _Experts, make: Callable[[int], MoEOp]
) -> MoEOp | None:
    top_k = regime.row_top_k(layer)
    for shard in _shards(layer, regime, rank):
        if found == _Experts(shard.num_physical, top_k, shard.num_local, shard.first):
            return make(shard.rank)
    return None


def _shards(layer: MoELayer, regime: Regime, rank: int | None) -> list[Shard]:
    try:
        return [regime.shard(layer, r) for r in (range(regime.ep_size) if rank is None else (rank,))]
    except UsageError:
        return []


def _offset(arguments: Mapping[str, Any]) -> int:
    return int(arguments.get("local_expert_offset") or 0)


def _routing_input(inputs: Sequence[Any], arguments: Mapping[str, Any]) -> RoutingInput:
    mode = arguments.get("routing_input_mode")
    if mode is not None:
        return RoutingInput(int(mode))
    # trtllm_fp8_per_channel_scale_moe has no such argument; it takes logits or packed ids
    return RoutingInput.PACKED if inputs[LOGITS] is None else RoutingInput.LOGITS


def _int32_position(inputs: Sequence[Any], top_k: int) -> int | None:
    """Returns the position of the only int32 tensor with k columns, which holds the ids of every CuteDSL runner."""
    import torch

    found = [
        at
        for at, tensor in enumerate(inputs)
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32 and tensor.shape[1:] == (top_k,)
    ]
    return found[0] if len(found) == 1 else None


def _cutlass(
    layer: MoELayer, regime: Regime, rank: int | None, op: str, runner: Any, inputs: Sequence[Any]
) -> MoEOp | None:
    same_shards = (
        inputs[1].shape[0] * runner.ep_size == layer.num_experts + regime.redundant_experts
        and (runner.ep_size, runner.tp_size) == (regime.ep_size, regime.tp_size)
        and runner.top_k == regime.row_top_k(layer)
        and rank in (None, runner.ep_rank)
    )
    if runner.min_latency_mode or not same_shards:
        return None
    options = _cutlass_options(layer, regime, runner, inputs)
    return None if options is None else MoEOp(op, CUTLASS, RoutingInput.NONE, runner.ep_rank, options=options)


def _cutlass_options(
    layer: MoELayer, regime: Regime, runner: Any, inputs: Sequence[Any]
) -> tuple[tuple[str, str], ...] | None:
    """Returns the options with which moetune's backend runs the same kernels on the same sizes; None if none do.

    An fp16 layer is recognized too, so that the backend says that it does not tune it. A runner for mixed input is
    recognized with and without the fused finalize, which its kernels do not have.
    """
    found = {name for name in _SWITCHES if getattr(runner, name, False)}
    dtype = str(runner.weight_dtype).removeprefix("torch.")
    sizes = inputs[0].shape[-1], inputs[1].shape[1] // layer.activation.halves
    inner = regime.intermediate_size(layer)
    if layer.precision is Precision.FP16 and dtype == "float16":
        return () if not found and sizes == (layer.hidden_size, inner) else None
    callers = sorted(OPTIONS["caller"], key=lambda caller: (caller == "vllm") != runner.use_fused_finalize)
    for caller, activations in product(callers, OPTIONS["mxfp4_activations"]):
        options = {"mxfp4_activations": activations, "caller": caller}
        fmt = format_of(layer.precision, **options)
        if (
            fmt is not None
            and (dtype, found, sizes) == (fmt.weights, set(fmt.flags), fmt.padded(layer.hidden_size, inner))
            and (fmt.mixed or fmt.fused_finalize == runner.use_fused_finalize)
        ):
            return tuple((name, value) for name, value in options.items() if value != OPTIONS[name][0])
    return None


def logits_for(layer: MoELayer, routing: Routing, shard: Shard, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns logits `[M, E]` float32 from which the layer's router produces the load of `routing`.

    E counts the physical experts. An id of −1 becomes a non-local expert, which the kernel skips too.

    Args:
        layer: the layer, whose routing method the kernel computes.
        routing: the sampled routing, ids `[M, k]`.
        shard: the experts of this rank.
        bias: the engine's routing bias `[E]`, or None.

    Raises:
        UnsupportedError: a group limit or a large bias keeps the router from this load.
    """
    import torch

    from moetune.workload.router import is_local, route

    ids = routing.topk_ids.long()
    rows, top_k = ids.shape
    slots = torch.arange(shard.num_physical)
    # the ids of the row are preferred, then non-local experts, different ones in each row; other local ones come last
    turn = (slots - torch.arange(rows).unsqueeze(1)) % shard.num_physical
    preference = -1.0 - turn.float() / shard.num_physical
    preference[:, is_local(slots, shard)] = -3.0
    present = torch.where(ids < 0, shard.num_physical, ids)
    padded = torch.nn.functional.pad(preference, (0, 1)).scatter_(1, present, 1.0)[:, :-1]
    chosen = padded.topk(top_k, dim=1).indices
    logits = torch.full((rows, shard.num_physical), -10.0).scatter_(1, chosen, 10.0)

    bias = None if bias is None else bias.detach().float().cpu()
    experts, _ = route(layer.routing, logits, top_k, bias)
    load = torch.bincount(experts.flatten(), minlength=shard.num_physical)[shard.first : shard.first + shard.num_local]
    if not torch.equal(load, routing.load):
        raise UnsupportedError(
            f"No router logits of {layer.name} produce this load: a group limit or a routing bias rules it out.",
            "If the engine can route before the op, let it pass top-k ids.",
        )
    return logits


def _like(placeholder: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns `values` on the device and in the dtype of `placeholder`, which must have their shape."""
    if placeholder.shape != values.shape:
        raise UnsupportedError(
            f"An input of the op has the shape {tuple(placeholder.shape)}, "
            f"but the regime's routing has the shape {tuple(values.shape)}.",
            "Check that the session's layer and regime are the engine's.",
        )
    return values.to(placeholder.device, placeholder.dtype)
