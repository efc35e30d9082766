"""FlashInfer's own MoE ops on a host without a GPU: its Python code and its real tuner, down to the compiled module.

Tensors lie on the meta device, so real layers cost nothing. `FLASHINFER_VERSION` is the installed one's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

E4M3 = torch.float8_e4m3fn


class LaunchedError(Exception):
    """Ends an op where it would launch a kernel."""


class Module:
    """A compiled module, by the name of its class, which is in the trtllm keys."""

    def __getattr__(self, name: str) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            if name == "init":
                return Module()
            if name == "get_gemm1_tactic_count" or name == "get_gemm2_tactic_count":
                return 45 if "1" in name else 81
            if name == "set_deepgemm_jit_include_dirs":
                return None
            raise LaunchedError(name)

        return function


class Spec:
    """What FlashInfer builds a module from."""

    def build_and_load(self) -> Module:
        return Module()

    def get_library_path(self) -> str:
        return "none"

    def get_library_paths(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Chosen:
    """One answer of the tuner: `tactic` is −1 for a miss; `key` is what it was looked up by."""

    op: str
    key: str
    tactic: Any


@contextlib.contextmanager
def flashinfer(device: str = "NVIDIA H200", cuda: str = "13.0") -> Iterator[Any]:
    """FlashInfer's `fused_moe.core`, with a fresh tuner, on a device of this name."""
    from flashinfer.autotuner import AutoTuner
    from flashinfer.fused_moe import core

    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(core, "gen_cutlass_fused_moe_sm90_module", lambda *_: Spec())
        patch(core, "gen_trtllm_gen_fused_moe_sm100_module", lambda **_: Spec())
        patch(core, "get_compute_capability", lambda *_: (10, 0))
        patch(core, "setup_cubin_loader", lambda *_: None)
        patch(core, "get_trtllm_moe_sm100_module", lambda: core._get_trtllm_moe_sm100_module_impl(False))
        patch(torch.cuda, "current_device", lambda: 0)
        patch(torch.cuda, "get_device_name", lambda *_: device)
        patch(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch(torch.version, "cuda", cuda)
        patch(AutoTuner, "_instance", AutoTuner())
        yield core
        core.get_cutlass_fused_moe_module.cache_clear()
        core._get_trtllm_moe_sm100_module_impl.cache_clear()


def chosen(function: Any, *args: Any, **kwargs: Any) -> list[Chosen]:
    """What the real tuner answers in one call of an op."""
    from flashinfer.autotuner import AutoTuner

    answers: list[Chosen] = []
    real = AutoTuner.choose_one

    def spy(self: Any, op: str, runners: Any, config: Any, inputs: Any, **more: Any) -> Any:
        answer = real(self, op, runners, config, inputs, **more)
        shapes = tuple(self._get_input_sizes(inputs))
        extras = runners[0].get_cache_key_extras(inputs)
        key = AutoTuner._get_cache_key(op, runners[0], shapes, config, extras)
        answers.append(Chosen(op, key.file_key, answer[1]))
        return answer

    with mock.patch.object(AutoTuner, "choose_one", spy), contextlib.suppress(LaunchedError):
        function(*args, **kwargs)
    return answers


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cutlass(
    core: Any,
    rows: int,
    *,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    fp8: bool = False,
    four_bits: bool = False,
    bias: bool = False,
    **more: Any,
) -> list[Chosen]:
    """`cutlass_fused_moe` as engines call it. Weights of four bits lie two in a byte."""
    dtype = E4M3 if fp8 else torch.bfloat16
    stored, packed = (torch.uint8, 2) if four_bits else (dtype, 1)
    return chosen(
        core.get_cutlass_fused_moe_module("90").cutlass_fused_moe,
        empty(rows, hidden),
        empty(rows, hidden, dtype=dtype),
        empty(rows, top_k, dtype=torch.int32),
        empty(rows, top_k, dtype=torch.float32),
        empty(experts, 2 * inner, hidden // packed, dtype=stored),
        empty(experts, 2 * inner) if bias else None,
        empty(experts, hidden, inner // packed, dtype=stored),
        empty(experts, hidden) if bias else None,
        torch.bfloat16,
        [],
        **{"enable_pdl": True, "min_latency_mode": False, **more},
    )


def trtllm(
    core: Any,
    op: str,
    rows: int,
    *,
    hidden: int,
    inner: int,
    experts: int,
    local: int,
    top_k: int,
    mode: str,
    activations: str = "",
    flat: bool = False,
) -> list[Chosen]:
    """A public trtllm-gen op as engines call it; `mode`: `logits`, `packed`, `unpacked`."""
    from flashinfer.tllm_enums import Fp8QuantizationType

    common = {
        "num_experts": experts,
        "top_k": top_k,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": inner,
        "local_expert_offset": 0,
        "local_num_experts": local,
        "routed_scaling_factor": None,
        "routing_method_type": 1,
        "enable_pdl": True,
    }
    ids = empty(rows, top_k, dtype=torch.int32)
    routing: dict[str, Any] = {
        "logits": {"routing_logits": empty(rows, experts), "routing_bias": None},
        "packed": {"topk_ids": ids},
        "unpacked": {"topk_ids": (ids, empty(rows, top_k))},
    }[mode]
    name = f"trtllm_{op}_moe" if mode == "logits" else f"trtllm_{op}_routed_moe"
    f32 = torch.float32
    if op == "bf16":
        weights = {
            "hidden_states": empty(rows, hidden),
            "gemm1_weights": empty(local, hidden // 64, 2 * inner, 64),
            "gemm2_weights": empty(local, inner // 64, hidden, 64),
        }
    elif op == "fp8_block_scale":
        weights = {
            "hidden_states": empty(rows, hidden, dtype=E4M3),
            "hidden_states_scale": empty(hidden // 128, rows, dtype=f32),
            "gemm1_weights": empty(local, 2 * inner, hidden, dtype=E4M3),
            "gemm1_weights_scale": empty(local, 2 * inner // 128, hidden // 128, dtype=f32),
            "gemm2_weights": empty(local, hidden, inner, dtype=E4M3),
            "gemm2_weights_scale": empty(local, hidden // 128, inner // 128, dtype=f32),
            "fp8_quantization_type": Fp8QuantizationType.DeepSeekFp8,
            "use_shuffled_weight": True,
            "weight_layout": 2,
        }
        if mode != "logits":
            routing = {**routing, "routing_bias": None}
    elif op == "fp8_per_tensor_scale":
        weights = {
            "hidden_states": empty(rows, hidden, dtype=E4M3),
            "gemm1_weights": empty(local, 2 * inner, hidden, dtype=E4M3),
            "output1_scales_scalar": empty(local, dtype=f32),
            "output1_scales_gate_scalar": empty(local, dtype=f32),
            "gemm2_weights": empty(local, hidden, inner, dtype=E4M3),
            "output2_scales_scalar": empty(local, dtype=f32),
            "use_routing_scales_on_input": False,
        }
        if mode != "logits":
            routing = {**routing, "routing_bias": None}
    elif op == "fp4_block_scale":
        mx = activations != "nvfp4"
        block = 32 if mx else 16
        weights = {
            "hidden_states": {
                "bf16": empty(rows, hidden),
                "mxfp8": empty(rows, hidden, dtype=E4M3),
                "nvfp4": empty(rows, hidden // 2, dtype=torch.uint8),
            }[activations],
            "hidden_states_scale": None
            if activations == "bf16"
            else empty(*((rows * hidden // block,) if flat else (rows, hidden // block)), dtype=E4M3),
            "gemm1_weights": empty(local, 2 * inner, hidden // 2, dtype=torch.uint8),
            "gemm1_weights_scale": empty(local, 2 * inner, hidden // block, dtype=E4M3),
            "gemm2_weights": empty(local, hidden, inner // 2, dtype=torch.uint8),
            "gemm2_weights_scale": empty(local, hidden, inner // block, dtype=E4M3),
            **dict.fromkeys(("gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias")),
            **dict.fromkeys(("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")),
        }
        routing = {"routing_bias": None, **routing}
    else:
        assert op == "mxint4_block_scale"
        weights = {
            "hidden_states": empty(rows, hidden),
            "gemm1_weights": empty(local, hidden // 128, 2 * inner, 64, dtype=torch.uint8),
            "gemm1_weights_scale": empty(local, hidden // 32, 2 * inner),
            "gemm2_weights": empty(local, inner // 128, hidden, 64, dtype=torch.uint8),
            "gemm2_weights_scale": empty(local, inner // 32, hidden),
            **dict.fromkeys(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")),
        }
    return chosen(getattr(core, name), **routing, **weights, **common)


SHAPE = {"hidden": 2048, "inner": 768, "experts": 128, "local": 16, "top_k": 8}
"""One rank of qwen3-30b-a3b at EP8."""
TRTLLM = {
    "bf16": ("bf16", ""),
    "fp8_block": ("fp8_block_scale", ""),
    "fp8_tensor": ("fp8_per_tensor_scale", ""),
    "nvfp4": ("fp4_block_scale", "nvfp4"),
    "mxfp4": ("fp4_block_scale", "bf16"),
    "mxfp4-mxfp8": ("fp4_block_scale", "mxfp8"),
    "mxint4": ("mxint4_block_scale", ""),
}


def recorded(core: Any, flat_scales: bool = True) -> dict[str, list[str]]:
    """The keys by which each op looks 300 rows up, whichever way it is called, sorted.

    `flat_scales`: whether activation scales may be one-dimensional, from 0.7.0 on.
    """
    shape = {name: SHAPE[name] for name in ("hidden", "top_k")}
    found = {
        f"cutlass {name}": [
            answer
            for ep_rank in range(8 // tp_size)
            for tp_rank in range(tp_size)
            for alltoall in alltoalls
            for answer in cutlass(
                core,
                300,
                **shape,
                inner=768 // tp_size,
                experts=16 * tp_size,
                fp8=fp8,
                tp_size=tp_size,
                tp_rank=tp_rank,
                ep_size=8 // tp_size,
                ep_rank=ep_rank,
                cluster_size=1,
                cluster_rank=0,
                enable_alltoall=alltoall,
            )
        ]
        for name, tp_size, fp8, alltoalls in (
            ("bf16 ep8", 1, False, (False,)),
            ("fp8_tensor ep8 alltoall", 1, True, (False, True)),
            ("bf16 ep4 tp2", 2, False, (False,)),
        )
    }
    for name, (op, activations) in TRTLLM.items():
        flats = (False, True) if flat_scales and activations in ("nvfp4", "mxfp8") else (False,)
        for kind, modes in (("logits", ("logits",)), ("routed", ("packed", "unpacked"))):
            found[f"trtllm {name} {kind}"] = [
                answer
                for mode in modes
                if not (op.startswith("mxint4") and mode == "unpacked")
                for flat in flats
                for answer in trtllm(core, op, 300, **SHAPE, mode=mode, activations=activations, flat=flat)
            ]
    return {name: sorted({answer.key for answer in answers}) for name, answers in found.items()}
