"""Whose grouped GEMM is timed: our own, or the one of an installed vLLM or SGLang.

An engine's kernel is taken from its source file alone: the engine itself is not imported, needs no compiled
extension and none of its dependencies. What stands around the two GEMMs is ours in any case.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import triton
import triton.language as tl

from moetune.backends.grouped_triton.gemm import BuiltinKernel, Gemm, GroupedKernel, Operands, source_digest
from moetune.backends.grouped_triton.space import SCALE_BLOCK, effective_block_size_k, swaps_operands
from moetune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from moetune.backends.grouped_triton.align import Alignment

KernelName = Literal["builtin", "vllm", "sglang"]

_FILES: Mapping[str, tuple[str, ...]] = {
    "vllm": ("model_executor/layers/fused_moe/fused_moe.py",),
    "sglang": (
        "kernels/ops/moe/fused_moe_triton_kernels.py",
        "srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_kernels.py",
        "srt/layers/moe/fused_moe_triton/fused_moe_triton_kernels.py",
    ),
}
"""Below the package's folder, the newest first."""
_KERNEL = "fused_moe_kernel"


def grouped_kernel(name: str) -> GroupedKernel:
    """The kernel of that name.

    Raises:
        UsageError: no such name.
        UnsupportedError: the engine is not installed, or its kernel is not one that we know how to call.
    """
    if name == "builtin":
        return BuiltinKernel()
    if name not in get_args(KernelName):
        raise UsageError(f"Unknown kernel {name!r}.", f"Kernels: {', '.join(get_args(KernelName))}.")
    return EngineKernel(name, _source_file(name))


