"""Computes what triton_kernels chooses without constraints of moetune."""

from __future__ import annotations

from moetune.backends.triton_kernels.space import BLOCK_SIZES_M, Flags

_BLOCK_K = 128
_STAGES = 4


def engine_flags(slots: int, num_local: int) -> Flags:
    """Returns the flags of a GEMM with mxfp4 weights on Hopper, as vLLM 0.26 … 0.33 runs it.

    block_m is the mean number of slots of an expert, rounded up to a power of two from 16 to 128. All slots of all rows
    are divided by the local experts, also if most slots are of other ranks: under all-gather the mean is too large by
    the number of ranks. block_k is 128. num_stages is 4, because four stages of the largest tile fit into the shared
    memory. split_k is 1, which vLLM sets on Hopper (#30528).

    Source: `make_default_opt_flags_nvidia` in `matmul_ogs_details/opt_flags.py` of triton_kernels of Triton 3.5.1.

    Args:
        slots: M·k, the ids of all rows.
        num_local: L, the experts of the rank.
    """
    mean = slots // num_local
    block_m = next((size for size in BLOCK_SIZES_M if mean <= size), BLOCK_SIZES_M[-1])
    return Flags(block_m, _BLOCK_K, _STAGES, 1)
