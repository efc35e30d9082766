"""`Gemm`: one grouped GEMM of a rank with 4-bit weights, and why Humming cannot run it with a configuration.

Source: Humming 0.1.19, `kernel/humming.py` (`check_shape`, `check_scale`, `check_config`), `config/mma.py`
(`get_register_budget_error`, `get_warp_spec_registers`), `utils/smem.py` (`estimate_smem_size_layer`) and
`tune/candidate.py` (`analyze_candidate`), for bf16 activations and weights without zero points. The checks are repeated
here, so that no configuration is compiled in vain, and so that tactics can be listed without Humming.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moetune.backends.device import Device
from moetune.backends.humming.config import Config, GemmType
from moetune.backends.marlin.formats import FORMATS, Format
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

PADDED_N: Final = 256
PADDED_K: Final = 128
"""vLLM pads N and K to multiples of these (`_prepare_and_transform_sublayer`)."""
_SCALE_BITS: Final = {"bf16": 16, "e8m0": 8, "e4m3": 8}
_MOST_THREADS: Final = 1024
_THREADS_PER_SM: Final = 2048
_LEAST_REGISTERS: Final = 56
_PAGE: Final = 1024
"""Stages, and all shared memory of a block, are rounded up to this many bytes."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """One GEMM of all local experts.

    Attributes:
        columns: N as in the layer.
        depth: K as in the layer.
        num_experts: L, the experts of the rank.
        format: how weights are stored.
        bias: whether an expert has a bias.
        type: how the kernel finds an expert's rows.
    """

    columns: int
    depth: int
    num_experts: int
    format: Format
    bias: bool
    type: GemmType

    @property
    def padded_columns(self) -> int:
        """N of the kernel."""
        return -(-self.columns // PADDED_N) * PADDED_N

    @property
    def padded_depth(self) -> int:
        """K of the kernel."""
        return -(-self.depth // PADDED_K) * PADDED_K

    def obstacle(self, config: Config, device: Device) -> str | None:
        """Returns why Humming refuses a configuration, or a device cannot run it as it is; else None."""
        return (
            self._obstacle_of_shape(config)
            or _obstacle_of_registers(config, device.registers)
            or self._obstacle_of_memory(config, device.shared_bytes)
        )

    def _obstacle_of_shape(self, config: Config) -> str | None:
        block_n, block_k = config.block[1:]
        for name, size, block in (("N", self.padded_columns, block_n), ("K", self.padded_depth, block_k)):
            if size % block:
                return f"{name} = {size} is not divisible by the block's {block}"
        if self.format.group % block_k and block_k % self.format.group:
            return f"block K = {block_k} and the groups of {self.format.group} do not nest"
        return _obstacle_of_warps(config) or (_obstacle_of_wgmma(config) if config.mma == "wgmma" else None)

    def _obstacle_of_memory(self, config: Config, shared_bytes: int) -> str | None:
        needed = self.shared_bytes(config)
        if needed > shared_bytes:
            return f"needs {needed} bytes of shared memory a block, has {shared_bytes}"
        most = min(shared_bytes // needed, _THREADS_PER_SM // config.threads)
        if most < config.blocks_per_sm:
            return f"{config.blocks_per_sm} blocks do not fit on a multiprocessor, {most} do"
        return None

    def shared_bytes(self, config: Config) -> int:
        """Returns the shared memory of a block in bytes."""
        (block_m, block_n, block_k), (warp_m, _, warp_k) = config.block, config.warp
        scales = -(-block_k // self.format.group) * block_n * _SCALE_BITS[self.format.scale] // 8
        stage = _up(_up(_up(block_m * block_k * 2, 128) + block_n * block_k // 2, 128) + scales, _PAGE)
        parts = block_k // warp_k
        summed = 0
        if parts > 1:
            buffers = parts - 1 if parts <= 4 else parts // 2
            summed = block_m // warp_m * 16 * block_n * 32 // 128 * buffers
        output = 16 * max(summed, block_m * block_n // 8)
        kept = stage * config.stages if config.overlaps else 0
        total = (_up(block_n * 2, _PAGE) if self.bias else 0) + _up(max(stage * config.stages, kept + output), _PAGE)
        if self.type == "indexed":
            total += block_m * 4 * (4 if config.producer else 2)
        else:
            total = _up(total, 64) + 128 + self.num_experts * 4
            total += (self.num_experts + 1) * 4 if config.raster > 1 else 0
            total += 4 + (self.num_experts + 1) * 4
        if config.producer:
            total = _up(_up(total, 128) + (config.stages + 2) * 8, 8) + (config.stages + 1) * 8
        return _up(total, _PAGE)


def _obstacle_of_warps(config: Config) -> str | None:
    if any(block % warp for block, warp in zip(config.block, config.warp, strict=True)):
        return "the block is not divisible by the warp"
    warp_m, warp_n, warp_k = config.warp
    along_m = config.block[0] // warp_m
    if not all(_is_power_of_two(size) for size in (*config.block[1:], warp_n, warp_k, along_m)):
        return "the block's N and K, the warp's N and K and the warps along M have to be powers of two"
    if config.block[0] > 256 or warp_m % 8 or not 32 <= warp_n <= 64 or warp_k < 32:
        return "needs block M ≤ 256, warp M in multiples of 8, warp N of 32 or 64, warp K of at least 32"
    if config.threads > _MOST_THREADS:
        return f"needs {config.threads} threads, a block has at most {_MOST_THREADS}"
    if config.producer and config.math_warps % 4:
        return f"a producer needs a multiple of 4 other warps, has {config.math_warps}"
    return None


def _obstacle_of_wgmma(config: Config) -> str | None:
    along_n, most = config.block[1] // config.warp[1], min(64, config.block[2])
    if along_n % 4:
        return f"wgmma needs a multiple of 4 warps along N, has {along_n}"
    if config.warp[2] > most:
        return f"wgmma takes a warp K of at most {most}, has {config.warp[2]}"
    if config.stages < 3:
        return f"wgmma needs at least 3 stages, has {config.stages}"
    return None


def _obstacle_of_registers(config: Config, registers: int) -> str | None:
    each = registers // (config.threads * config.blocks_per_sm) // 8 * 8
    if each < _LEAST_REGISTERS:
        return f"leaves a thread {each} registers, needs {_LEAST_REGISTERS}"
    warp_m, warp_n, _ = config.warp
    if config.mma == "wgmma" and warp_m // 2 + 32 > each:
        return f"wgmma needs {warp_m // 2 + 32} registers a thread, has {each}"
    own = min(255, each)
    if config.producer:
        math_threads = 32 * config.math_warps
        loading = 40 if math_threads > 256 else 24
        own = min(248, (each * config.threads - 128 * loading) // math_threads // 8 * 8)
        if loading > each or own < max(loading, _LEAST_REGISTERS):
            return f"leaves a thread that multiplies {own} registers, needs {max(loading, _LEAST_REGISTERS)}"
    if config.mma == "mma":
        needed = warp_m * warp_n / 32 + (warp_m + warp_n) / 4
        if needed >= own - 8:
            return f"needs {needed:g} registers a thread for the sums, has fewer than {own - 8}"
    return None


def _is_power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def gemm_type(regime: Regime) -> GemmType:
    """Returns how vLLM 0.33 runs Humming if VLLM_HUMMING_MOE_GEMM_TYPE is not set: grouped if ranks share the experts.

    Source: `get_humming_moe_gemm_type` in `experts/fused_humming_moe.py`.
    """
    return "grouped_contiguous" if regime.ep_size > 1 else "indexed"


def gemms(layer: MoELayer, regime: Regime) -> tuple[Gemm, Gemm]:
    """Returns both GEMMs of a rank: N = 2·I/tp and K = H, then N = H and K = I/tp."""
    inner, count = regime.intermediate_size(layer), regime.shard(layer).num_local
    rest = (count, FORMATS[layer.precision], layer.expert_bias, gemm_type(regime))
    return (
        Gemm(layer.activation.halves * inner, layer.hidden_size, *rest),
        Gemm(layer.hidden_size, inner, *rest),
    )
