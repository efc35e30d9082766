"""Compiles a tactic's kernels without a launch and without a GPU, so that other processes can do it before it runs.

The real `matmul_ogs` is called with tensors that have shapes and no memory. So Triton gets the arguments of the launch
to come, and keeps the code on disk under the same key.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton

from moetune.backends.grouped_triton.ahead import headless
from moetune.backends.triton_kernels import package
from moetune.backends.triton_kernels.layer import Routed, first_gemm, second_gemm
from moetune.backends.triton_kernels.space import BLOCK_SIZES_M, Flags, gemms
from moetune.backends.triton_kernels.weights import KernelExperts, Mxfp4Matrices
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

_META = torch.device("meta")


class _NotCompiledError(Exception):
    """The compiler refused a kernel.

    Args:
        error: what it raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def compile_gemm(
    layer: MoELayer, regime: Regime, rows: int, flags: Flags, part: int, capability: tuple[int, int]
) -> list[Any]:
    """Compiles what one GEMM launches, into Triton's cache. Returns the kernels.

    An error before the compiler has begun is no error of the tactic. Then nothing is compiled, and the tactic's first
    run compiles or fails.

    Args:
        layer: the layer to compile for.
        regime: the deployment to compile for.
        rows: the row count of the bucket.
        flags: the flags of the GEMM.
        part: 0 for the first GEMM, 1 for the second.
        capability: the device's compute capability, such as (9, 0).

    Raises:
        Exception: whatever Triton or ptxas raises for flags that do not compile.
    """
    first, second = gemms(layer, regime, rows)
    count, top_k = regime.shard(layer).num_local, regime.row_top_k(layer)
    bf16: Any = {"dtype": torch.bfloat16, "device": _META}
    inner = torch.empty(1, rows * top_k, second.K, **bf16)
    try:
        with headless(capability), _described_device(capability), _compiled_only() as kernels:
            experts, routed = _experts(layer, count, first.N, second.K), _routed(rows * top_k, count, top_k)
            if part == 0:
                first_gemm(experts, torch.empty(rows, first.K, **bf16), routed, flags, inner)
            else:
                second_gemm(experts, inner[0], routed, flags, torch.empty(1, rows, second.N, **bf16))
            return kernels
    except _NotCompiledError as refused:
        raise refused.error from None
    except Exception:
        return []


def _experts(layer: MoELayer, count: int, columns: int, inner: int) -> KernelExperts:
    w1 = Mxfp4Matrices.empty(count, columns, layer.hidden_size, _META)
    w2 = Mxfp4Matrices.empty(count, layer.hidden_size, inner, _META)
    bias1, bias2 = (
        torch.empty(count, size, device=_META) if layer.expert_bias else None for size in (columns, layer.hidden_size)
    )
    return KernelExperts(w1, w2, w1.swizzled(), w2.swizzled(), bias1, bias2, torch.empty(0))


def _routed(slots: int, count: int, top_k: int) -> Routed:
    """Returns what `routing_from_bitmatrix` would, with the same views of as few tensors."""
    routing = package.module("routing")
    _, raw, padded, blocks, *_ = routing._compute_expt_data_internal(_int32(count), count, slots)
    by_size = [dict(zip(BLOCK_SIZES_M, each, strict=True)) for each in (padded, blocks)]
    indices = _int32(2 * slots)
    by_expert, places = indices[:slots], indices[slots:]
    histogram = _int32(count)
    data = routing.RoutingData(
        torch.empty(slots, dtype=torch.bfloat16, device=_META),
        histogram,
        count,
        top_k,
        routing.ExptData(histogram, raw, *by_size),
    )
    return data, routing.GatherIndx(by_expert, places), routing.ScatterIndx(places, by_expert)


def _int32(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int32, device=_META)


@contextmanager
def _described_device(capability: tuple[int, int]) -> Iterator[None]:
    """Answers what `matmul_ogs` asks torch of the device. The flags decide all that depends on the numbers."""
    properties = SimpleNamespace(multi_processor_count=1, shared_memory_per_block_optin=1 << 30)
    with (
        _replaced(torch.cuda, "get_device_properties", lambda device=None: properties),
        _replaced(torch.cuda, "get_device_capability", lambda device=None: capability),
    ):
        yield


@contextmanager
def _compiled_only() -> Iterator[list[Any]]:
    """Makes each launch of a kernel compile it only. Yields the list of the kernels."""
    kernels: list[Any] = []
    launch = triton.runtime.jit.JITFunction.run

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        try:
            kernels.append(launch(self, *given, grid=grid, warmup=True, **named))
        except Exception as error:
            raise _NotCompiledError(error) from error
        return kernels[-1]

    with _replaced(triton.runtime.jit.JITFunction, "run", run):
        yield kernels


@contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)
