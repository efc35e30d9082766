"""Says which MoE kernels each engine runs on Hopper (compute capability 9.0) if nothing selects them.

`docs/kernels.md` is made of this table. Sources: vLLM 0.33.0, `fused_moe/oracle/*.py` for the order and
`fused_moe/experts/*.py` for what each kernel supports, `quantization/utils/humming/priority.py`; SGLang 0.5.23,
`create_moe_runner` of `layers/quantization/*.py` and `arg_groups/overrides.py`; TensorRT-LLM main of October 2026,
`_torch/moe/fused_moe/moe_resolution.py`, and `examples/models/core/gpt_oss/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer
from moetune.spec.regime import Regime

_WIDE: Final = frozenset({Precision.BF16, Precision.FP16, Precision.FP32})
_SIXTEEN: Final = frozenset({Precision.BF16, Precision.FP16})
_INT4: Final = frozenset({Precision.MXINT4, Precision.INT4_G128, Precision.GPTQ_INT4, Precision.AWQ_INT4})
_NVFP4: Final = frozenset({Precision.NVFP4, Precision.NVFP4_A16})
_FOUR_BITS: Final = _INT4 | _NVFP4 | {Precision.MXFP4, Precision.MXFP8, Precision.GPTQ_INT8}
"""The precisions that vLLM runs with Humming or Marlin; MXFP8 and GPTQ's int8 too."""
_STANDARD: Final = frozenset({"none", "allgather", "deduplicated"})
"""The loads whose rows come with their ids, without those of a pool."""


