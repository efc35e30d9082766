"""SGLang's Triton MoE module, packed out of its wheel and loaded without the rest of the engine.

The files of `PARTS` run as they are in the wheel. Where they import other parts of SGLang, they get stand-ins with the
values of a server that has default settings. The compiled ops that a bf16 layer calls are replaced; see `REPLACED`.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import torch
import triton
import triton.language as tl

from moetune.backends.grouped_triton import align

MODULE: Final = "sglang/srt/layers/moe/moe_runner/triton_utils"
CONFIGS: Final = f"{MODULE}/configs"
"""The files that SGLang ships."""
PARTS: Final = (
    f"{MODULE}/__init__.py",
    f"{MODULE}/fused_moe.py",
    f"{MODULE}/fused_moe_triton_config.py",
    f"{MODULE}/moe_align_block_size.py",
    "sglang/srt/layers/moe/moe_runner/base.py",
    "sglang/kernels/ops/moe/fused_moe_triton_kernels.py",
    "sglang/kernels/ops/moe/moe_align_small_numel.py",
)
REPLACED: Final = (
    "`silu_and_mul` (compiled at run time by nvcc): SGLang's Triton kernel `act_and_mul_triton`; a kernel of this "
    "benchmark after a first GEMM whose output is sorted by expert (files with `USE_TMA`)",
    "`sgl_kernel.moe_sum_reduce`: SGLang's Triton kernel `moe_sum_reduce_triton`, which it runs itself up to 32 rows",
    "`sgl_kernel.moe_align_block_size`: moetune's Triton kernels; SGLang's own Triton kernel still runs for up to 64 "
    "slots if there are more than 63 experts",
)
"""What runs instead of each compiled op, in all arms alike."""
_PACKAGES: Final = (
    "sglang",
    "sglang.kernels",
    "sglang.kernels.jit",
    "sglang.kernels.ops",
    "sglang.kernels.ops.activation",
    "sglang.kernels.ops.moe",
    "sglang.kernels.ops.quantization",
    "sglang.srt",
    "sglang.srt.distributed",
    "sglang.srt.distributed.device_communicators",
    "sglang.srt.layers",
    "sglang.srt.layers.moe",
    "sglang.srt.layers.moe.moe_runner",
)
"""Packages whose own `__init__.py` would import the engine."""


@dataclass(frozen=True)
class Module:
    """The loaded module.

    Attributes:
        folder: the folder that has the package.
        fused_experts: the function that SGLang's layer calls for `--moe-runner-backend triton`.
        runner_config: the class of its settings.
        config: the module that looks the files up.
    """

    folder: Path
    fused_experts: Callable[..., torch.Tensor]
    runner_config: Callable[..., Any]
    config: Any

    @property
    def shipped(self) -> Path:
        """The folder that has SGLang's own `configs`."""
        return self.folder / MODULE


def pack(wheel: Path, folder: Path) -> int:
    """Unpacks what the benchmark needs of SGLang's wheel into a folder. Returns its size in bytes.

    Raises:
        SystemExit: the wheel lacks a file.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if missing := [part for part in PARTS if part not in names]:
            raise SystemExit(f"{wheel} has no {', '.join(missing)}. Give the wheel of SGLang 0.5.23.")
        kept = [*PARTS, *(name for name in names if name.startswith(f"{CONFIGS}/triton_") and name.endswith(".json"))]
        for name in kept:
            archive.extract(name, folder)
        version = wheel.name.split("-")[1]
        (folder / "sglang" / "VERSION").write_text(f"{version}\n")
        return sum(archive.getinfo(name).file_size for name in kept)


def version_of(folder: Path) -> str:
    """Returns the version of the packed SGLang.

    Raises:
        SystemExit: the folder was not made by `pack`.
    """
    try:
        return (folder / "sglang" / "VERSION").read_text().strip()
    except OSError:
        raise SystemExit(f"{folder} has no sglang/VERSION. Make the folder with `sglang_module.py pack`.") from None


def load(folder: Path, device_name: str) -> Module:
    """Imports SGLang's module from a folder, with stand-ins for the rest of SGLang.

    Args:
        folder: has the package `sglang`, at least `PARTS`.
        device_name: what SGLang's `get_device_name` returns, such as `NVIDIA H200`.

    Raises:
        SystemExit: an SGLang is loaded already.
    """
    if "sglang" in sys.modules:
        raise SystemExit("An SGLang is imported in this process already. Run this benchmark in a process of its own.")
    sys.modules.update(_stand_ins(folder, device_name))
    base = importlib.import_module("sglang.srt.layers.moe.moe_runner.base")
    setattr(sys.modules["sglang.srt.layers.moe.moe_runner"], "MoeRunnerConfig", base.MoeRunnerConfig)  # noqa: B010
    module = importlib.import_module(MODULE.replace("/", "."))
    config = importlib.import_module(f"{module.__name__}.fused_moe_triton_config")
    for name in ("fused_moe", "fused_moe_triton_config"):
        logger: Any = importlib.import_module(f"{module.__name__}.{name}").logger
        logger.warning_once = logger.warning  # SGLang adds this method to all loggers
        logger.setLevel(logging.INFO)
        logger.propagate = False  # else each capture of a graph prints what is looked up
        logger.addHandler(logging.NullHandler())
    return Module(folder, module.fused_experts, base.MoeRunnerConfig, config)


def unload() -> None:
    """Removes SGLang's modules and the stand-ins from this process."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("sglang", "sgl_kernel")]:
        del sys.modules[name]


