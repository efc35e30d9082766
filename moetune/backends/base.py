"""Defines what a backend, a set of kernels that moetune can tune, has to offer."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from moetune.search.base import Search
from moetune.search.exhaustive import exhaustive
from moetune.search.revalidate import exchanged
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


@dataclass(frozen=True, slots=True)
class Default:
    """What runs where nothing is tuned.

    Attributes:
        tactic: the tactic.
        source: where it is from; empty if the backend does not say.
        warning: a sentence if an engine would run something else.
        hint: what to do if the tactic fails; empty if there is no other default.
    """

    tactic: Tactic
    source: str = ""
    warning: str = ""
    hint: str = ""


class Runner(Protocol):
    """A prepared problem: weights, inputs and routings lie on the device."""

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        """Computes the layer once on this rank, on the routing and inputs of one draw: `[rows, hidden_size]`."""
        ...

    def reference(self, draw: int = 0) -> torch.Tensor:
        """Computes the same output in fp32 by the plainest code: `[rows, hidden_size]` float32."""
        ...


@runtime_checkable
class FillsPart(Protocol):
    """A runner whose output has rows that mean nothing, as an expert-major buffer has behind each expert's rows."""

    def filled(self, output: torch.Tensor, draw: int) -> torch.Tensor:
        """Returns the other rows of an output of `run`: those that `reference` returns, in its order."""
        ...


class Inputs(NamedTuple):
    """The tensors that a runner reads for one draw: x `[M, H]`, ids int32 `[M, k]`, weights float32 `[M, k]`."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


@runtime_checkable
class FillableRunner(Runner, Protocol):
    """A runner whose inputs can be overwritten, as a real layer does with the rows that arrive."""

    def inputs(self, draw: int = 0) -> Inputs:
        """Returns the tensors that `run` and `reference` read for one draw. What is written into them is read next."""
        ...


class Backend(ABC):
    """A set of kernels. It is cheap to construct and imports torch and the kernels only when a method needs them.

    The abstract methods are what every backend has. The defaults of the others fit a backend with few tactics and
    nothing to compile. A backend can be pickled, because it runs in processes of its own.

    Attributes:
        name: the backend's name in options and profiles.
        final_s: about how many seconds one bucket's final comparison may take; None leaves that to the tune.
        warms_once: whether a tactic that has run in a process needs no first run in a later problem of that process,
            because nothing is compiled for a problem.
        expert_major: whether its kernels read the expert-major rows of the layout `batched`, and no others.
        rival: whether its kernels offer no choice, so that it is only timed, to be compared with others; see `Rival`.
        modules: what preparing and compiling import. A process of its own imports them as it starts.
    """

    name: str
    modules: tuple[str, ...] = ()
    final_s: float | None = None
    warms_once: bool = False
    expert_major: bool = False
    rival: bool = False

    def load(self) -> None:
        """Imports `modules`, which may take seconds, before there is a problem.

        What cannot be imported is left out: where it is needed, the same error is raised again.
        """
        for module in self.modules:
            with suppress(Exception):  # a package that cannot load a system library may raise anything
                importlib.import_module(module)

    @property
    def compiles(self) -> bool:
        """Whether it has an implementation of `compile`."""
        return type(self).compile is not Backend.compile

    @abstractmethod
    def unavailable(self) -> tuple[str, str] | None:
        """Returns why it cannot run on this machine and what to do next; None if it can run."""

    @abstractmethod
    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        """Returns why it does not compute this layer; None if it computes it."""

    def other_rows(self, regime: Regime) -> str | None:
        """Returns why the kernels do not read the rows of a deployment; None if they do."""
        if (regime.layout == "batched") == self.expert_major:
            return None
        if self.expert_major:
            return f"reads the expert-major rows of the layout batched, not those of {regime.layout or regime.dispatch}"
        return "reads rows with their ids, not the expert-major rows of the layout batched"

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Returns strict environment fields of its own, such as versions and a digest of the kernel; may be empty."""

    @classmethod
    def options_in(cls, environment: Mapping[str, str]) -> dict[str, Any]:
        """Returns the arguments of the class with which a backend has the fields of this strict environment."""
        return {name: environment[name] for name in inspect.signature(cls).parameters if name in environment}

    @abstractmethod
    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        """Returns the tactics for one bucket. The default is one of them."""

    @abstractmethod
    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the tactic that runs where nothing is tuned."""

    def explained_default(self, layer: MoELayer, regime: Regime, rows: int) -> Default:
        """Returns the result of `default` with its source. By default it has none."""
        return Default(self.default(layer, regime, rows))

    def heuristic(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns the tactic that runs where an engine has no tuned file either. By default it is `default`."""
        return self.default(layer, regime, rows)

    @abstractmethod
    def tolerance(self, layer: MoELayer) -> float:
        """Returns the largest relative Frobenius error against `Runner.reference` that a correct result may have."""

    @abstractmethod
    def prepare(self, problem: Problem) -> Runner:
        """Puts weights, inputs and routings on the device."""

    def search(self, problem: Problem, candidates: Candidates, warm_starts: Sequence[Tactic]) -> Search:
        """Returns a new search of one bucket. By default it times every tactic.

        Args:
            problem: the bucket. The search uses its draws of kind `search`.
            candidates: what `candidates` returned for it.
            warm_starts: tactics that were fast in neighboring buckets, the best first; may be empty.
        """
        return exhaustive(candidates.tactics)

    def promising(self, times_us: Mapping[Tactic, float]) -> Sequence[Tactic]:
        """Returns what the next bucket's search gets as warm starts after the finalists, the best first.

        Args:
            times_us: the mean times of all tactics that the search of one bucket measured.
        """
        return ()

    def neighbors(self, candidates: Candidates, tactic: Tactic, others: Sequence[Tactic]) -> Sequence[Tactic]:
        """Returns the candidates that may be fastest if `tactic` no longer is, the likeliest first.

        By default they take one value from one of `others` and the rest from `tactic`.

        Args:
            candidates: what `candidates` returned for the bucket.
            tactic: the tactic.
            others: the fastest tactics of other buckets, those of the nearest bucket first.
        """
        return exchanged(candidates.tactics, tactic, others)

    def likely(self, problem: Problem, candidates: Candidates) -> Sequence[Tactic]:
        """Returns the tactics of a bucket that are worth compiling ahead, in the order in which they are needed."""
        return ()

    def compile_keys(self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic) -> Sequence[Hashable]:
        """Returns one key for each part of a tactic that can be compiled before it runs, by a process without a GPU.

        A key is what the part's code depends on. Parts with equal keys are compiled once.
        """
        return ()

    def compile(
        self, layer: MoELayer, regime: Regime, rows: int, tactic: Tactic, part: int, capability: tuple[int, int]
    ) -> None:
        """Compiles one part of a tactic into a cache on disk, where a run on a GPU finds it.

        Args:
            layer: the layer to compile for.
            regime: the deployment to compile for.
            rows: the row count of the bucket.
            tactic: the tactic.
            part: the part's position in `compile_keys`.
            capability: the compute capability of the GPU.

        Raises:
            NotImplementedError: the backend has no parts to compile.
            Exception: whatever the compiler raises for a tactic that does not compile.
        """
        raise NotImplementedError(f"The backend {self.name} compiles nothing ahead.")
