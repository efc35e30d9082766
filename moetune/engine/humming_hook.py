"""Answers the choice of Humming's configurations in vLLM from moetune's store.

`HummingExpertsBase.init_humming_moe` asks Humming's heuristic for the table of each GEMM. It is wrapped: after it, the
tables of the session's layer have moetune's configurations. Every call passes its table to Humming, which looks the
estimated slots up in it. The function that estimates them is wrapped to count the calls, and changes nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, Final

from moetune.engine.humming_answers import Answer, HummingAnswers, merged
from moetune.engine.session import AskedShape, Session

MODULE: Final = "vllm.model_executor.layers.fused_moe.experts.fused_humming_moe"
CLASS: Final = "HummingExpertsBase"
CHOICE: Final = "init_humming_moe"
ESTIMATE: Final = "estimate_local_valid_shape_m"
_TABLES: Final = ("w13_tuning_config", "w2_tuning_config")
_ATTRIBUTE: Final = "moetune_answers"


def install(module: ModuleType, session: Session, rank: Any = None, spelled: str = "") -> None:
    """Wraps the methods of vLLM's Humming experts. It raises nothing.

    Args:
        module: the module `MODULE`.
        session: the session whose store answers.
        rank: the rank that is measured for all; see `Question.of`.
        spelled: the value of `MOETUNE_REGIME`.
    """
    experts = getattr(module, CLASS, None)
    for name, arguments in ((CHOICE, ("self",)), (ESTIMATE, ("self", "topk_ids"))):
        if _parameters(getattr(experts, name, None)) != arguments:
            session.logger.warning(
                "moetune: Humming experts are left to the engine: vllm of this version has another %s", name
            )
            return
    answers = HummingAnswers(session, rank, spelled)
    setattr(experts, CHOICE, _answering(getattr(experts, CHOICE), answers))
    setattr(experts, ESTIMATE, _counting(getattr(experts, ESTIMATE)))


def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _answering(original: Callable[..., Any], answers: HummingAnswers) -> Callable[..., Any]:
    """Returns `init_humming_moe` with moetune's answers in both tables."""

    @wraps(original)
    def init_humming_moe(self: Any) -> None:
        original(self)
        found = answers.of(self)
        if found is None:
            return
        setattr(self, _ATTRIBUTE, found)
        for gemm, name in enumerate(_TABLES):
            if any(answer.fields[gemm] is not None for answer in found[1]):
                table = merged(getattr(self, name), found[1], gemm)
                setattr(self, name, table)
                setattr(self, f"{name}_str", json.dumps(table))

    return init_humming_moe


def _counting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `estimate_local_valid_shape_m`, which each call of the experts calls once."""

    @wraps(original)
    def estimate_local_valid_shape_m(self: Any, topk_ids: Any) -> Any:
        slots = original(self, topk_ids)
        shape, found = getattr(self, _ATTRIBUTE, (None, ()))
        if shape is not None:
            _count(shape, found, slots)
        return slots

    return estimate_local_valid_shape_m


def _count(shape: AskedShape, found: tuple[Answer, ...], slots: int) -> None:
    answer = next((answer for answer in found if answer.lower < slots <= answer.upper), None)
    if answer is not None and not answer.is_default:
        shape.hits += 1
    else:
        shape.misses += 1
        shape.same += answer is not None
