"""Builds the keys by which FlashInfer's tuner finds a MoE tactic in a cache file, for each version that moetune knows.

A key is `str((op, runner class, nearest profile, extras))` (`ProfilingCacheKey.file_key`). The nearest profile is the
shapes of the op's inputs with the bucket in place of the rows. The runner adds the extras (`get_cache_key_extras`).
Source: FlashInfer's `autotuner`, `fused_moe/core.py`, `fused_moe/backends/trtllm/sm100_runner.py` and
`fused_moe/shared/tuning.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from moetune.errors import UnsupportedError
from moetune.inputs.flashinfer_versions import Version
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

RUNNER: Final = "MoERunner"
CUTLASS_GEMMS: Final = ("trtllm::fused_moe::gemm1", "trtllm::fused_moe::gemm2")
SWIGLU: Final = 3
"""`ActivationType.Swiglu`, with or without clamps."""
GEGLU_TANH: Final = 8
"""The number of the tanh GeGLU in `ActivationType`."""
DEEPSEEK_FP8: Final = 1
"""`Fp8QuantizationType.DeepSeekFp8`."""

Shape = tuple[int, ...]
ABSENT: Final[Shape] = (0,)
"""The shape that FlashInfer gives an input that is None."""


class _Dtype(str):
    """Is shown in the `str` of a tuple as a torch dtype is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"torch.{self}"


def _trtllm_dtype(block_format: int, integer: int, bits: int, uid: int) -> int:
    """Returns the number of a signed `DtypeTrtllmGen`."""
    return (block_format << 24) | (1 << 20) | (integer << 16) | (bits << 8) | uid


BF16 = _trtllm_dtype(0, 0, 16, 0)
E4M3 = _trtllm_dtype(0, 0, 8, 5)
E2M1 = _trtllm_dtype(1, 0, 4, 2)
MX_E2M1 = _trtllm_dtype(1, 0, 4, 12)
MX_E4M3 = _trtllm_dtype(1, 0, 8, 13)
MX_INT4 = _trtllm_dtype(1, 1, 4, 14)


