"""What the backends share when they prepare a problem: weights that are kept, the number of inputs, e4m3's limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from moetune.backends.base import Problem

E4M3_MAX = 448.0
"""The largest finite e4m3 value (OCP OFP8; CUDA's `__NV_E4M3`)."""

INPUT_BYTES = 2**29
"""The most memory that the bf16 inputs of all draws may take. Draws beyond it repeat the inputs of earlier ones."""

W = TypeVar("W")


def num_inputs(problem: Problem) -> int:
    """Returns how many different bf16 inputs `[M, H]` a problem gets: one a draw, as long as `INPUT_BYTES` suffice."""
    return min(len(problem.draws), max(1, INPUT_BYTES // (2 * problem.rows * problem.layer.hidden_size)))


class WeightCache(Generic[W]):
    """Keeps a rank's weights from one bucket to the next. Holds the weights of one problem at a time.

    Weights depend on the layer, the shard, tensor parallelism, the seed and the device, but not on the rows. A pickled
    cache is empty, so that a backend can be sent to another process.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], W] | None = None

    def __reduce__(self) -> tuple[type[WeightCache[W]], tuple[()]]:
        return type(self), ()

    @property
    def filled(self) -> bool:
        """Whether any weights are kept."""
        return self._kept is not None

    def get(self, problem: Problem, make: Callable[[], W]) -> W:
        """Returns the problem's weights; calls `make` if those that are kept are of other experts."""
        key = (problem.layer.digest, problem.shard, problem.intermediate_size, problem.regime.seed, problem.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # frees the old weights before the new ones are made
            self._kept = key, make()
        return self._kept[1]
