"""A plugin of vLLM: on one GPU, the experts run as one rank of expert parallelism over several would run them.

If `MOETUNE_BENCH_EP` is 8, each MoE layer is built as rank 0 of TP 8 + EP builds it: it holds an eighth of the experts,
routes all rows over all experts by their global ids, and maps the ids of non-local experts away. The grouped GEMMs have
the shape, the ids and the load of that rank. What is not of that rank: attention has all heads, and nothing is reduced
over ranks, so the outputs are partial sums. So a step's milliseconds are saved as on that rank; the step's length and
the percentage are those of this construct.

vLLM finds the plugin by the entry point that `write_entry_point` writes, in each of its processes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from moetune.engine.plugins import when_imported

VARIABLE: Final = "MOETUNE_BENCH_EP"
MODULE: Final = "vllm.model_executor.layers.fused_moe.config"
LINE: Final = "moetune benchmark: MoE layers are built as rank 0 of expert parallelism over"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`. Does nothing if the variable is unset."""
    if ranks := int(os.environ.get(VARIABLE) or 0):
        when_imported(MODULE, lambda module: install(module, ranks))


def install(module: ModuleType, ranks: int) -> None:
    """Replaces `FusedMoEParallelConfig.make` of vLLM's module (0.26: `fused_moe/config.py`).

    Args:
        module: the module.
        ranks: the number of ranks that share the experts.
    """
    config: Any = module.FusedMoEParallelConfig
    make: Callable[..., Any] = config.make

    def make_as_rank(*given: Any, **named: Any) -> Any:
        made = make(*given, **named)
        if (made.tp_size, made.dp_size, made.ep_size) != (1, 1, 1):
            raise RuntimeError(f"{VARIABLE} is for an engine on one GPU, and this one has {made}.")
        return dataclasses.replace(made, ep_size=ranks, ep_rank=0, use_ep=True)

    config.make = staticmethod(make_as_rank)
    logging.getLogger("vllm.moetune_bench").info("%s %d ranks", LINE, ranks)


def write_entry_point(folder: Path) -> None:
    """Writes a distribution with the entry point into a folder that will be on PYTHONPATH."""
    information = folder / "moetune_bench-0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: moetune-bench\nVersion: 0\n")
    (information / "entry_points.txt").write_text("[vllm.general_plugins]\nmoetune_bench = ep_share:register\n")