@contextmanager
def reading(module: Module, folder: Path | None) -> Iterator[None]:
    """Lets SGLang look its configurations up in a folder; None: in its own, with the variable unset."""
    before = os.environ.pop("SGLANG_MOE_CONFIG_DIR", None)
    if folder is not None:
        os.environ["SGLANG_MOE_CONFIG_DIR"] = str(folder)
    module.config.get_moe_configs.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("SGLANG_MOE_CONFIG_DIR", None)
        if before is not None:
            os.environ["SGLANG_MOE_CONFIG_DIR"] = before


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _kernels() -> Any:
    return importlib.import_module("sglang.kernels.ops.moe.fused_moe_triton_kernels")


def _silu_and_mul(
    x: torch.Tensor,
    out: torch.Tensor,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    *,
    sorted_token_ids: torch.Tensor | None = None,
    num_tokens_post_padded: torch.Tensor | None = None,
    num_valid_tokens: int = 0,
) -> None:
    """Computes silu(gate)·up of `[rows, 2·I]` into `[rows, I]`; rows of expert −1 are left out.

    `expert_ids` has one entry for each `expert_step` rows. With `sorted_token_ids` the rows are those of the sorted
    slots, and padding is left out.
    """
    if sorted_token_ids is None:
        _kernels().act_and_mul_triton(x, out, {}, expert_ids)
        return
    _activate_sorted[(len(out),)](
        x, out, expert_ids, sorted_token_ids, num_tokens_post_padded, num_valid_tokens, out.shape[1], expert_step, 512
    )


