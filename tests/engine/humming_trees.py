"""A small package named `vllm` with the module in which Humming's configurations are asked for."""

from __future__ import annotations

import ast
from pathlib import Path

MODULE = "vllm.model_executor.layers.fused_moe.experts.fused_humming_moe"
METHODS = ("init_humming_moe", "get_global_valid_shape_m", "estimate_local_valid_shape_m")
"""What the plugin wraps, and what that calls."""
HEAD = """
from __future__ import annotations
import enum, json, math
from types import SimpleNamespace
import torch
from vllm import envs

class GemmType(enum.Enum):
    INDEXED = "indexed"
    GROUPED_CONTIGUOUS = "grouped_contiguous"

def get_forward_context():
    return SimpleNamespace(dp_metadata=None)

class HummingExpertsBase:
    gemm_type = GemmType.GROUPED_CONTIGUOUS

    def __init__(self, w13, w2, global_num_experts, top_k):
        self.humming_configs = {"w13": w13, "w2": w2}
        self.num_experts = w13.num_experts
        self.global_num_experts = global_num_experts
        self.moe_config = SimpleNamespace(experts_per_token=top_k)
        self.quant_config = SimpleNamespace(w1_hadamard_block_size=1, w2_hadamard_block_size=1)
        self.init_humming_moe()

    def humming_gemm_type(self):
        return self.gemm_type
"""
PLANTED = """
def init_humming_moe(self):
    from vllm.utils.humming import get_heuristics_config
    self.compute_config = {"gemm_type": self.humming_gemm_type().value}
    self.w13_tuning_config = get_heuristics_config(layer_config=self.humming_configs["w13"])
    self.w2_tuning_config = get_heuristics_config(layer_config=self.humming_configs["w2"])
    self.compute_config_str = json.dumps(self.compute_config)
    self.w13_tuning_config_str = json.dumps(self.w13_tuning_config)
    self.w2_tuning_config_str = json.dumps(self.w2_tuning_config)

def get_global_valid_shape_m(self, topk_ids):
    return topk_ids.size(0) * topk_ids.size(1)

def estimate_local_valid_shape_m(self, topk_ids):
    return math.ceil(self.get_global_valid_shape_m(topk_ids) * self.num_experts / self.global_num_experts)
"""
"""The parts of vLLM's methods that matter here."""
HUMMING = """
def get_heuristics_config(layer_config, **given):
    return [[0, 8, {"own": 1}], [8, 32, {"own": 2}], [32, 1 << 30, {"own": 3}]]
"""
ENVS = """
VLLM_BATCH_INVARIANT = False
VLLM_HUMMING_USE_F16_ACCUM = False
"""


def methods(path: Path) -> str:
    """Returns the source of `METHODS` of vLLM's class, as functions."""
    (found,) = (
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "HummingExpertsBase"
    )
    named = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    return "\n\n".join(ast.unparse(named[name]) for name in METHODS)


def plant(root: Path, functions: str = PLANTED) -> None:
    """Writes the package below `root`, with these functions as the class's methods."""
    assigned = "\n".join(f"HummingExpertsBase.{name} = {name}" for name in METHODS)
    files = {
        "vllm/envs.py": ENVS,
        "vllm/utils/humming.py": HUMMING,
        f"{MODULE.replace('.', '/')}.py": f"{HEAD}\n\n{functions}\n\n{assigned}\n",
    }
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
