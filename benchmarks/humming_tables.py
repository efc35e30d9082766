"""Measures moetune's choice for Humming's MoE kernels against what Humming's own heuristic chooses in vLLM 0.33.

`formula_cells.py` says how a cell is measured.

    PYTHONPATH=. python benchmarks/humming_tables.py measure OUT.jsonl --seconds 500
    PYTHONPATH=. python benchmarks/humming_tables.py report OUT.jsonl

OUT is a journal, and its store lies beside it: the same command continues there. `report` prints Markdown. NVRTC
compiles some 280 kernels for a layer, seconds each, on all cores; Humming's cache on disk keeps them.
"""

from __future__ import annotations

from formula_cells import Comparison, Formula, run
from marlin_blocks import layer_of

from moetune.backends.humming.backend import HummingBackend

DEPLOYMENTS = (("kimi-k2.5", 8), ("kimi-k2.5", 16), ("deepseek-v4-like", 8))
COMPARISON = Comparison(
    HummingBackend,
    {"vllm": Formula("vLLM", HummingBackend, lambda tactic: tactic["gemm1"], "Humming's heuristic for both GEMMs")},
    layer_of,
)

if __name__ == "__main__":
    run(COMPARISON, DEPLOYMENTS, __doc__)
