"""A reader of TensorRT-LLM's cache files, written from their format and its tuner's look-up, not from the exporter.

Format and look-up: `AutoTunerProfilingCache.load_cache`, `search_cache` and `AutoTuner._find_nearest_profile` in
tensorrt_llm/_torch/autotuner.py; `get_dynamic_tensor_specs` and `get_constraint_specs` in
custom_ops/trtllm_gen_custom_ops.py (https://github.com/NVIDIA/TensorRT-LLM/pull/13667).
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
HIDDEN_STATES = 2


@dataclass(frozen=True)
class Call:
    """What a runner hands to the tuner. `derived`: (input, dimension) pairs of its constraint specs."""

    op: str
    runner: str
    unique_id: Any
    shapes: tuple[Shape, ...]
    derived: tuple[tuple[int, int], ...]


class Reader:
    """One rank's tuner after `load_cache`."""

    def __init__(self, text: str, rank: int) -> None:
        document = json.loads(text)
        metadata = document["metadata"]
        self.version, self.device = metadata["lib_version"], metadata["device_name"]
        self.capability, self.created = tuple(metadata["device_capability"]), float(metadata["creation_timestamp"])
        entries = {**document["shared"], **document[f"rank_{rank}"]}
        self.cache = {
            ast.literal_eval(key): (entry["runner_id"], ast.literal_eval(entry["tactic"]), entry["min_time"])
            for key, entry in entries.items()
        }

    def choose(self, call: Call, *, ep_size: int = 1, use_dp: bool = False, tune_max_num_tokens: int = 8192) -> Any:
        """The tactic that the engine would run, or −1 where it would fall back."""
        shapes = [list(shape) for shape in call.shapes]
        rows = shapes[HIDDEN_STATES][0] // (ep_size if use_dp else 1)
        if rows > 8192 and tune_max_num_tokens > 8192:
            bucket = tune_max_num_tokens
        else:
            bucket = min(max(1, 1 << (max(1, rows).bit_length() - 1)), 8192)
        shapes[HIDDEN_STATES][0] = min(bucket, max(8192, tune_max_num_tokens))
        for index, dimension in call.derived:
            if shapes[index] != [0]:
                shapes[index][dimension] = -1
        key = (call.op, call.runner, str(call.unique_id), tuple(tuple(shape) for shape in shapes))
        return self.cache[key][1] if key in self.cache else -1
