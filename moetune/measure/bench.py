"""`Bench`: one prepared problem that answers how long a tactic takes and whether it is right.

A tactic that raises costs that tactic and nothing else: it is remembered with its reason and never run again. What an
exception cannot tell (a crash, a hang) needs a process that may die: see `worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

from moetune.backends.base import Backend, Problem, WarmsOnce
from moetune.errors import DeviceLostError
from moetune.measure.clock import Clock, clock_for
from moetune.measure.reasons import is_out_of_memory, reason_of
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch

Series = list[tuple[float, ...] | None]


class BenchLike(Protocol):
    """What answers for one problem: a `Bench` in this process, or one in a worker."""

    @property
    def failures(self) -> Mapping[Tactic, str]:
        """The tactics that did not run or ran wrong, each with the reason."""
        ...

    @property
    def eager(self) -> Mapping[Tactic, str]:
        """The tactics that were timed without a CUDA graph, each with the reason."""
        ...

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> Series:
        """See `Bench.samples`."""
        ...

    def check(self, tactic: Tactic, draw: int) -> bool:
        """See `Bench.check`."""
        ...


class Activity(StrEnum):
    """What a bench is at, in words that follow "during"."""

    IDLE = "a pause"
    PREPARE = "the preparation"
    REFERENCE = "the reference computation"
    FIRST_RUN = "its first run"
    TIMING = "its timing"
    CHECK = "its check"


class Watch(Protocol):
    """Is told what a bench does before it does it, so that nothing can happen that nobody answers for."""

    def touch(self, activity: Activity, tactic: Tactic | None = None, runs: int = 1) -> None:
        """`tactic`, if it is about one, is about to run `runs` times."""
        ...

    def failed(self, tactic: Tactic, reason: str) -> None:
        """`tactic` failed, and will not be touched again."""
        ...

    def eager(self, tactic: Tactic, reason: str) -> None:
        """`tactic` was timed without a CUDA graph."""
        ...


class _Unwatched:
    def touch(self, activity: Activity, tactic: Tactic | None = None, runs: int = 1) -> None: ...

    def failed(self, tactic: Tactic, reason: str) -> None: ...

    def eager(self, tactic: Tactic, reason: str) -> None: ...


class Bench:
    """Times and checks the tactics of one problem on its device.

    Args:
        backend: the family of kernels.
        problem: what they are given; `draws` below are positions in its draws.
        clock: how time is taken; the device's own by default.
        watch: is told what happens.

    Attributes:
        failures: the tactics that did not run or ran wrong, each with the reason.
        eager: the tactics that were timed without a CUDA graph, launch overhead included, each with the reason.
    """

    def __init__(
        self, backend: Backend, problem: Problem, clock: Clock | None = None, watch: Watch | None = None
    ) -> None:
        self.failures: dict[Tactic, str] = {}
        self.eager: dict[Tactic, str] = {}
        self._device = problem.device
        self._watch = watch or _Unwatched()
        self._runner = backend.prepare(problem)
        self._clock = clock or clock_for(problem.device)
        self._tolerance = backend.tolerance(problem.layer)
        self._warm = backend.warm if isinstance(backend, WarmsOnce) else set()
        self._references: dict[int, torch.Tensor] = {}
        self._right: set[tuple[Tactic, int]] = set()

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> Series:
        """Paired samples in µs, by position of `tactics`; None for one that failed.

        Sample i of every tactic is taken in the same round, on draw `draws[i]`. Naming a tactic twice gives two
        independent series of it: an A/A comparison. Tactics that fit into memory only one at a time are timed so.

        Raises:
            DeviceLostError: a tactic failed so that nothing can run on the device any more.
        """
        for tactic in dict.fromkeys(tactics):
            self._warm_up(tactic, draws[0])
        taken = iter(self._taken(tactics, draws))
        return [None if tactic in self.failures else tuple(next(taken)) for tactic in tactics]

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Whether the output on `draw` is within the backend's tolerance of the fp32 reference.

        Raises:
            DeviceLostError: the tactic failed so that nothing can run on the device any more.
        """
        from moetune.backends.reference import relative_error

        if tactic in self.failures or (tactic, draw) in self._right:
            return tactic not in self.failures
        if draw not in self._references:
            self._watch.touch(Activity.REFERENCE)
            self._references[draw] = self._runner.reference(draw)
        self._watch.touch(Activity.CHECK, tactic)
        try:
            error = relative_error(self._runner.run(tactic, draw), self._references[draw])
        except Exception as raised:  # a kernel may raise anything
            self._blame(tactic, raised)
            return False
        if error <= self._tolerance:
            self._right.add((tactic, draw))
        else:  # NaN too
            self._fail(tactic, f"wrong result: relative error {error:.1e}, allowed {self._tolerance:.0e}")
        return tactic not in self.failures

    def _call(self, tactic: Tactic) -> Callable[[int], object]:
        return partial(self._runner.run, tactic)

    def _warm_up(self, tactic: Tactic, draw: int) -> None:
        if tactic in self._warm or tactic in self.failures:
            return
        self._watch.touch(Activity.FIRST_RUN, tactic)
        try:
            self._clock.warm_up(self._call(tactic), draw)
            self._warm.add(tactic)
        except Exception as error:
            self._blame(tactic, error)

    def _taken(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> list[list[float]]:
        """The samples of the tactics that have not failed; one that fails meanwhile costs the round of all."""
        while running := [tactic for tactic in tactics if tactic not in self.failures]:
            touched = running[0]

            def before(position: int, runs: int, running: Sequence[Tactic] = running) -> None:
                nonlocal touched
                touched = running[position]
                self._watch.touch(Activity.TIMING, touched, runs)

            try:
                series = self._clock.paired_samples([self._call(tactic) for tactic in running], draws, before)
                for position, reason in self._clock.eager.items():
                    self.eager[running[position]] = reason
                    self._watch.eager(running[position], reason)
                return series
            except Exception as error:
                crowded = is_out_of_memory(error) and len(running) > 1
                if not crowded:
                    self._blame(touched, error)
            if crowded:
                alone = [(tactic, self._taken([tactic], draws)) for tactic in running]
                return [series for tactic, taken in alone for series in taken if tactic not in self.failures]
        return []

    def _blame(self, tactic: Tactic, error: Exception) -> None:
        self._fail(tactic, reason_of(error))
        if is_lost(self._device):
            raise DeviceLostError(f"{tactic} left {self._device} unusable for this process: {self.failures[tactic]}.")

    def _fail(self, tactic: Tactic, reason: str) -> None:
        self.failures[tactic] = reason
        self._watch.failed(tactic, reason)


def is_lost(device: str) -> bool:
    """Whether an earlier kernel broke this process's CUDA context; if not, what failed tactics held is freed."""
    if not device.startswith("cuda"):
        return False
    import torch

    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception:  # the error is sticky, and already known
        return True
    return False
