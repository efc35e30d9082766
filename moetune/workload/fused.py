"""Compiles small functions of tensors into one kernel, because many small kernels would take longer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec

import torch

P = ParamSpec("P")
_logger = logging.getLogger(__name__)


class Fused(Generic[P]):
    """Calls a function compiled by `torch.compile`; as it is if the compiler has failed, and while torch compiles more.

    Args:
        function: takes a tensor first, and returns a tensor.
        on_cpu: whether it is compiled for the CPU too.

    Attributes:
        failure: why the compiler has failed, or None.
    """

    def __init__(self, function: Callable[P, torch.Tensor], *, on_cpu: bool = True) -> None:
        self._function, self._on_cpu = function, on_cpu
        self._compiled: Callable[P, torch.Tensor] | None = None
        self.failure: Exception | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        is_elsewhere = not (self._on_cpu or first.is_cuda)
        if self.failure is not None or is_elsewhere or torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, dynamic=True)
            return self._compiled(*args, **kwargs)
        except Exception as failure:  # the compiler's errors have no common base, and the arguments are checked
            _logger.warning("%s runs without torch.compile: %s", self._function.__qualname__, failure)
            _forget_frames(failure)
            self.failure = failure
            return self._function(*args, **kwargs)


def _forget_frames(error: BaseException | None) -> None:
    """Removes the tracebacks of an error and of its causes: they would keep the tensors of all callers alive."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
