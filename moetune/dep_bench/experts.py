"""`Experts`, the experts of one rank and their kernels, for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moetune.backends.base import Backend, FillableRunner, Inputs, Problem
from moetune.errors import UnsupportedError
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.draws import as_draws, untouched
from moetune.workload.routing import Routing, realize

FILLABLE = ("triton", "flashinfer-cutlass", "torch")
"""The backends whose runners are a `FillableRunner`."""
SEEDS_APART = 1009
"""Between the seeds of two ranks' weights. So a row that reaches the wrong rank gives a wrong result."""


class Experts:
    """The weights of a rank's experts, and a runner for each row count that has occurred.

    Args:
        backend: the backend.
        layer, regime: the deployment.
        rank: the rank.
        device: its torch device.

    Raises:
        UnsupportedError: the backend computes rows only that it has made itself.
    """

    def __init__(self, backend: Backend, layer: MoELayer, regime: Regime, rank: int, device: str) -> None:
        require_fillable(backend, layer)
        self._backend, self._layer, self._device = backend, layer, device
        self._regime = regime.model_copy(update={"seed": regime.seed + SEEDS_APART * rank, "rank": rank})
        self._runners: dict[int, FillableRunner] = {}

    def inputs(self, rows: int) -> Inputs:
        """Returns the tensors that `run` reads with this many rows."""
        return self._runner(rows).inputs()

    def run(self, rows: int, tactic: Tactic) -> torch.Tensor:
        """Computes `[rows, H]` from the inputs, in a buffer that the next run may overwrite."""
        return self._runner(rows).run(tactic)

    def reference(self, rows: int) -> torch.Tensor:
        """Computes the same in fp32: `[rows, H]` float32."""
        return self._runner(rows).reference()

    def sampled(self, regime: Regime, rows: int, draws: int) -> FillableRunner:
        """Returns a runner of sampled routings of this rank, which no tune has used.

        Args:
            regime: says how they are sampled; otherwise the same deployment.
            rows: the row count.
            draws: the number of routings.
        """
        first, rank = untouched(regime.draws).start, self._regime.rank
        routings = [realize(self._layer, regime, rows, rank, number) for number in range(first, first + draws)]
        return self._prepared(rows, routings)

    def _runner(self, rows: int) -> FillableRunner:
        if rows not in self._runners:
            shape = rows, self._regime.row_top_k(self._layer)
            load = torch.zeros(self._regime.shard(self._layer).num_local, dtype=torch.int64)
            nothing = Routing(torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape), load)
            self._runners[rows] = self._prepared(rows, [nothing])
        return self._runners[rows]

    def _prepared(self, rows: int, routings: Sequence[Routing]) -> FillableRunner:
        shard = self._regime.shard(self._layer)
        problem = Problem(self._layer, self._regime, rows, shard, as_draws(routings), self._device)
        runner = self._backend.prepare(problem)
        assert isinstance(runner, FillableRunner)
        return runner


def require_fillable(backend: Backend, layer: MoELayer) -> None:
    """Checks that the rows of a real layer can be given to a backend.

    Raises:
        UnsupportedError: they cannot.
    """
    if backend.name not in FILLABLE:
        raise UnsupportedError(
            f"dep-bench cannot give {backend.name} the rows that arrive.", f"Use --backend {', '.join(FILLABLE)}."
        )
    if backend.name == "flashinfer-cutlass" and layer.weight_on_input:
        raise UnsupportedError(
            "dep-bench gives flashinfer-cutlass the router's weights for the output, this layer has them on its input.",
            "Use --backend triton.",
        )
    if backend.name == "flashinfer-cutlass" and layer.precision is Precision.FP8_TENSOR:
        raise UnsupportedError(
            "dep-bench gives flashinfer-cutlass bf16 rows only, and this layer's inputs have one fp8 scale a tensor.",
            "Use --precision bf16.",
        )


def without_dispatch(regime: Regime) -> Regime:
    """Returns the regime of the same shards whose kernels get rows that no dispatcher has sent."""
    return regime.model_copy(update={"layout": None, "dispatch": "none", "attention_dp": False})
