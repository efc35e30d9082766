"""Finds the end of an engine's warm-up, at which the plugins log what was hit and missed, and begin to record.

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


VLLM: Final = LastStep("vllm.v1.worker.gpu_worker", "Worker", "compile_or_warm_up_model", ends=True)
SGLANG: Final = LastStep("sglang.srt.managers.scheduler", "Scheduler", "run_event_loop", ends=False)
LAST_STEPS: Final = (VLLM, SGLANG)


def install(module: ModuleType, step: LastStep, act: Callable[[Any], object]) -> None:
    """Replaces the method by one that also calls `act` at the end of the warm-up. An engine without it is left alone.

    Args:
        module: the module `step.module`.
        step: the step of the engine.
        act: gets the object whose method it is. It raises nothing.
    """
    owner = getattr(module, step.owner, None)
    original = getattr(owner, step.method, None)
    if not callable(original):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *given: Any, **named: Any) -> Any:
        if not step.ends:
            act(self)
        returned = original(self, *given, **named)
        if step.ends:
            act(self)
        return returned

    setattr(owner, step.method, wrapped)
