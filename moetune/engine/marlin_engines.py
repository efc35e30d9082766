"""The engines whose choice of Marlin's tiles the plugins answer.

Sources: `fused_marlin_moe` in `experts/marlin_moe.py` of vLLM 0.26.0 and 0.33.0, and in
`fused_moe_triton/fused_marlin_moe.py` of SGLang 0.5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NAME: Final = "fused_marlin_moe"
"""The function that chooses the block size, aligns the slots to it and runs both GEMMs."""
OVERRIDE: Final = "VLLM_MARLIN_MOE_BLOCK_SIZE_M"
"""A variable of vLLM #48067, which is not merged: one block size for all rows. If it is set, it wins."""


@dataclass(frozen=True, slots=True)
class MarlinEngine:
    """One engine.

    Attributes:
        name: `vllm` or `sglang`; also whose formula chooses the block size.
        module: the module that defines `fused_marlin_moe`.
        needs: the arguments of `fused_marlin_moe` that are read.
        excludes: arguments whose value must be None, because other kernels run with them.
        align: the module in which `fused_marlin_moe` looks `moe_align_block_size` up.
    """

    name: str
    module: str
    needs: tuple[str, ...]
    excludes: tuple[str, ...]
    align: str


_READ: Final = ("hidden_states", "w1", "w2", "w1_scale", "topk_ids", "w1_zeros", "expert_map")
_VLLM: Final = "vllm.model_executor.layers.fused_moe.experts.marlin_moe"
_SGLANG: Final = "sglang.srt.layers.moe.fused_moe_triton"
VLLM: Final = MarlinEngine("vllm", _VLLM, (*_READ, "quant_type_id", "input_dtype"), ("w1_zeros", "input_dtype"), _VLLM)
SGLANG: Final = MarlinEngine("sglang", f"{_SGLANG}.{NAME}", (*_READ, "num_bits"), ("w1_zeros",), _SGLANG)
ENGINES: Final = (VLLM, SGLANG)
