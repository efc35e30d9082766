"""Answers the look-up of a Triton configuration in vLLM and SGLang from moetune's store.

Both engines call `try_get_optimal_moe_config` before each run of their grouped Triton GEMM. Many modules import that
function by its name: those of the grouped GEMM, of the batched one, of LoRA. Replaced is the name in the one module
that runs the grouped GEMM. So the other kernels keep the engine's own look-up, although they ask for the same shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moetune.engine.session import Session
from moetune.engine.triton_answers import TritonAnswers
from moetune.engine.triton_engines import NAME, VLLM, Engine


def install(
    module: ModuleType,
    engine: Engine,
    session: Session,
    rank: Any = None,
    spelled: str = "",
    tune_s: float | None = None,
) -> None:
    """Replaces the look-up in the module that runs an engine's grouped GEMM. It raises nothing.

    Args:
        module: the module `engine.caller`.
        engine: the engine.
        session: the session whose store answers.
        rank: the rank that is measured for all; see `Question.of`.
        spelled: the value of `MOETUNE_REGIME`.
        tune_s: as in `TritonAnswers`.
    """
    original = getattr(module, NAME, None)
    try:
        arguments = tuple(inspect.signature(original).parameters) if callable(original) else ()
    except ValueError:
        arguments = ()
    if original is None or arguments != engine.arguments:
        session.logger.warning(
            "moetune: Triton experts are left to the engine: %s of this version has another %s", engine.name, NAME
        )
        return
    answers = TritonAnswers(session, engine, original, rank, spelled, tune_s)
    replacement = _vllm(answers) if engine is VLLM else _sglang(answers)
    setattr(module, NAME, replacement)


def _vllm(answers: TritonAnswers) -> Callable[..., Any]:
    find, original = answers.find, answers.original

    def try_get_optimal_moe_config(
        w1_shape: Any, w2_shape: Any, top_k: int, dtype: str | None, M: int, block_shape: list[int] | None = None
    ) -> Any:
        found = find(w1_shape, w2_shape, top_k, dtype, M, block_shape)
        return original(w1_shape, w2_shape, top_k, dtype, M, block_shape) if found is None else found[0]

    return try_get_optimal_moe_config


def _sglang(answers: TritonAnswers) -> Callable[..., Any]:
    find, original = answers.find, answers.original

    def try_get_optimal_moe_config(
        w1_shape: Any,
        w2_shape: Any,
        top_k: int,
        dtype: str | None,
        M: int,
        is_marlin: bool = False,
        block_shape: list[int] | None = None,
        per_channel_quant: bool = False,
        return_down_config: bool = False,
    ) -> Any:
        other = is_marlin or per_channel_quant
        found = None if other else find(w1_shape, w2_shape, top_k, dtype, M, block_shape)
        if found is None:
            return original(
                w1_shape, w2_shape, top_k, dtype, M, is_marlin, block_shape, per_channel_quant, return_down_config
            )
        config, shape = found
        # as with a tuned file without a `_down.json`: both GEMMs run one configuration, and the caller may change it
        return (config, (dict(config), shape.largest_block_m)) if return_down_config else config

    return try_get_optimal_moe_config
