"""Defines what a backend, a set of kernels that moetune can tune, has to offer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from moetune.search.base import Search
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch

    from moetune.workload.draws import Draw, DrawKind


@dataclass(frozen=True, slots=True)
class Problem:
    """Holds what a kernel gets for one bucket. Every draw in `draws` has `rows` rows, padding included."""

    layer: MoELayer
    regime: Regime
    rows: int
    shard: Shard
    draws: tuple[Draw, ...]
    device: str = "cpu"

    @property
    def intermediate_size(self) -> int:
        """I/tp: the intermediate size of one expert on this rank."""
        return self.regime.intermediate_size(self.layer)

    @property
    def row_top_k(self) -> int:
        """The number of ids in a row: k, or 1 in the slot layout."""
        return self.regime.row_top_k(self.layer)

    def numbers(self, kind: DrawKind) -> tuple[int, ...]:
        """Returns the positions of the draws of one kind."""
        return tuple(number for number, draw in enumerate(self.draws) if draw.kind == kind)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Holds the tactics that may be timed for one bucket, and the excluded ones, each with the reason."""

    tactics: tuple[Tactic, ...]
    excluded: Mapping[Tactic, str] = field(default_factory=dict)


class Runner(Protocol):
    """A prepared problem: weights, inputs and routings lie on the device."""

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """Computes the layer once on this rank, on the routing and inputs of one draw: `[rows, hidden_size]`."""
        ...

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Computes the same output in fp32 by the plainest code: `[rows, hidden_size]` float32."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A set of kernels. It is cheap to construct and imports torch and the kernels only when a method needs them."""

    name: str

    def unavailable(self) -> tuple[str, str] | None:
        """Returns why it cannot run on this machine and what to do next; None if it can run."""
        ...

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why it does not compute this layer; None if it computes it."""
        ...

    def environment(self) -> dict[str, str]:
        """Returns strict environment fields of its own, such as versions and a digest of the kernel; may be empty."""
        ...

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns the tactics for one bucket. The default is one of them."""
        ...

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the tactic that runs where nothing is tuned."""
        ...

    def tolerance(self, layer: MoELayer) -> float:
        """Returns the largest relative Frobenius error against `Runner.reference` that a correct result may have."""
        ...

    def prepare(self, problem: Problem) -> Runner:
        """Puts weights, inputs and routings on the device."""
        ...


@runtime_checkable
class CompilesAhead(Protocol):
    """A backend whose tactics can be compiled before they are run: by other processes, which have no GPU."""

    def likely(self, problem: Problem, candidates: Candidates) -> Sequence[Tactic]:
        """The tactics of a bucket in the order in which its search will probably ask for them."""
        ...

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> Sequence[Hashable]:
        """What the code of each part of a tactic depends on: where keys are equal, compiling once is enough."""
        ...

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        """Compiles that part, by its place among the keys, into a cache on disk.

        There a run on a device of that compute capability finds it.

        Raises:
            Exception: whatever the compiler raises for a tactic that does not compile.
        """
        ...


@runtime_checkable
class Searches(Protocol):
    """A backend with too many tactics to time all: it knows a strategy, and what to expect of a tactic."""

    def search(self, problem: Problem, candidates: Candidates, starts: Sequence[Tactic]) -> Search:
        """A new search of one bucket.

        Args:
            problem: the bucket; its draws of kind `search` are the search's.
            candidates: what `Backend.candidates` gave for it.
            starts: tactics that were good in neighboring buckets, the best first; maybe none.
        """
        ...


@runtime_checkable
class ReportsPromising(Protocol):
    """A backend that warm-starts a bucket's search with more than the finalists of the buckets before."""

    def promising(self, times_us: Mapping[Tactic, float]) -> Sequence[Tactic]:
        """Returns what the next bucket's search gets as further `starts`, the best first.

        Args:
            times_us: everything that the search of one bucket measured.
        """
        ...


@runtime_checkable
class WarmsOnce(Protocol):
    """A backend whose tactics need no first run in a problem once they ran in another: nothing is compiled for it."""

    warm: set[Tactic]
    """The tactics that have run in this process; whoever runs one for the first time adds it."""


@runtime_checkable
class PacesFinal(Protocol):
    """A backend that says how long the interleaved rounds of one bucket's final may take, about, in seconds."""

    final_s: float