@dataclass(frozen=True, slots=True)
class TrtllmOp:
    """Describes one trtllm-gen op of the tuner.

    `logits`, `routed`: the op's name if the kernel routes, and if the engine does. `activation`, `weight`: numbers of
    `DtypeTrtllmGen`. `packed_width`: values in one element of a row. `scale_block`: values that share a scale of the
    activation. `ids_in_logits_mode`: whether the ids' buffers are inputs if the kernel routes. `unpacked`: whether ids
    and weights can be separate tensors. `shuffled`, `weight_layout`: the weights' layout (0 MajorK, 2 BlockMajorK) in
    moetune's backends and in the engines. `multiple_of`: H and I/tp are padded to multiples of it.
    """

    logits: str
    routed: str
    activation: int
    weight: int
    fp8: int = 0
    packed_width: int = 1
    scale_block: int | None = None
    ids_in_logits_mode: bool = False
    unpacked: bool = True
    shuffled: bool = True
    weight_layout: int = 0
    multiple_of: int = 1

    def padded(self, size: int) -> int:
        """Returns H or I/tp, padded as the engines do it for the kernel."""
        return -(-size // self.multiple_of) * self.multiple_of

    def routed_weights(self, ids: Shape, empty: Shape) -> list[Shape]:
        """Returns the possible shapes of the router weights: packed with the ids, or separate."""
        packed = ids if self.ids_in_logits_mode and self.routed == self.logits else empty
        return list(dict.fromkeys([packed, ids] if self.unpacked else [packed]))

    def scales(self, hidden: int, rows: int, flat: bool) -> list[Shape]:
        """Returns the possible shapes of the activation's scales; the one dimension of a flat buffer is −1."""
        if self.scale_block is None:
            return [ABSENT]
        if self.fp8 == DEEPSEEK_FP8:
            return [(hidden // self.scale_block, rows)]
        return [(rows, hidden // self.scale_block), *([(-1,)] if flat else [])]


def _named(name: str, activation: int, weight: int, **more: Any) -> TrtllmOp:
    op = f"flashinfer::trtllm_{name}_moe"
    return TrtllmOp(op, op, activation, weight, **more)


TRTLLM_OPS: Final = {
    Precision.BF16: _named("bf16", BF16, BF16, weight_layout=2),
    Precision.FP8_TENSOR: TrtllmOp(
        "flashinfer::trtllm_fp8_per_tensor_scale_moe",
        "flashinfer::trtllm_fp8_per_tensor_scale_routed_moe",
        E4M3,
        E4M3,
        ids_in_logits_mode=True,
    ),
    Precision.FP8_BLOCK: _named("fp8_block_scale", E4M3, E4M3, fp8=DEEPSEEK_FP8, scale_block=128, weight_layout=2),
    Precision.NVFP4: _named("fp4_block_scale", E2M1, E2M1, packed_width=2, scale_block=16, ids_in_logits_mode=True),
    Precision.MXFP4: _named("fp4_block_scale", BF16, MX_E2M1, ids_in_logits_mode=True, multiple_of=256),
    Precision.MXINT4: _named("mxint4_block_scale", BF16, MX_INT4, unpacked=False, weight_layout=2),
}
"""The op of each precision: mxfp4 with bf16 activations, fp8 blocks in vLLM's layout."""
MXFP4_MXFP8: Final = replace(TRTLLM_OPS[Precision.MXFP4], activation=MX_E4M3, scale_block=32)
FP8_BLOCK_PLAIN: Final = replace(TRTLLM_OPS[Precision.FP8_BLOCK], shuffled=False, weight_layout=0)

_CUTLASS_DTYPES: Final = {Precision.BF16: "bfloat16", Precision.FP8_TENSOR: "float8_e4m3fn"}
_CUTLASS_ACTIVATIONS: Final = {Activation.SILU: SWIGLU, Activation.GELU: GEGLU_TANH}
_TRTLLM_ACTIVATIONS: Final = {Activation.SILU: SWIGLU, Activation.SWIGLU_CLAMPED: SWIGLU}


def cutlass_keys(
    version: Version, layer: MoELayer, regime: Regime, rows: int, programmatic_launch: bool
) -> Iterator[tuple[str, str]]:
    """Yields the keys of `cutlass_fused_moe`'s two GEMMs at one bucket, for every rank if the key contains the rank.

    Under an all-to-all each pair is yielded with and without `enable_alltoall`: SGLang sets it and vLLM does not.

    Args:
        version: FlashInfer's version.
        layer: the whole layer.
        regime: the shards and the dispatch are read from it.
        rows: the bucket.
        programmatic_launch: whether the device launches dependent kernels early (compute capability 9 and above).

    Yields:
        The key of GEMM1 and that of GEMM2 in the same call.

    Raises:
        UnsupportedError: the op does not tune this layer.
    """
    if layer.precision not in _CUTLASS_DTYPES or layer.activation not in _CUTLASS_ACTIVATIONS:
        raise _unsupported("cutlass", layer, _CUTLASS_DTYPES, _CUTLASS_ACTIVATIONS)
    hidden, inner = layer.hidden_size, regime.intermediate_size(layer)
    dtype = _CUTLASS_DTYPES[layer.precision]
    seen: set[str] = set()
    for ep_rank in range(regime.ep_size):
        experts = regime.shard(layer, ep_rank).num_local
        biases = ((experts, 2 * inner), (experts, hidden)) if layer.expert_bias else (ABSENT, ABSENT)
        shapes = ((rows, hidden), (experts, 2 * inner, hidden), biases[0], (experts, hidden, inner), biases[1])
        for tp_rank in range(regime.tp_size):
            for alltoall in (False, True) if regime.dispatch == "alltoall" else (False,):
                ranked = version.cutlass_ranks
                extras = (
                    *(_Dtype(name) for name in (dtype, dtype, "bfloat16")),
                    regime.row_top_k(layer),
                    *((regime.tp_size, tp_rank, regime.ep_size, ep_rank, 1, 0) if ranked else ()),
                    *(() if ranked else (regime.tp_size, regime.ep_size, 1)),
                    alltoall,
                    *(False, False, False, False, False),  # block scales, w4 groups, mxfp8, humming, min latency
                    programmatic_launch,
                    _CUTLASS_ACTIVATIONS[layer.activation],
                    *(False, True),  # packed weights, fused finalize
                )
                first, second = (str((op, RUNNER, shapes, extras)) for op in CUTLASS_GEMMS)
                if first not in seen:
                    seen.add(first)
                    yield first, second


def trtllm_keys(
    version: Version,
    layer: MoELayer,
    regime: Regime,
    rows: int,
    routed: bool,
    mxfp4_activations: str = "bf16",
    fp8_block_layout: str = "blocked",
) -> Iterator[str]:
    """Yields the keys of the trtllm-gen op at one bucket, for each way in which engines pass ids, scales and output.

    Args:
        version: FlashInfer's version.
        layer: the whole layer.
        regime: the shards are read from it.
        rows: the bucket.
        routed: True if the engine routes, False if the kernel does from the logits.
        mxfp4_activations: the activations that mxfp4 weights are multiplied with, `bf16` or `mxfp8`.
        fp8_block_layout: the layout of DeepSeek's e4m3 experts, `blocked` (vLLM) or `plain` (SGLang).

    Raises:
        UnsupportedError: the op does not tune this layer.
    """
    if layer.precision not in TRTLLM_OPS or layer.activation not in _TRTLLM_ACTIVATIONS:
        raise _unsupported("trtllm", layer, TRTLLM_OPS, _TRTLLM_ACTIVATIONS)
    op = _trtllm_op(layer.precision, mxfp4_activations, fp8_block_layout)
    hidden, k = op.padded(layer.hidden_size), regime.row_top_k(layer)
    ids, empty = (rows, k), (rows,)
    slots = layer.num_experts + regime.redundant_experts
    if routed:
        routings = [(ABSENT, ids, weights) for weights in op.routed_weights(ids, empty)]
    else:
        routings = [((rows, slots), *((ids, ids) if op.ids_in_logits_mode else (empty, empty)))]
    outputs = dict.fromkeys([layer.hidden_size, hidden])
    scales = op.scales(hidden, rows, version.flat_scales)
    shapes = [
        ((rows, width), *routing, (rows, hidden // op.packed_width), scale, ABSENT, ABSENT)
        for width in outputs
        for routing in routings
        for scale in scales
    ]
    shards = dict.fromkeys(regime.shard(layer, rank).num_local for rank in range(regime.ep_size))
    extras = [_trtllm_extras(op, layer, regime, experts) for experts in shards] if version.trtllm_extras else [()]
    name = op.routed if routed else op.logits
    for extra in extras:
        for shape in shapes:
            yield str((name, RUNNER, shape, extra))


def _trtllm_op(precision: Precision, mxfp4_activations: str, fp8_block_layout: str) -> TrtllmOp:
    match precision, mxfp4_activations, fp8_block_layout:
        case Precision.MXFP4, "mxfp8", _:
            return MXFP4_MXFP8
        case Precision.FP8_BLOCK, _, "plain":
            return FP8_BLOCK_PLAIN
    return TRTLLM_OPS[precision]


def _trtllm_extras(op: TrtllmOp, layer: MoELayer, regime: Regime, experts: int) -> tuple[Any, ...]:
    hidden = op.padded(layer.hidden_size)
    return (
        "Module",  # the class of a compiled module
        regime.row_top_k(layer),
        experts,
        layer.num_experts + regime.redundant_experts,
        0,  # shared experts that are fused
        op.activation,
        op.weight,
        op.fp8,
        hidden,
        hidden,
        op.padded(regime.intermediate_size(layer)),
        _TRTLLM_ACTIVATIONS[layer.activation],
        op.shuffled,
        op.weight_layout,
        False,  # packed weights
        layer.precision is Precision.FP8_TENSOR and layer.weight_on_input,
    )


def _unsupported(
    kernels: str, layer: MoELayer, precisions: Iterable[Precision], activations: Iterable[Activation]
) -> UnsupportedError:
    return UnsupportedError(
        f"FlashInfer's {kernels} op has no tuned tactics for {layer.precision.value} experts with "
        f"{layer.activation.value}.",
        f"It has them for {', '.join(precisions)}, with {' or '.join(activations)}.",
    )
