"""Compiles small functions of tensors for the GPU, where their many small kernels would take longer than the wire."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, ParamSpec

import torch

P = ParamSpec("P")
_logger = logging.getLogger(__name__)


class Fused(Generic[P]):
    """Calls a function as it is on the CPU and compiled on a GPU; as it is, too, if the compiler fails.

    Args:
        function: takes a tensor first, and returns a tensor.
    """

    def __init__(self, function: Callable[P, torch.Tensor]) -> None:
        self._function = function
        self._compiled: Callable[P, torch.Tensor] | None = None
        self.failure: Exception | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        if not first.is_cuda or self.failure is not None:
            return self._function(*args, **kwargs)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, dynamic=True)
            return self._compiled(*args, **kwargs)
        except Exception as failure:  # the compiler's errors have no common base
            _logger.warning("%s runs without torch.compile: %s", self._function.__qualname__, failure)
            self.failure = failure
            return self._function(*args, **kwargs)
