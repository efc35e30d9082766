"""Lists Humming's tactics, and says why a device cannot run the others.

The configurations are of the three kinds that Humming's own heuristic chooses for 4-bit weights on an H200 (0.1.19), at
the sizes along M that it steps through and with each pipeline that it gives one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Final

from moetune.backends.base import Candidates
from moetune.backends.device import Device
from moetune.backends.humming.config import Config, GemmType
from moetune.backends.humming.gemm import Gemm
from moetune.spec.tactic import Tactic

AUTO: Final = "auto"
"""The configuration that Humming's heuristic chooses for the slots that the engine estimates."""
GEMMS: Final = ("gemm1", "gemm2")
_BOTH: Final = (False, True)
_MMA_SIZES: Final = (8, 16, 32)
_SHARED_SIZES: Final = (8, 16, 32, 64)
_COMPACT_SIZES: Final = (16, 32, 64, 96)
_PRODUCER_SIZES: Final = {
    128: (16, 32, 64, 96),
    256: (8, 16, 24, 32, 48, 64, 80, 96, 128, 160),
    512: (16, 24, 32, 48, 64),
}
"""The sizes along M with a producer, by the block's size along N."""


def configs(gemm_type: GemmType) -> Iterator[Config]:
    """Yields every configuration that is listed for a GEMM."""
    for m, k, blocks, stream_k in product(_MMA_SIZES, (64, 128), (1, 2, 4), _BOTH):
        yield Config("mma", (m, 128, k), (m, 64, 32), 4, blocks, stream_k=stream_k)
    for m, blocks, stream_k in product(_SHARED_SIZES, (1, 2), _BOTH):
        yield Config("wgmma", (m, 256, 128), (m, 64, 64), 4, blocks, stream_k=stream_k)
    for m, n, stream_k in product(_COMPACT_SIZES, (128, 256), _BOTH):
        yield Config("wgmma", (m, n, 64), (m, 32, 64), 6, 2, stream_k=stream_k)
    for n, sizes in _PRODUCER_SIZES.items():
        for m, stream_k, raster in product(sizes, _BOTH, (1, 4) if gemm_type == "grouped_contiguous" else (1,)):
            yield Config("wgmma", (m, n, 64), (m, 32, 64), 4, 1, True, stream_k, raster)


def tactic_of(gemm1: str = AUTO, gemm2: str = AUTO) -> Tactic:
    """Returns a tactic: the configuration of each GEMM, a spelling or `AUTO`."""
    return Tactic(gemm1=gemm1, gemm2=gemm2)


@lru_cache(maxsize=4)
def candidates(both: tuple[Gemm, Gemm], device: Device) -> Candidates:
    """Returns every pair of configurations that the device runs, the default first; the same for all row counts."""
    excluded: dict[Tactic, str] = {}
    legal: list[list[str]] = []
    for name, gemm in zip(GEMMS, both, strict=True):
        reasons = {config: gemm.obstacle(config, device) for config in configs(gemm.type)}
        legal.append([AUTO, *(str(config) for config, reason in reasons.items() if reason is None)])
        excluded |= {Tactic({name: str(config)}): reason for config, reason in reasons.items() if reason is not None}
    return Candidates(tuple(tactic_of(first, second) for first, second in product(*legal)), excluded)
