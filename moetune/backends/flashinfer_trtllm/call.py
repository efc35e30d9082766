"""Records a call of one of FlashInfer's public ops, so that the call can be run with any tactic.

The public ops take no tactic. They call `AutoTuner.choose_one` with a runner, its inputs and its arguments.
`record_call` puts a recorder in the tuner's place for one call and keeps these. `OpCall.run` then runs the runner with
a tactic, as FlashInfer's own tuner does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetune.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class OpCall:
    """Holds what an op passes to FlashInfer's tuner: its name, a runner, and the runner's inputs and arguments."""

    custom_op: str
    runner: Any
    inputs: tuple[torch.Tensor | None, ...]
    arguments: Mapping[str, Any]

    def run(self, tactic: list[int]) -> torch.Tensor:
        """Runs the op with `[tile_n, config]`. Returns bf16 `[M, H]`, in the output that the op was called with."""
        result: torch.Tensor = self.runner.forward(list(self.inputs), tactic=tactic, **self.arguments)[0]
        return result

    def with_activations(self, hidden_states: torch.Tensor, scale: torch.Tensor | None) -> OpCall:
        """Returns the same call on other activations of the same shapes."""
        from flashinfer.fused_moe.shared.inputs import MoeRunnerInputs

        inputs = list(self.inputs)
        inputs[MoeRunnerInputs.idx("hidden_states")] = hidden_states
        inputs[MoeRunnerInputs.idx("hidden_states_scale")] = scale
        return replace(self, inputs=tuple(inputs))

    def valid_tactics(self, rows: int) -> list[list[int]]:
        """Returns the tactics `[tile_n, config]` that the runner enumerates for `rows` rows."""
        from flashinfer.fused_moe.shared.inputs import MoeRunnerInputs

        inputs = list(self.inputs)
        index = MoeRunnerInputs.idx("hidden_states")
        hidden_states = inputs[index]
        assert hidden_states is not None
        inputs[index] = hidden_states.new_empty((rows, hidden_states.shape[1]), device="meta")
        return [list(tactic) for tactic in self.runner.get_valid_tactics(inputs, None)]


class _Recorded(Exception):  # noqa: N818 - it reports no error
    """Ends an op before it launches."""

    def __init__(self, call: OpCall) -> None:
        self.call = call


class _Recorder:
    """Replaces FlashInfer's tuner."""

    def choose_one(
        self, custom_op: str, runners: list[Any], tuning_config: Any, inputs: list[torch.Tensor | None], **kwargs: Any
    ) -> tuple[Any, Any]:
        raise _Recorded(OpCall(custom_op, runners[0], tuple(inputs), kwargs))


def record_call(op: str, arguments: Mapping[str, Any]) -> OpCall:
    """Records the call of `flashinfer.fused_moe.<op>(**arguments)`. Launches nothing.

    Tensors may be on the meta device. During the call FlashInfer's tuner is replaced in the whole process.

    Raises:
        UnsupportedError: the installed FlashInfer has no such op, or the op has other parameters.
    """
    import inspect

    import flashinfer
    from flashinfer import fused_moe

    function = getattr(fused_moe, op, None)
    try:
        if function is None:
            raise TypeError("there is no such function")
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UnsupportedError(
            f"FlashInfer {flashinfer.__version__} has another {op}: {error}.", "Install flashinfer-python 0.7.2.post1."
        ) from None
    try:
        with _recording():
            function(**arguments)
    except _Recorded as recorded:
        return recorded.call
    raise UnsupportedError(
        f"FlashInfer {flashinfer.__version__} ran {op} without asking its tuner for a tactic.",
        "Install flashinfer-python 0.7.2.post1.",
    )


@contextmanager
def _recording() -> Iterator[None]:
    from flashinfer.autotuner import AutoTuner

    before = AutoTuner._instance
    AutoTuner._instance = _Recorder()
    try:
        yield
    finally:
        AutoTuner._instance = before
