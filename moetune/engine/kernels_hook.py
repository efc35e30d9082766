"""Answers vLLM's triton_kernels from moetune's store: the flags of both GEMMs of gpt-oss's experts on Hopper.

`triton_kernel_fused_experts` runs both GEMMs by `matmul_ogs`, which chooses its flags under constraints that hold for
the whole process. So both functions are wrapped in vLLM's module. In a call that is answered, each GEMM runs under the
constraints of the profile's choice, and those that vLLM has set come back right after it. Other calls of `matmul_ogs`,
those of other modules among them, run as before.

Sources: `experts/gpt_oss_triton_kernels_moe.py` of vLLM 0.26.0 and 0.33.0. SGLang 0.5.23 calls triton_kernels of Triton
3.8, which moetune does not tune.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from types import ModuleType
from typing import Any, Final

from moetune.engine.kernels_answers import KernelsAnswers
from moetune.engine.session import Session
from moetune.spec.tactic import Tactic

MODULE: Final = "vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe"
EXPERTS: Final = "triton_kernel_fused_experts"
GEMM: Final = "matmul_ogs"
_READ: Final = frozenset(
    {
        *("hidden_states", "w1", "w2", "topk", "quant_config", "swiglu_alpha", "swiglu_limit"),
        "apply_router_weight_on_input",
    }
)

_answered: ContextVar[Iterator[dict[str, int]] | None] = ContextVar("moetune_triton_kernels", default=None)
"""The constraints of the GEMMs of the call that runs now in this thread; None in a call that is not answered."""


def install(module: ModuleType, session: Session, rank: Any = None, spelled: str = "") -> None:
    """Wraps both functions in vLLM's module. It raises nothing.

    Args:
        module: the module `MODULE`.
        session: the session whose store answers.
        rank: the rank that is measured for all; see `Question.of`.
        spelled: the value of `MOETUNE_REGIME`.
    """
    opt_flags = _opt_flags(getattr(module, GEMM, None))
    experts = getattr(module, EXPERTS, None)
    if opt_flags is None or not callable(experts) or not set(inspect.signature(experts).parameters) >= _READ:
        session.logger.warning(
            "moetune: triton_kernels' experts are left to the engine: this vLLM or triton_kernels has another %s",
            GEMM if opt_flags is None else EXPERTS,
        )
        return
    answers = KernelsAnswers(session, rank, spelled)
    setattr(module, EXPERTS, _answering(experts, answers))
    setattr(module, GEMM, _constrained(getattr(module, GEMM), opt_flags))


def _opt_flags(gemm: Any) -> ModuleType | None:
    """Returns the module in which `matmul_ogs` looks its constraints up; None if it is not as known."""
    choose = getattr(gemm, "__globals__", {}).get("make_opt_flags")
    if choose is None:
        return None
    module = importlib.import_module(choose.__module__)
    names = ("_opt_flags_constraints", "update_opt_flags_constraints", "reset_opt_flags_constraints")
    return module if all(hasattr(module, name) for name in names) else None


def _answering(original: Callable[..., Any], answers: KernelsAnswers) -> Callable[..., Any]:
    """Returns `triton_kernel_fused_experts` with moetune's answers. A call that torch compiles is the engine's."""
    import torch

    signature = inspect.signature(original)

    @wraps(original)
    def triton_kernel_fused_experts(*given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*given, **named)
        call = signature.bind(*given, **named)
        call.apply_defaults()
        tactic = answers.find(call.arguments)
        if tactic is None:
            return original(*given, **named)
        token = _answered.set(_constraints(tactic))
        try:
            return original(*given, **named)
        finally:
            _answered.reset(token)

    return triton_kernel_fused_experts


def _constraints(tactic: Tactic) -> Iterator[dict[str, int]]:
    from moetune.backends.triton_kernels.space import Flags

    return iter([Flags.parse(str(tactic[name])).constraints for name in ("gemm1", "gemm2")])


def _constrained(original: Callable[..., Any], opt_flags: ModuleType) -> Callable[..., Any]:
    """Returns `matmul_ogs` that runs under the next constraints of a call that is answered."""
    from moetune.backends.triton_kernels.package import constrained

    @wraps(original)
    def matmul_ogs(*given: Any, **named: Any) -> Any:
        constraints = next(_answered.get() or iter(()), None)
        if constraints is None:
            return original(*given, **named)
        with constrained(opt_flags, constraints):
            return original(*given, **named)

    return matmul_ogs
