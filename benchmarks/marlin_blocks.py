"""Measures moetune's choice for Marlin's MoE kernel against the block sizes that vLLM's and SGLang's formulas choose.

Those of vLLM 0.26 … 0.33 and of SGLang 0.5.23; `formula_cells.py` says how a cell is measured.

    PYTHONPATH=. python benchmarks/marlin_blocks.py measure OUT.jsonl --seconds 500
    PYTHONPATH=. python benchmarks/marlin_blocks.py report OUT.jsonl

OUT is a journal, and its store lies beside it: the same command continues there. `report` prints Markdown.
"""

from __future__ import annotations

from functools import partial

from formula_cells import Comparison, Formula, run

from moetune.backends.marlin.backend import MarlinBackend
from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer, RoutingMethod

DEPLOYMENTS = (
    ("kimi-k2.5", 8),
    ("kimi-k2.5", 16),
    ("gpt-oss-120b", 4),
    ("gpt-oss-120b", 8),
    ("deepseek-v4-like", 8),
)
NO_PRESETS = {
    "deepseek-v4-like": MoELayer(
        name="deepseek-v4-like",
        num_experts=256,
        top_k=6,
        hidden_size=4096,
        intermediate_size=2048,
        precision=Precision.MXFP4,
        activation=Activation.SILU_CLAMPED,
        num_shared_experts=1,
        routing=RoutingMethod(scoring="sqrtsoftplus", bias=True, scaling=1.5),
    )
}
"""Layers that are no presets. This one has the sizes of DeepSeek-V4-Flash."""


def layer_of(model: str) -> MoELayer:
    """Returns the layer of a model of `DEPLOYMENTS`."""
    return NO_PRESETS.get(model) or preset(model)


_TITLES = {"vllm": ("vLLM", "vLLM's block"), "sglang": ("SGLang", "SGLang's")}
COMPARISON = Comparison(
    MarlinBackend,
    {
        name: Formula(title, partial(MarlinBackend, name), lambda tactic: tactic["block_size_m"], column)  # type: ignore[arg-type]
        for name, (title, column) in _TITLES.items()
    },
    layer_of,
)

if __name__ == "__main__":
    run(COMPARISON, DEPLOYMENTS, __doc__)
