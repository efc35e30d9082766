"""Measures moetune's choice for OpenAI's triton_kernels against what they choose by their own formula in vLLM.

For gpt-oss-120b on Hopper, vLLM 0.26 … 0.33; `formula_cells.py` says how a cell is measured.

    PYTHONPATH=. python benchmarks/triton_kernels_flags.py measure OUT.jsonl --seconds 500
    PYTHONPATH=. python benchmarks/triton_kernels_flags.py report OUT.jsonl

OUT is a journal, and its store lies beside it: the same command continues there. `report` prints Markdown. Kernels are
compiled by processes of their own, one to five seconds each, and Triton's cache on disk keeps them.
"""

from __future__ import annotations

from formula_cells import Comparison, Formula, run

from moetune.backends.triton_kernels.backend import TritonKernelsBackend
from moetune.inputs.presets import layer as preset

DEPLOYMENTS = (("gpt-oss-120b", 4), ("gpt-oss-120b", 8))
COMPARISON = Comparison(
    TritonKernelsBackend,
    {"vllm": Formula("vLLM", TritonKernelsBackend, lambda tactic: tactic["gemm1"], "its own choice for both GEMMs")},
    preset,
)

if __name__ == "__main__":
    run(COMPARISON, DEPLOYMENTS, __doc__)
