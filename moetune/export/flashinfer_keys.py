"""Builds the keys by which FlashInfer's tuner finds a MoE tactic in a cache file, for each version that moetune knows.

A key is `str((op, runner class, nearest profile, extras))` (`ProfilingCacheKey.file_key`). The nearest profile is the
shapes of the op's inputs with the bucket in place of the rows. The runner adds the extras (`get_cache_key_extras`).
Source: FlashInfer's `autotuner`, `fused_moe/core.py`, `fused_moe/backends/trtllm/sm100_runner.py` and
`fused_moe/shared/tuning.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, Final

from moetune.backends.flashinfer_cutlass.formats import FORMATS as CUTLASS_FORMATS
from moetune.backends.flashinfer_cutlass.formats import format_of as cutlass_format
from moetune.backends.flashinfer_trtllm.formats import FORMATS, format_of
from moetune.backends.flashinfer_trtllm.weight_format import Format
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

Shape = tuple[int, ...]
ABSENT: Final[Shape] = (0,)
"""The shape that FlashInfer gives an input that is None."""


class _Dtype(str):
    """Is shown in the `str` of a tuple as a torch dtype is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"torch.{self}"


_CUTLASS_ACTIVATIONS: Final = {
    Activation.SILU: SWIGLU,
    Activation.GELU: GEGLU_TANH,
    Activation.SWIGLU_CLAMPED: SWIGLU,
    Activation.SILU_CLAMPED: SWIGLU,
}
_TRTLLM_ACTIVATIONS: Final = {Activation.SILU: SWIGLU, Activation.SWIGLU_CLAMPED: SWIGLU}


def cutlass_keys(
    version: Version,
    layer: MoELayer,
    regime: Regime,
    rows: int,
    programmatic_launch: bool,
    mxfp4_activations: str = "bf16",
    caller: str = "vllm",
) -> Iterator[tuple[str, str]]:
    """Yields the keys of `cutlass_fused_moe`'s two GEMMs at one bucket, for every rank if the key contains the rank.

    Under an all-to-all each pair is yielded with and without `enable_alltoall`: SGLang sets it and vLLM does not. For
    mixed input it is yielded with and without `use_fused_finalize`: these kernels have no fused finalize, so their
    tactics are the same.

    Args:
        version: FlashInfer's version.
        layer: the whole layer.
        regime: the shards and the dispatch are read from it.
        rows: the bucket.
        programmatic_launch: whether the device launches dependent kernels early (compute capability 9 and above).
        mxfp4_activations: what mxfp4 weights are multiplied with, `bf16` or `fp8`.
        caller: the engine that calls the op, `vllm` or `sglang`.

    Yields:
        The key of GEMM1 and that of GEMM2 in the same call.

    Raises:
        UnsupportedError: the op does not tune this layer.
    """
    fmt = cutlass_format(layer.precision, mxfp4_activations, caller)
    if fmt is None or layer.activation not in _CUTLASS_ACTIVATIONS:
        raise _unsupported("cutlass", layer, CUTLASS_FORMATS, _CUTLASS_ACTIVATIONS)
    hidden, inner = fmt.padded(layer.hidden_size, regime.intermediate_size(layer))
    w1, w2 = (2 * inner, hidden // fmt.packed), (hidden, inner // fmt.packed)
    seen: set[str] = set()
    for ep_rank in range(regime.ep_size):
        experts = regime.shard(layer, ep_rank).num_local
        biases = ((experts, 2 * inner), (experts, hidden)) if layer.expert_bias else (ABSENT, ABSENT)
        shapes = ((rows, hidden), (experts, *w1), biases[0], (experts, *w2), biases[1])
        for tp_rank in range(regime.tp_size):
            alltoalls = (False, True) if regime.dispatch == "alltoall" else (False,)
            for alltoall, finalize in product(alltoalls, (True, False) if fmt.mixed else (fmt.fused_finalize,)):
                ranked = version.cutlass_ranks
                extras = (
                    *(_Dtype(name) for name in (fmt.inputs, fmt.weights, "bfloat16")),
                    regime.row_top_k(layer),
                    *((regime.tp_size, tp_rank, regime.ep_size, ep_rank, 1, 0) if ranked else ()),
                    *(() if ranked else (regime.tp_size, regime.ep_size, 1)),
                    alltoall,
                    False,  # block scales
                    fmt.flags.get("use_w4_group_scaling", False),
                    False,  # mxfp8
                    fmt.flags.get("use_wfp4afp8_humming", False),
                    False,  # min latency
                    programmatic_launch,
                    _CUTLASS_ACTIVATIONS[layer.activation],
                    fmt.flags.get("use_packed_weights", False),
                    finalize,
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
    if layer.precision not in FORMATS or layer.activation not in _TRTLLM_ACTIVATIONS:
        raise _unsupported("trtllm", layer, FORMATS, _TRTLLM_ACTIVATIONS)
    fmt = format_of(layer.precision, mxfp4_activations, fp8_block_layout)
    hidden, k = fmt.aligned(layer.hidden_size), regime.row_top_k(layer)
    ids, empty = (rows, k), (rows,)
    slots = layer.num_experts + regime.redundant_experts
    if routed:
        packed = ids if fmt.ids_in_logits_mode and fmt.one_tuner_op else empty
        routings = [
            (ABSENT, ids, weights) for weights in dict.fromkeys([packed, ids] if fmt.unpacked_ids else [packed])
        ]
    else:
        routings = [((rows, slots), *((ids, ids) if fmt.ids_in_logits_mode else (empty, empty)))]
    outputs = dict.fromkeys([layer.hidden_size, hidden])
    values, block_scales = fmt.activations.shapes(rows, hidden)
    scales: list[Shape] = [block_scales or ABSENT]
    if version.flat_scales and block_scales and not fmt.activations.blocks_first:
        scales.append((-1,))  # engines pass such scales in two dimensions or in one
    shapes = [
        ((rows, width), *routing, values, scale, ABSENT, ABSENT)
        for width in outputs
        for routing in routings
        for scale in scales
    ]
    shards = dict.fromkeys(regime.shard(layer, rank).num_local for rank in range(regime.ep_size))
    extras = [_trtllm_extras(fmt, layer, regime, experts) for experts in shards] if version.trtllm_extras else [()]
    for extra in extras:
        for shape in shapes:
            yield str((fmt.tuner_op(routed), RUNNER, shape, extra))


def _trtllm_extras(fmt: Format, layer: MoELayer, regime: Regime, experts: int) -> tuple[Any, ...]:
    hidden = fmt.aligned(layer.hidden_size)
    return (
        "Module",  # the class of a compiled module
        regime.row_top_k(layer),
        experts,
        layer.num_experts + regime.redundant_experts,
        0,  # shared experts that are fused
        fmt.activations.number,
        fmt.number,
        fmt.fp8_quantization,
        hidden,
        hidden,
        fmt.aligned(regime.intermediate_size(layer)),
        _TRTLLM_ACTIVATIONS[layer.activation],
        fmt.shuffled,
        fmt.layout,
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