@dataclass(frozen=True, slots=True)
class HopperKernel:
    """The kernels of one row of the table.

    Attributes:
        name: what runs; empty if the engine has no kernel for it.
        backend: the backend of moetune that tunes them, or the rival that times them; None if there is none.
    """

    name: str
    backend: str | None = None


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which kernels run for an engine, some precisions and some loads. The first rule that fits holds.

    Attributes:
        loads: `Regime.layout`, or the dispatch if there is none; None: any.
        gpt_oss: whether the activation is gpt-oss's; None: either.
        ep: whether experts are shared by ranks; None: either.
    """

    engine: str
    precisions: frozenset[Precision]
    kernel: HopperKernel
    loads: frozenset[str] | None = None
    gpt_oss: bool | None = None
    ep: bool | None = None


_TRITON: Final = HopperKernel("Triton", "triton")
_BATCHED: Final = HopperKernel("batched Triton", "batched-triton")
_CUTLASS: Final = HopperKernel("FlashInfer's CUTLASS kernels", "flashinfer-cutlass")
_OPENAI: Final = HopperKernel("OpenAI's triton_kernels", "triton-kernels")
_OPENAI_NEWER: Final = HopperKernel("OpenAI's triton_kernels")
"""SGLang's is that of Triton 3.8, whose function is `matmul`. moetune tunes the older one, which vLLM has."""
_NAMED: Final = HopperKernel("FlashInfer's CUTLASS kernels, which the line has to select", "flashinfer-cutlass")
"""SGLang's dispatcher `flashinfer` refuses to start if the line selects no kernels."""
_HUMMING: Final = HopperKernel("Humming; Marlin if Humming is not installed", "humming")
_HUMMING_OF_POOL: Final = HopperKernel(_HUMMING.name)
"""moetune tunes Humming for rows without those of a pool that have no expert."""
_BATCHED_MARLIN: Final = HopperKernel("batched Marlin; Humming if VLLM_HUMMING_MOE_GEMM_TYPE is grouped_masked")
"""`get_humming_moe_gemm_type` prefers `grouped_contiguous` under EP, so the batched class is none that is supported."""
_DEEPGEMM: Final = HopperKernel("DeepGEMM")
_FP8_BLOCKS: Final = HopperKernel("FlashInfer's CUTLASS kernel for fp8 blocks", "flashinfer-fp8-block")
_MASKED: Final = HopperKernel("DeepGEMM's masked kernels; batched Triton without it", "batched-deep-gemm")
_BLOCK: Final = frozenset({Precision.FP8_BLOCK})
_TENSOR: Final = frozenset({Precision.FP8_TENSOR})
_CHANNEL: Final = frozenset({Precision.FP8_CHANNEL})
_MXFP4: Final = frozenset({Precision.MXFP4})
_RULES: Final = (
    _Rule("vllm", _SIXTEEN, _CUTLASS, frozenset({"pool"})),
    _Rule("vllm", _WIDE, _TRITON, _STANDARD),
    _Rule("vllm", _WIDE, _BATCHED, frozenset({"batched"})),
    _Rule("vllm", _BLOCK, _MASKED, frozenset({"batched"})),
    _Rule("vllm", _BLOCK, _FP8_BLOCKS, frozenset({"pool"})),
    _Rule("vllm", _BLOCK, _FP8_BLOCKS, _STANDARD, ep=True),
    _Rule("vllm", _BLOCK, _TRITON, _STANDARD, ep=False),
    _Rule("vllm", _TENSOR, HopperKernel("vLLM's batched CUTLASS kernels, or batched Triton"), frozenset({"batched"})),
    _Rule("vllm", _TENSOR, _CUTLASS, frozenset({"pool"})),
    _Rule(
        "vllm",
        _TENSOR,
        HopperKernel("FlashInfer's CUTLASS kernels with static activation scales, else vLLM's", "flashinfer-cutlass"),
    ),
    _Rule("vllm", _CHANNEL, HopperKernel("vLLM's batched CUTLASS kernels"), frozenset({"batched"})),
    _Rule("vllm", _CHANNEL, HopperKernel("Triton"), frozenset({"deduplicated"})),
    _Rule("vllm", _CHANNEL, HopperKernel("vLLM's CUTLASS kernels", "vllm-cutlass"), frozenset({"none", "allgather"})),
    _Rule("vllm", _MXFP4, _OPENAI, _STANDARD, gpt_oss=True),
    _Rule("vllm", _MXFP4, _CUTLASS, frozenset({"pool"}), gpt_oss=True),
    _Rule("vllm", _FOUR_BITS, _BATCHED_MARLIN, frozenset({"batched"})),
    _Rule("vllm", _FOUR_BITS, _HUMMING_OF_POOL, frozenset({"pool"})),
    _Rule("vllm", _FOUR_BITS, _HUMMING),
    _Rule("sglang", _SIXTEEN, _NAMED, frozenset({"pool"})),
    _Rule("sglang", _WIDE | _BLOCK | _TENSOR, _TRITON, _STANDARD),
    _Rule("sglang", _INT4 | _NVFP4, HopperKernel("Marlin", "marlin"), _STANDARD),
    _Rule("sglang", _MXFP4, _OPENAI_NEWER, _STANDARD, gpt_oss=True, ep=False),
    _Rule("sglang", _MXFP4, HopperKernel("Triton, on weights expanded to bf16"), _STANDARD, gpt_oss=True, ep=True),
    _Rule("sglang", _MXFP4, _CUTLASS, _STANDARD, gpt_oss=False),
    _Rule("sglang", frozenset({Precision.W4A8}), HopperKernel("SGLang's CUTLASS kernel for w4a8"), _STANDARD),
    _Rule("sglang", frozenset({Precision.MXFP8}), HopperKernel("")),
    _Rule("trtllm", _MXFP4, HopperKernel("TensorRT-LLM's CUTLASS kernels, or OpenAI's triton_kernels"), gpt_oss=True),
    _Rule("trtllm", _WIDE | _BLOCK | _TENSOR, HopperKernel("TensorRT-LLM's CUTLASS kernels")),
)


def on_hopper(engine: str, layer: MoELayer, regime: Regime) -> HopperKernel | None:
    """Returns the kernels that an engine runs on Hopper for a layer if nothing selects them.

    Args:
        engine: `vllm`, `sglang` or `trtllm`.
        layer: the layer. Its precision decides, and whether its activation is gpt-oss's.
        regime: the deployment. Its layout decides, and whether ranks share the experts.

    Returns:
        None if moetune's authors have not looked.
    """
    load = regime.layout or regime.dispatch
    gpt_oss = layer.activation is Activation.SWIGLU_CLAMPED
    for rule in _RULES:
        fits = rule.engine == engine and layer.precision in rule.precisions
        if (
            fits
            and (rule.loads is None or load in rule.loads)
            and rule.gpt_oss in (None, gpt_oss)
            and rule.ep in (None, regime.ep_size > 1)
        ):
            return rule.kernel
    return None
