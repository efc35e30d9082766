"""Launches the batched GEMM, with the builtin kernel or with vLLM's own.

vLLM's kernel is taken from its source file alone; the engine itself is not imported.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import triton
import triton.language as tl

from moetune.backends.batched_triton import kernel
from moetune.backends.batched_triton.space import VALUES, Shapes
from moetune.backends.grouped_triton import quantize
from moetune.backends.grouped_triton.space import SCALE_BLOCK
from moetune.errors import UnsupportedError

_FILES: Final = (
    "model_executor/layers/fused_moe/experts/fused_batched_moe.py",
    "model_executor/layers/fused_moe/fused_batched_moe.py",
)
"""Below vLLM's folder, the newest first."""
_KERNEL: Final = "batched_triton_kernel"


@dataclass(frozen=True, slots=True)
class Gemm:
    """Describes one GEMM without its tensors: `out[e, r] = a[e, r] @ w[e].T` for the filled rows r of each expert e."""

    N: int
    K: int
    num_local: int
    capacity: int
    fp8: bool

    @property
    def scale_blocks(self) -> tuple[int, int]:
        """The number of scale blocks along K and along N; (0, 0) in bf16."""
        return (self.K // SCALE_BLOCK, self.N // SCALE_BLOCK) if self.fp8 else (0, 0)


@dataclass(frozen=True, slots=True)
class Operands:
    """Holds the contiguous tensors of one GEMM. If nothing is launched, each is Triton's `MockTensor` of its dtype.

    `a` `[L, capacity, K]`, `w` `[L, N, K]`, `out` `[L, capacity, N]`, `counts` int32 `[L]`; in fp8 also `a_scales` f32
    `[L, capacity, K/128]` and `w_scales` f32 `[L, N/128, K/128]`.
    """

    a: Any
    w: Any
    out: Any
    counts: Any
    a_scales: Any = None
    w_scales: Any = None


def two_gemms(shapes: Shapes) -> tuple[Gemm, Gemm]:
    """Returns the GEMM of gate and up, with N = 2·I, and that of down, with N = H."""
    hidden, intermediate = shapes.hidden_size, shapes.intermediate_size
    rest = (shapes.num_local, shapes.capacity, shapes.fp8)
    return Gemm(2 * intermediate, hidden, *rest), Gemm(hidden, intermediate, *rest)


class BatchedKernel(Protocol):
    """A Triton kernel that computes a `Gemm` and has the three tunables of `space.VALUES`."""

    name: str
    function: Any

    @property
    def digest(self) -> str:
        """A digest of the source of the kernel and of the kernels that run around it: 16 hex digits."""
        ...

    def arguments(self, gemm: Gemm, operands: Operands, tactic: Mapping[str, object]) -> dict[str, Any]:
        """Returns the launch's arguments by name."""
        ...


class BuiltinKernel:
    """The kernel of this package."""

    name = "builtin"
    function = kernel.batched_gemm_kernel

    @property
    def digest(self) -> str:
        """See `BatchedKernel.digest`."""
        return _digest()

    def arguments(self, gemm: Gemm, operands: Operands, tactic: Mapping[str, object]) -> dict[str, Any]:
        """See `BatchedKernel.arguments`."""
        depth, columns = gemm.scale_blocks
        return {
            "a_ptr": operands.a,
            "w_ptr": operands.w,
            "out_ptr": operands.out,
            "counts_ptr": operands.counts,
            "a_scales_ptr": operands.a_scales,
            "w_scales_ptr": operands.w_scales,
            "N": gemm.N,
            "K": gemm.K,
            "stride_ae": gemm.capacity * gemm.K,
            "stride_am": gemm.K,
            "stride_ak": 1,
            "stride_we": gemm.N * gemm.K,
            "stride_wn": gemm.K,
            "stride_wk": 1,
            "stride_oe": gemm.capacity * gemm.N,
            "stride_om": gemm.N,
            "stride_on": 1,
            "stride_ase": gemm.capacity * depth,
            "stride_asm": depth,
            "stride_ask": int(gemm.fp8),
            "stride_wse": columns * depth,
            "stride_wsn": depth,
            "stride_wsk": int(gemm.fp8),
            **{name: tactic[name] for name in VALUES},
            "SCALE_BLOCK": SCALE_BLOCK if gemm.fp8 else 0,
        }


class VllmKernel:
    """`batched_triton_kernel` of an installed vLLM.

    Raises:
        UnsupportedError: vLLM is not installed, or its kernel is not one that moetune knows how to call.
    """

    name = "vllm"

    def __init__(self) -> None:
        self._path = _source_file()
        self.function = _jit_function(self._path)
        self._parameters = inspect.signature(self.function.fn).parameters
        known = self._known(Gemm(1, 1, 1, 1, fp8=False), Operands(None, None, None, None), dict.fromkeys(VALUES, 16))
        required = [name for name, each in self._parameters.items() if each.default is each.empty]
        if unknown := ", ".join(name for name in required if name not in known):
            raise UnsupportedError(
                f"{_KERNEL} of {self._path} takes arguments that moetune does not know: {unknown}.",
                "Use --kernel builtin.",
            )

    @property
    def digest(self) -> str:
        """See `BatchedKernel.digest`."""
        return _digest(self._path)

    def arguments(self, gemm: Gemm, operands: Operands, tactic: Mapping[str, object]) -> dict[str, Any]:
        """See `BatchedKernel.arguments`."""
        known = self._known(gemm, operands, tactic)
        return {name: known[name] for name in self._parameters if name in known}

    def _known(self, gemm: Gemm, operands: Operands, tactic: Mapping[str, object]) -> dict[str, Any]:
        depth, columns = gemm.scale_blocks
        return {
            "a_ptr": operands.a,
            "b_ptr": operands.w,
            "c_ptr": operands.out,
            "expert_num_tokens": operands.counts,
            "compute_type": tl.bfloat16,
            "max_num_tokens": gemm.capacity,
            "K": gemm.K,
            "N": gemm.N,
            "a_scale_ptr": operands.a_scales,
            "b_scale_ptr": operands.w_scales,
            "b_zp_ptr": None,
            "stride_ae": gemm.capacity * gemm.K,
            "stride_am": gemm.K,
            "stride_ak": 1,
            "stride_be": gemm.N * gemm.K,
            "stride_bk": 1,
            "stride_bn": gemm.K,
            "stride_ce": gemm.capacity * gemm.N,
            "stride_cm": gemm.N,
            "stride_cn": 1,
            "stride_ase": gemm.capacity * depth,
            "stride_asm": depth,
            "stride_ask": int(gemm.fp8),
            "stride_bse": columns * depth,
            "stride_bsk": int(gemm.fp8),
            "stride_bsn": depth,
            "group_n": SCALE_BLOCK if gemm.fp8 else 0,
            "group_k": SCALE_BLOCK if gemm.fp8 else 0,
            "use_fp8_w8a8": gemm.fp8,
            "use_int8_w8a16": False,
            "per_act_token_quant": False,
            **{name.replace("_SIZE", ""): tactic[name] for name in VALUES},
            "USE_TD": False,
        }


def batched_kernel(name: str) -> BatchedKernel:
    """Returns the kernel `builtin` or `vllm`.

    Raises:
        UnsupportedError: as `VllmKernel`.
    """
    return BuiltinKernel() if name == "builtin" else VllmKernel()


def launch(batched: BatchedKernel, gemm: Gemm, operands: Operands, tactic: Mapping[str, Any]) -> None:
    """Runs the kernel on the current stream."""
    blocks_m = triton.cdiv(gemm.capacity, tactic["BLOCK_SIZE_M"])
    grid = (gemm.num_local, blocks_m * triton.cdiv(gemm.N, tactic["BLOCK_SIZE_N"]))
    batched.function[grid](**batched.arguments(gemm, operands, tactic))


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in (*paths, Path(kernel.__file__), Path(quantize.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _source_file() -> Path:
    spec = importlib.util.find_spec("vllm")
    roots = (spec.submodule_search_locations or []) if spec else []
    paths = [Path(root) / name for root in roots for name in _FILES]
    if not paths:
        raise UnsupportedError(
            "--kernel vllm needs vllm, which is not installed.", "pip install vllm, or --kernel builtin."
        )
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        places = ", ".join(map(str, paths))
        raise UnsupportedError(f"vLLM has its batched GEMM in none of {places}.", "Use --kernel builtin.")
    return found


def _jit_function(path: Path) -> Any:
    """Returns the kernel, with the jitted functions that it calls, executed from the file where they are."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_jitted(node)]
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": f"moetune.{path.stem}"}
    exec(compile(tree, str(path), "exec"), namespace)
    if _KERNEL not in namespace:
        raise UnsupportedError(f"{path} defines no {_KERNEL}.", "Use --kernel builtin.")
    return namespace[_KERNEL]


def _is_jitted(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)