class EngineKernel:
    """`fused_moe_kernel` of a file of vLLM's or SGLang's.

    Args:
        name: `vllm` or `sglang`.
        path: the file that defines it.

    Raises:
        UnsupportedError: the file defines no such kernel, or one with arguments that are unknown here.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.clamps_k = name == "vllm"
        self._path = path
        self.function = _jit_function(path)
        self._parameters = inspect.signature(self.function.fn).parameters
        unknown = [
            parameter.name
            for parameter in self._parameters.values()
            if parameter.name not in {*_OF_THE_LAUNCH, *_SAME_FOR_ALL} and parameter.default is parameter.empty
        ]
        if unknown:
            raise UnsupportedError(
                f"{_KERNEL} of {path} takes arguments that moetune does not know: {', '.join(unknown)}.",
                "Use --kernel builtin.",
            )

    @property
    def digest(self) -> str:
        """See `GroupedKernel.digest`."""
        return source_digest(str(self._path), __file__)

    def arguments(
        self, gemm: Gemm, operands: Operands, alignment: Alignment, tactic: Mapping[str, object]
    ) -> dict[str, Any]:
        """See `GroupedKernel.arguments`."""
        block_k = effective_block_size_k(tactic, gemm.fp8) if self.clamps_k else tactic["BLOCK_SIZE_K"]
        assert isinstance(block_k, int)
        swap_ab = swaps_operands(tactic, gemm.fp8, gemm.capability)
        scale_depth, scale_columns = (gemm.K // SCALE_BLOCK, gemm.N // SCALE_BLOCK) if gemm.fp8 else (0, 0)
        known = {
            **_SAME_FOR_ALL,
            **tactic,
            "a_ptr": operands.a,
            "b_ptr": operands.w,
            "c_ptr": operands.out,
            "a_scale_ptr": operands.a_scales,
            "b_scale_ptr": operands.w_scales,
            "topk_weights_ptr": operands.slot_weights,
            "sorted_token_ids_ptr": alignment.sorted_slots,
            "expert_ids_ptr": alignment.block_experts,
            "num_tokens_post_padded_ptr": alignment.num_padded_slots,
            "N": gemm.N,
            "K": gemm.K,
            "EM": alignment.max_padded_slots,
            "num_valid_tokens": alignment.num_slots,
            "stride_am": gemm.K,
            "stride_be": gemm.N * gemm.K,
            "stride_bn": gemm.K,
            "stride_cm": gemm.N,
            "stride_asm": scale_depth,
            "stride_ask": int(gemm.fp8),
            "stride_bse": scale_columns * scale_depth,
            "stride_bsk": int(gemm.fp8),
            "stride_bsn": scale_depth,
            "group_n": SCALE_BLOCK if gemm.fp8 else 0,
            "group_k": SCALE_BLOCK if gemm.fp8 else 0,
            "naive_block_assignment": alignment.sorted_slots is None,
            "BLOCK_SIZE_K": block_k,
            "MUL_ROUTED_WEIGHT": gemm.weighted,
            "top_k": gemm.slots_per_row,
            "compute_type": tl.bfloat16,
            "use_fp8_w8a8": gemm.fp8,
            "even_Ks": gemm.K % block_k == 0,
            "filter_expert": gemm.zero_remote,
            "swap_ab": swap_ab,
            "SWAP_AB": swap_ab,
        }
        options = {name: tactic[name] for name in ("num_warps", "num_stages")}
        return {name: known[name] for name in self._parameters if name in known} | options


_OF_THE_LAUNCH = (
    *("a_ptr", "b_ptr", "c_ptr", "a_scale_ptr", "b_scale_ptr", "topk_weights_ptr", "sorted_token_ids_ptr"),
    *("expert_ids_ptr", "num_tokens_post_padded_ptr", "N", "K", "EM", "num_valid_tokens"),
    *("stride_am", "stride_be", "stride_bn", "stride_cm", "stride_asm", "stride_ask"),
    *("stride_bse", "stride_bsk", "stride_bsn", "group_n", "group_k", "naive_block_assignment"),
    *("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "MUL_ROUTED_WEIGHT", "top_k"),
    *("compute_type", "use_fp8_w8a8", "even_Ks", "filter_expert", "swap_ab", "SWAP_AB"),
)
_SAME_FOR_ALL: Mapping[str, Any] = {
    **dict.fromkeys(("a_desc", "b_desc", "bias_ptr", "b_bias_ptr", "add_mask_ptr")),
    **dict.fromkeys(("stride_ak", "stride_bk", "stride_cn", "SPLIT_K", "ROUTER_TOPK"), 1),
    **dict.fromkeys(("stride_bias_e", "stride_bias_n", "stride_bbe", "stride_bbn"), 0),
    **dict.fromkeys(("use_int8_w8a8", "use_int8_w8a16", "per_channel_quant", "HAS_BIAS", "c_sorted"), False),
    **dict.fromkeys(("FUSE_ADD_TO_OUTPUT", "FUSE_SUM_ALL_REDUCE", "MASK_OUTPUT"), False),
}
"""Contiguous tensors, no bias, no other precision, nothing fused, no TMA, no programmatic dependent launch."""


def _source_file(engine: str) -> Path:
    spec = importlib.util.find_spec(engine)
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(
            f"--kernel {engine} needs {engine}, which is not installed.", f"pip install {engine}, or --kernel builtin."
        )
    paths = [Path(root) / name for root in spec.submodule_search_locations for name in _FILES[engine]]
    for path in paths:
        if path.is_file():
            return path
    raise UnsupportedError(
        f"{engine} {_version(engine)} has its grouped GEMM in none of the known places: {', '.join(map(str, paths))}.",
        "Use --kernel builtin.",
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _jit_function(path: Path) -> Any:
    """The kernel and the jitted functions that it may call, executed from the file where they stand."""
    tree = ast.parse(path.read_text(), str(path))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_jitted(node)]
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "torch": torch, "__name__": f"moetune.{path.stem}"}
    exec(compile(tree, str(path), "exec"), namespace)
    if _KERNEL not in namespace:
        raise UnsupportedError(f"{path} defines no {_KERNEL}.", "Use --kernel builtin.")
    return namespace[_KERNEL]


def _is_jitted(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)
