"""Answers the choice of Marlin's block size and tiles in vLLM and SGLang from moetune's store.

`fused_marlin_moe` chooses the block size inside, and passes it to the alignment and to both GEMMs. So it is wrapped.
During a call that is answered, the functions that it calls by name get the tactic's values instead. They are replaced
in the modules where it looks them up, and do as before outside such a call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any, Final

from moetune.engine.marlin_answers import MarlinAnswers
from moetune.engine.marlin_engines import NAME, VLLM, MarlinEngine
from moetune.engine.session import Session
from moetune.spec.tactic import Tactic

GEMM: Final = "moe_wna16_marlin_gemm"
ALIGN: Final = "moe_align_block_size"


@dataclass(slots=True)
class _Call:
    """A call that is answered.

    Attributes:
        block_size: the block size for the alignment and both GEMMs.
        tiles: the tile of each GEMM, the first one first.
        is_aligned: whether the slots have been aligned to the block size. If the engine aligned them by another
            function, its GEMMs must keep its block size.
    """

    block_size: int
    tiles: Iterator[dict[str, int]]
    is_aligned: bool = False


_answered: ContextVar[_Call | None] = ContextVar("moetune_marlin", default=None)
"""The call that runs now in this thread; None outside, and in a call that the engine answers itself."""


def install(
    module: ModuleType,
    engine: MarlinEngine,
    session: Session,
    rank: Any = None,
    spelled: str = "",
) -> None:
    """Wraps `fused_marlin_moe` and replaces the functions that it calls. It raises nothing.

    Args:
        module: the module `engine.module`.
        engine: the engine.
        session: the session whose store answers.
        rank: the rank that is measured for all; see `Question.of`.
        spelled: the value of `MOETUNE_REGIME`.
    """
    align = sys.modules.get(engine.align)
    caller: Any = getattr(module, "ops", None) if engine is VLLM else module
    if missing := _missing(module, engine, align, caller):
        session.logger.warning(
            "moetune: Marlin experts are left to the engine: %s of this version has another %s", engine.name, missing
        )
        return
    answers = MarlinAnswers(session, engine, rank, spelled)
    setattr(module, NAME, _answering(getattr(module, NAME), answers))
    setattr(align, ALIGN, _with_block_size(getattr(align, ALIGN)))
    gemm = _with_tiles(getattr(caller, GEMM), takes_tiles=engine is VLLM)
    if engine is VLLM:
        module.ops = _Ops(caller, gemm)  # type: ignore[attr-defined]
    else:
        setattr(module, GEMM, gemm)


def _missing(module: ModuleType, engine: MarlinEngine, align: ModuleType | None, caller: Any) -> str | None:
    """Returns the name of the first function that is not as known."""
    needed = (
        (module, NAME, engine.needs),
        (align, ALIGN, ("topk_ids", "block_size")),
        (caller, GEMM, ("moe_block_size", *(("thread_k", "thread_n", "blocks_per_sm") if engine is VLLM else ()))),
    )
    for place, name, arguments in needed:
        if not set(arguments) <= set(_parameters(getattr(place, name, None))):
            return name
    return None


def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _answering(original: Callable[..., Any], answers: MarlinAnswers) -> Callable[..., Any]:
    """Returns `fused_marlin_moe` with moetune's answers. A call that torch compiles is left to the engine."""
    import torch

    names = _parameters(original)

    @wraps(original)
    def fused_marlin_moe(*given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*given, **named)
        tactic = answers.find({**dict(zip(names, given, strict=False)), **named})
        if tactic is None:
            return original(*given, **named)
        tiles = iter([_tile(tactic, "gemm1"), _tile(tactic, "gemm2")])
        token = _answered.set(_Call(int(tactic["block_size_m"]), tiles))
        try:
            return original(*given, **named)
        finally:
            _answered.reset(token)

    return fused_marlin_moe


def _tile(tactic: Tactic, gemm: str) -> dict[str, int]:
    from moetune.backends.marlin.space import AUTO, Tile

    if tactic[gemm] == AUTO:
        return {}
    tile = Tile.parse(str(tactic[gemm]))
    return {"thread_k": tile.thread_k, "thread_n": tile.thread_n, "blocks_per_sm": tile.blocks_per_sm}


def _with_block_size(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `moe_align_block_size` with the tactic's block size in a call that is answered."""

    @wraps(original)
    def moe_align_block_size(topk_ids: Any, block_size: int, *given: Any, **named: Any) -> Any:
        call = _answered.get()
        if call is None:
            return original(topk_ids, block_size, *given, **named)
        call.is_aligned = True
        return original(topk_ids, call.block_size, *given, **named)

    return moe_align_block_size


def _with_tiles(original: Callable[..., Any], *, takes_tiles: bool) -> Callable[..., Any]:
    """Returns a GEMM with the tactic's block size and tile in a call that is answered. Both are keywords there."""

    @wraps(original)
    def moe_wna16_marlin_gemm(*given: Any, **named: Any) -> Any:
        call = _answered.get()
        if call is None or not call.is_aligned:
            return original(*given, **named)
        tile = next(call.tiles, {}) if takes_tiles else {}
        return original(*given, **{**named, "moe_block_size": call.block_size, **tile})

    return moe_wna16_marlin_gemm


class _Ops:
    """vLLM's module of ops as `marlin_moe` sees it, with another GEMM."""

    def __init__(self, ops: ModuleType, gemm: Callable[..., Any]) -> None:
        self._ops = ops
        self.moe_wna16_marlin_gemm = gemm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)
