"""The engines whose look-up of a Triton configuration the plugins answer.

Sources: `TritonExperts.apply` in `experts/triton_moe.py` and `try_get_optimal_moe_config` in `fused_moe.py` of vLLM
0.26.0 and 0.33.0 (0.27 … 0.32 have the same signature and the same calls); `_prepare_fused_moe_run` in
`triton_utils/fused_moe.py` and `fused_moe_triton_config.py` of SGLang 0.5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NAME: Final = "try_get_optimal_moe_config"
"""The engines' look-up."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine whose look-up is answered.

    Attributes:
        name: `vllm` or `sglang`.
        caller: the module that runs the grouped GEMM and has imported the look-up.
        arguments: the names of the look-up's arguments.
    """

    name: str
    caller: str
    arguments: tuple[str, ...]


_SHARED = ("w1_shape", "w2_shape", "top_k", "dtype", "M")
VLLM: Final = Engine("vllm", "vllm.model_executor.layers.fused_moe.experts.triton_moe", (*_SHARED, "block_shape"))
SGLANG: Final = Engine(
    "sglang",
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe",
    (*_SHARED, "is_marlin", "block_shape", "per_channel_quant", "return_down_config"),
)
ENGINES: Final = (VLLM, SGLANG)