@triton.jit  # type: ignore[untyped-decorator]
def _activate_sorted(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    experts_ptr,
    sorted_slots_ptr,
    num_padded_slots_ptr,
    num_slots,
    width,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if row < tl.load(num_padded_slots_ptr):
        slot = tl.load(sorted_slots_ptr + row)
        if (slot < num_slots) & (tl.load(experts_ptr + row // STEP) >= 0):
            start = row.to(tl.int64) * width
            for at in range(0, width, BLOCK):
                columns = at + tl.arange(0, BLOCK)
                gate = tl.load(x_ptr + 2 * start + columns, mask=columns < width).to(tl.float32)
                up = tl.load(x_ptr + 2 * start + width + columns, mask=columns < width).to(tl.float32)
                activated = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32) * up
                tl.store(out_ptr + start + columns, activated.to(tl.bfloat16), mask=columns < width)


def _moe_sum_reduce(products: torch.Tensor, out: torch.Tensor, factor: float) -> None:
    _kernels().moe_sum_reduce_triton(products, out, factor)


def _align(
    topk_ids: torch.Tensor,
    num_groups: int,
    block_size: int,
    sorted_slots: torch.Tensor,
    block_experts: torch.Tensor,
    num_padded_slots: torch.Tensor,
    counts: torch.Tensor,
    *_: Any,
) -> None:
    """Sorts slots by expert into SGLang's buffers. `num_groups`: the local experts and one group for the ids of −1."""
    slots = topk_ids.numel()
    shape: dict[str, Any] = {
        "NUM_LOCAL": num_groups - 1,
        "CHUNK": align._CHUNK if slots > 1024 else 1024,
        "num_warps": 8,
    }
    align._count_slots[(num_groups,)](topk_ids, counts, slots, 0, **shape)
    align._place_slots[(num_groups,)](
        topk_ids,
        counts,
        sorted_slots,
        block_experts,
        num_padded_slots,
        slots,
        0,
        block_size,
        NUM_GROUPS=num_groups,
        ALL_GROUPS=triton.next_power_of_2(num_groups),
        LARGEST_BLOCK=align._LARGEST_BLOCK_SIZE_M,
        **shape,
    )


def _left_out(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("This part of SGLang is not in the pack: it is not needed for a bf16 layer.")


class _LeftOut:
    """A class of SGLang that is only named in annotations of the parts that run."""


def _no(*_: Any, **__: Any) -> bool:
    return False


def _custom_op(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """Returns the function as it is. In SGLang it becomes an operator of torch, so that torch.compile can pass it."""
    return function if function is not None else lambda wrapped: wrapped


def _stand_ins(folder: Path, device_name: str) -> dict[str, ModuleType]:
    """Returns the modules by name. Packages find what is in `folder`."""
    execution = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False),
    )
    off = SimpleNamespace(get=_no)
    activations = ("gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul_with_activation_rounding")
    fp8 = ("per_token_group_quant_fp8", "scaled_fp8_quant", "sglang_per_token_group_quant_fp8")
    int8 = ("per_token_group_quant_int8", "per_token_quant_int8", "sglang_per_token_group_quant_int8")
    moe_types = ("MoeA2ABackend", "MoeRunnerBackend", "MoeRunnerBackendLike", "RoutingMethodType")
    attributes: dict[str, dict[str, Any]] = {
        "sgl_kernel": {"moe_sum_reduce": _moe_sum_reduce},
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: _capability()[0] >= 9},
        "sglang.kernels.ops.activation.activation": {
            "silu_and_mul": _silu_and_mul,
            **dict.fromkeys(activations, _left_out),
        },
        "sglang.kernels.ops.moe": {"moe_align_block_size": _align},
        "sglang.kernels.ops.quantization.fp8_kernel": dict.fromkeys(fp8, _left_out),
        "sglang.kernels.ops.quantization.int8_kernel": dict.fromkeys(int8, _left_out),
        "sglang.kernels.ops.quantization.per_token_group_quant": {"per_token_group_quant": _left_out},
        "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": _no},
        "sglang.srt.distributed.device_communicators.pynccl_allocator": {
            "use_symmetric_memory": lambda *_, **__: nullcontext(),
        },
        "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_EXPERIMENTAL_LORA_OPTI=off, SGLANG_USE_AITER=off)},
        "sglang.srt.layers.dp_attention": {"is_allocation_symmetric": _no},
        "sglang.srt.layers.moe.utils": {
            "get_moe_padding_size": lambda is_aiter: 0,
            "get_moe_runner_backend": _left_out,
            **dict.fromkeys(moe_types, _LeftOut),
        },
        "sglang.srt.runtime_context": {
            "get_exec": lambda: execution,
            "get_forward": _left_out,
            "get_parallel": lambda: SimpleNamespace(tp_group=None),
        },
        "sglang.srt.utils": {
            "get_device_name": lambda: device_name,
            "is_cuda": lambda: True,
            "is_sm90_supported": lambda: _capability()[0] == 9,
            **dict.fromkeys(("cpu_has_amx_support", "get_bool_env_var", "is_cpu", "is_hip", "is_musa", "is_xpu"), _no),
        },
        "sglang.srt.utils.custom_op": {"register_custom_op": _custom_op},
    }
    modules = {name: ModuleType(name) for name in (*_PACKAGES, *attributes)}
    for name, module in modules.items():
        if name in _PACKAGES:
            module.__path__ = [str(folder / name.replace(".", "/"))]
        vars(module).update(attributes.get(name, {}))
    return modules
