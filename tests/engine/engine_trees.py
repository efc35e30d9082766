"""Small packages named `vllm` and `sglang`, with the modules of the grouped Triton GEMM's look-up."""

from __future__ import annotations

import ast
from pathlib import Path

MOE = {"vllm": "vllm.model_executor.layers.fused_moe", "sglang": "sglang.srt.layers.moe.moe_runner.triton_utils"}
LOOKUP = {"vllm": "fused_moe", "sglang": "fused_moe_triton_config"}
"""The module with `try_get_optimal_moe_config`, by engine."""
CALLERS = {"vllm": ("experts.triton_moe", "experts.fused_batched_moe"), "sglang": ("fused_moe", "lora")}
"""Two modules that call it: of the grouped GEMM, and of another kernel."""
NAME = "try_get_optimal_moe_config"

PACKAGE = """
from contextlib import contextmanager
_config = None
@contextmanager
def override_config(config):
    global _config
    _config, old = config, _config
    yield
    _config = old
def get_config():
    return _config
"""
HEADERS = {
    "vllm": """
from __future__ import annotations
import functools, json, os
class envs:
    VLLM_BATCH_INVARIANT = False
    VLLM_TUNED_CONFIG_FOLDER = None
class logger:
    info_once = warning_once = staticmethod(lambda *words, **named: None)
class current_platform:
    is_rocm = staticmethod(lambda: False)
def get_device_name_as_file_name():
    return "NVIDIA_H200"
""",
    "sglang": """
from __future__ import annotations
import functools, json, os
from types import SimpleNamespace
_is_hip = False
class triton:
    __version__ = "3.6.0"
class logger:
    info = warning = warning_once = staticmethod(lambda *words, **named: None)
deterministic = SimpleNamespace(enable_deterministic_inference=False)
def get_exec():
    return SimpleNamespace(deterministic=deterministic)
def get_device_name():
    return "NVIDIA H200"
""",
}
PLANTED = {
    "vllm": """
def try_get_optimal_moe_config(w1_shape, w2_shape, top_k, dtype, M, block_shape=None):
    from vllm.model_executor.layers.fused_moe import get_config
    own = dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128, GROUP_SIZE_M=1, SPLIT_K=1, num_warps=4, num_stages=4)
    return get_config() or {**own, "BLOCK_SIZE_M": 16 if M < 32 else 64}
""",
    "sglang": """
def try_get_optimal_moe_config(
    w1_shape, w2_shape, top_k, dtype, M, is_marlin=False, block_shape=None, per_channel_quant=False,
    return_down_config=False,
):
    from sglang.srt.layers.moe.moe_runner.triton_utils import get_config
    own = get_config() or dict(BLOCK_SIZE_M=16 if M < 32 else 64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128, GROUP_SIZE_M=1)
    return (own, (None, None)) if return_down_config else own
""",
}
"""Look-ups with the real signatures. vLLM's sets all tunables, SGLang's leaves warps and stages to Triton."""


def plant(root: Path, engine: str, *, lookup: str | None = None, caller: str = "") -> None:
    """Writes the package of an engine below `root`.

    Args:
        root: the folder.
        engine: `vllm` or `sglang`.
        lookup: the source of the look-up. [default: that of `PLANTED`]
        caller: more source for the module that runs the grouped GEMM.
    """

    def file(module: str) -> Path:
        return root.joinpath(*module.split(".")).with_suffix(".py")

    for at, name in enumerate(CALLERS[engine]):
        path = file(f"{MOE[engine]}.{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"from __future__ import annotations\nfrom {MOE[engine]}.{LOOKUP[engine]} import {NAME}\n"
        text += "def ask(*given, **named):\n"
        path.write_text(f"{text}    return {NAME}(*given, **named)\n{'' if at else caller}")
    file(f"{MOE[engine]}.{LOOKUP[engine]}").write_text(HEADERS[engine] + (lookup or PLANTED[engine]))
    folder = file(f"{MOE[engine]}.x").parent
    (folder / "configs").mkdir()
    (folder / "__init__.py").write_text(PACKAGE)


def functions(path: Path, *names: str) -> str:
    """Returns the source of the functions of a module."""
    text = path.read_text()
    found = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    return "\n\n".join(ast.unparse(found[name]) for name in names)
