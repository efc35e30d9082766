"""A small `vllm` that runs the experts of gpt-oss, and a `triton_kernels` that notes its constraints."""

from __future__ import annotations

from pathlib import Path

MODULE = "vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe"
OPT_FLAGS = """
_opt_flags_constraints = {}
def update_opt_flags_constraints(constraints):
    _opt_flags_constraints.update(constraints)
def reset_opt_flags_constraints():
    global _opt_flags_constraints
    _opt_flags_constraints = {}
def make_opt_flags():
    return dict(_opt_flags_constraints)
"""
MATMUL_OGS = """
from dataclasses import dataclass
from triton_kernels.matmul_ogs_details.opt_flags import make_opt_flags
calls = []
@dataclass
class FnSpecs:
    name: str
    fn: object
    fn_arg_names: tuple
@dataclass
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple
    reduction_n: int
def matmul_ogs(x, w, bias, routing_data, gather_indx=None, scatter_indx=None, precision_config=None, gammas=None,
               fused_activation=None, y=None):
    assert (fused_activation is None) == (gather_indx is None)
    if routing_data.expt_hist == "fails":
        raise RuntimeError("out of memory")
    calls.append(make_opt_flags())
"""
HEADER = """
from __future__ import annotations
import math
import torch
import triton_kernels.swiglu
from triton_kernels.matmul_ogs import FnSpecs, FusedActivation, calls, matmul_ogs
triton_kernels_version, use_legacy_triton_kernels = "3.5.1", True
class MoEActivation:
    SWIGLUOAI = "swigluoai"
class FusedMoEQuantConfig:
    pass
def _resize_cache(cache, shape):
    return cache.flatten()[: math.prod(shape)].view(shape)
def _constrain_sm12x_block_m(num_rows, num_experts):
    pass
def ask(**named):
    triton_kernel_fused_experts(**named)
    found, calls[:] = list(calls), []
    return found
"""
PLANTED = """
def triton_kernel_fused_experts(output_tensor, hidden_states, w1, w2, routing_data, gather_indx, scatter_indx, topk,
                                activation=None, quant_config=None, swiglu_alpha=1.702, swiglu_limit=7.0,
                                apply_router_weight_on_input=False, global_num_experts=-1, expert_map=None,
                                intermediate_cache=None, a1q_scale=None):
    matmul_ogs(hidden_states, w1, None, routing_data, gather_indx=gather_indx, fused_activation="swiglu")
    matmul_ogs(hidden_states, w2, None, routing_data, scatter_indx=scatter_indx)
"""
"""The parts of vLLM's function that matter here."""


def plant(root: Path, functions: str | None = None, *, extra: str = "") -> None:
    """Writes both packages below `root`.

    Args:
        root: the folder.
        functions: the source of vLLM's function. [default: `PLANTED`]
        extra: more source for its module.
    """
    files = {
        "triton_kernels/__init__.py": "",
        "triton_kernels/routing.py": "",
        "triton_kernels/swiglu.py": "swiglu_fn = None\n",
        "triton_kernels/matmul_ogs.py": MATMUL_OGS,
        "triton_kernels/matmul_ogs_details/opt_flags.py": OPT_FLAGS,
        "triton_kernels/tensor_details/layout_details/hopper_scale.py": "",
        "vllm/envs.py": "VLLM_BATCH_INVARIANT = False\n",
        f"{MODULE.replace('.', '/')}.py": HEADER + (functions or PLANTED) + extra,
    }
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
