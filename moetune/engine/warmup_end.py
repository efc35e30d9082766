"""Finds the end of an engine's warm-up, at which the plugins log what was hit and missed.

Sources: `Worker.compile_or_warm_up_model` in `v1/worker/gpu_worker.py` of vLLM 0.26.0 and 0.33.0 is the last step of a
worker's start: it runs FlashInfer's sweep and captures the CUDA graphs ("All warmup is done"). `Scheduler` of SGLang
0.5.23 does both when it is created, and then enters `run_event_loop` ("Engine init (graph capture, warmups) is done").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from moetune.engine.session import Session


@dataclass(frozen=True, slots=True)
class LastStep:
    """The method whose end or begin is the end of an engine's warm-up.

    Attributes:
        module: the module of the class.
        owner: the class.
        method: the method.
        ends: True if the warm-up ends when the method returns, False if it has ended when the method is called.
    """

    module: str
    owner: str
    method: str
    ends: bool


LAST_STEPS: Final = (
    LastStep("vllm.v1.worker.gpu_worker", "Worker", "compile_or_warm_up_model", ends=True),
    LastStep("sglang.srt.managers.scheduler", "Scheduler", "run_event_loop", ends=False),
)


def install(module: ModuleType, step: LastStep, session: Session) -> None:
    """Replaces the method by one that also logs the session's hits and misses. An engine without it is left alone.

    Args:
        module: the module `step.module`.
        step: the step of the engine.
        session: the process's session.
    """
    owner = getattr(module, step.owner, None)
    original = getattr(owner, step.method, None)
    if callable(original):
        setattr(owner, step.method, _logging(original, step.ends, session))


def _logging(original: Callable[..., Any], ends: bool, session: Session) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*given: Any, **named: Any) -> Any:
        if not ends:
            session.end_warm_up()
        returned = original(*given, **named)
        if ends:
            session.end_warm_up()
        return returned

    return wrapped
