"""Compiles the kernels of SGLang's module of a pack for Hopper, without a GPU, and prints their names as JSON.

python tests/benchmarks/compile_sglang.py PACK
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/engine"))

import sglang_sources
import torch
from sglang_sources import load, reading
from triton.runtime.jit import JITFunction

from moetune.backends.grouped_triton.ahead import headless

HOPPER = (9, 0)


def compiled(packed):
    """Returns for each launch of two layers the kernel's name, and whether it may begin before the last one ends."""
    launches, run = [], JITFunction.run

    def compile_only(self, *given, grid, warmup, **named):
        kernel = run(self, *given, grid=grid, warmup=True, **named)
        assert kernel.asm["cubin"]
        launches.append((self.fn.__name__, "griddepcontrol" in kernel.asm["ptx"]))

    JITFunction.run = compile_only
    sglang_sources._capability = lambda: HOPPER
    module = load(packed, "NVIDIA H100 80GB HBM3")
    with headless(HOPPER), reading(module, None):
        for num_local, rows in ((64, 1), (16, 64)):
            x, ids = torch.zeros(rows, 256).bfloat16(), (torch.arange(rows * 8) % num_local).int().view(rows, 8)
            w1, w2 = torch.zeros(num_local, 256, 256).bfloat16(), torch.zeros(num_local, 256, 128).bfloat16()
            settings = module.runner_config(num_experts=64, num_local_experts=num_local, top_k=8, inplace=False)
            module.fused_experts(x, w1, w2, (torch.ones(rows, 8), ids, None), settings)
        number = torch.zeros(1, dtype=torch.int32)
        sglang_sources._silu_and_mul(
            w1[0], w2[0, :, :128].contiguous(), number, 64, sorted_token_ids=number, num_tokens_post_padded=number
        )
    return launches


if __name__ == "__main__":
    print(json.dumps(compiled(Path(sys.argv[1]))))
