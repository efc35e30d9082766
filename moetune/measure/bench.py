"""`Bench` times and checks the tactics of one prepared problem.

If a tactic raises an exception, the bench records the reason and never runs that tactic again. The other tactics are
still measured. A crash or a hang raises no exception; `worker` handles those by running the bench in another process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from moetune.backends.base import Backend, FillsPart, Problem
from moetune.errors import DeviceLostError
from moetune.measure.clock import Clock, TimedCall, clock_for
from moetune.measure.crowded import Crowded, held_by_others
from moetune.measure.reasons import is_out_of_memory, reason_of
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    import torch

Series = list[tuple[float, ...] | None]


class BenchLike(Protocol):
    """The interface of a bench for one problem: a `Bench` in this process, or a `WorkerBench`."""

    @property
    def failures(self) -> Mapping[Tactic, str]:
        """The tactics that did not run or gave a wrong result, each with the reason."""
        ...

    @property
    def eager(self) -> Mapping[Tactic, str]:
        """The tactics that were timed without a CUDA graph, each with the reason."""
        ...

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int], limit_us: float = math.inf) -> Series:
        """Times tactics; see `Bench.samples`."""
        ...

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Checks a tactic's output; see `Bench.check`."""
        ...


class Activity(StrEnum):
    """What a bench is doing. The values complete the sentence "It failed during …"."""

    IDLE = "a pause"
    PREPARE = "the preparation"
    WAIT = "a wait for memory that other processes hold"
    REFERENCE = "the reference computation"
    FIRST_RUN = "its first run"
    TIMING = "its timing"
    CHECK = "its check"


class Observer(Protocol):
    """Is notified before each activity of a bench, so that a crash can be attributed to a tactic."""

    def starts(self, activity: Activity, tactic: Tactic | None = None, runs: int = 1) -> None:
        """Is called before the activity starts.

        Args:
            activity: what the bench does next.
            tactic: the tactic that runs, or None if none does.
            runs: how often the tactic runs before the next notification.
        """
        ...

    def failed(self, tactic: Tactic, reason: str) -> None:
        """Is called when a tactic has failed. The bench does not run it again."""
        ...

    def eager(self, tactic: Tactic, reason: str) -> None:
        """Is called when a tactic was timed without a CUDA graph."""
        ...


class _NoObserver:
    def starts(self, activity: Activity, tactic: Tactic | None = None, runs: int = 1) -> None: ...

    def failed(self, tactic: Tactic, reason: str) -> None: ...

    def eager(self, tactic: Tactic, reason: str) -> None: ...


class Bench:
    """Times and checks the tactics of one problem on its device.

    Args:
        backend: the backend whose kernels are measured.
        problem: what the kernels compute. The arguments `draw` and `draws` of the methods are positions in its draws.
        clock: takes the times. By default `clock_for` the problem's device.
        observer: is notified of each activity.
        have_run: the tactics that have run in this process, one set for all benches of `backend`. The bench adds to it.
            If the backend's `warms_once` is true, they have no first run again.

    Attributes:
        failures: the tactics that did not run or gave a wrong result, each with the reason.
        eager: the tactics that were timed without a CUDA graph, launch overhead included, each with the reason.
    """

    def __init__(
        self,
        backend: Backend,
        problem: Problem,
        clock: Clock | None = None,
        observer: Observer | None = None,
        *,
        have_run: set[Tactic] | None = None,
    ) -> None:
        self.failures: dict[Tactic, str] = {}
        self.eager: dict[Tactic, str] = {}
        self._device = problem.device
        self._observer = observer or _NoObserver()
        self._crowded = Crowded(
            partial(held_by_others, problem.device),
            partial(is_lost, problem.device),
            lambda: self._observer.starts(Activity.WAIT),
        )
        self._runner = self._crowded.tried(partial(backend.prepare, problem))
        self._clock = clock or clock_for(problem.device)
        self._tolerance = backend.tolerance(problem.layer)
        self._warm = have_run if backend.warms_once and have_run is not None else set()
        self._references: dict[int, torch.Tensor] = {}
        self._right: set[tuple[Tactic, int]] = set()

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int], limit_us: float = math.inf) -> Series:
        """Returns paired samples in µs, in the order of `tactics`, with None for a tactic that failed.

        Sample i of every tactic is taken in the same round, on draw `draws[i]`. A tactic that is listed twice gets two
        independent series, which are an A/A comparison. If the tactics together do not fit into memory, each is timed
        alone.

        Args:
            tactics: what to time.
            draws: the number of a draw for each round.
            limit_us: how long one run may take in µs. A tactic whose first run takes longer is run once more, because
                the first may have compiled. If that takes longer too, the tactic fails before it is timed.

        Raises:
            DeviceLostError: a tactic failed and the device is unusable for this process.
        """
        for tactic in dict.fromkeys(tactics):
            self._warm_up(tactic, draws[0], limit_us)
        taken = iter(self._taken(tactics, draws))
        return [None if tactic in self.failures else tuple(next(taken)) for tactic in tactics]

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Returns whether the output on `draw` is within the backend's tolerance of the fp32 reference.

        Raises:
            DeviceLostError: the tactic failed and the device is unusable for this process.
        """
        from moetune.backends.reference import relative_error

        if tactic in self.failures or (tactic, draw) in self._right:
            return tactic not in self.failures
        if draw not in self._references:
            self._references[draw] = self._crowded.tried(partial(self._reference, draw))
        try:
            output = self._crowded.tried(partial(self._checked, tactic, draw))
            error = relative_error(output, self._references[draw])
        except Exception as raised:  # a kernel may raise anything
            self._fail_by_error(tactic, raised)
            return False
        if error <= self._tolerance:
            self._right.add((tactic, draw))
        else:  # also if the error is NaN
            self._fail(tactic, f"wrong result: relative error {error:.1e}, allowed {self._tolerance:.0e}")
        return tactic not in self.failures

    def _reference(self, draw: int) -> torch.Tensor:
        self._observer.starts(Activity.REFERENCE)
        return self._runner.reference(draw)

    def _checked(self, tactic: Tactic, draw: int) -> torch.Tensor:
        self._observer.starts(Activity.CHECK, tactic)
        output = self._runner.run(tactic, draw)
        return self._runner.filled(output, draw) if isinstance(self._runner, FillsPart) else output

    def _warmed(self, activity: Activity, tactic: Tactic, draw: int) -> float:
        """Runs a tactic once, untimed. Returns how long it took in µs."""
        self._observer.starts(activity, tactic)
        began = perf_counter()
        self._clock.warm_up(self._call(tactic), draw)
        return 1e6 * (perf_counter() - began)

    def _call(self, tactic: Tactic) -> TimedCall:
        return partial(self._runner.run, tactic)

    def _warm_up(self, tactic: Tactic, draw: int, limit_us: float) -> None:
        if tactic in self._warm or tactic in self.failures:
            return
        for activity in (Activity.FIRST_RUN, Activity.TIMING):
            try:
                taken_us = self._crowded.tried(partial(self._warmed, activity, tactic, draw))
            except Exception as error:
                self._fail_by_error(tactic, error)
                return
            if taken_us <= limit_us:
                self._warm.add(tactic)
                return
        self._fail(tactic, f"stopped: one run takes {taken_us / 1e3:.0f} ms, the limit is {limit_us / 1e3:.0f} ms")

    def _taken(self, tactics: Sequence[Tactic], draws: Sequence[int]) -> list[list[float]]:
        """Returns the samples of the tactics that have not failed, in µs.

        If a tactic fails, the samples taken so far are discarded and the others are timed again.
        """
        while running := [tactic for tactic in tactics if tactic not in self.failures]:
            current = running[0]

            def before(position: int, runs: int, running: Sequence[Tactic] = running) -> None:
                nonlocal current
                current = running[position]
                self._observer.starts(Activity.TIMING, current, runs)

            try:
                timed = partial(self._clock.paired_samples, [self._call(tactic) for tactic in running], draws, before)
                series = timed() if len(running) > 1 else self._crowded.tried(timed)
                if odd := _odd_times(running, series):
                    for tactic, time_us in odd.items():
                        self._fail(tactic, f"a time of {time_us:g} µs was read, so it disturbs the clock")
                    continue
                for position, reason in self._clock.eager.items():
                    self.eager[running[position]] = reason
                    self._observer.eager(running[position], reason)
                return series
            except Exception as error:
                too_many = is_out_of_memory(error) and len(running) > 1
                if not too_many:
                    self._fail_by_error(current, error)
            if too_many:
                alone = [(tactic, self._taken([tactic], draws)) for tactic in running]
                return [series for tactic, taken in alone for series in taken if tactic not in self.failures]
        return []

    def _fail_by_error(self, tactic: Tactic, error: Exception) -> None:
        self._fail(tactic, reason_of(error))
        if is_lost(self._device):
            raise DeviceLostError(f"{tactic} left {self._device} unusable for this process: {self.failures[tactic]}.")

    def _fail(self, tactic: Tactic, reason: str) -> None:
        self.failures[tactic] = reason
        self._observer.failed(tactic, reason)


def _odd_times(tactics: Sequence[Tactic], series: Sequence[Sequence[float]]) -> dict[Tactic, float]:
    """Returns the tactics with a time that no run can take, each with the first such time in µs."""
    return {
        tactic: next(time_us for time_us in taken if not 0 < time_us < math.inf)
        for tactic, taken in zip(tactics, series, strict=True)
        if not all(0 < time_us < math.inf for time_us in taken)
    }


def is_lost(device: str) -> bool:
    """Returns whether a kernel has broken this process's CUDA context.

    If not, it frees the memory that failed tactics held.
    """
    if not device.startswith("cuda"):
        return False
    import torch

    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception:  # CUDA repeats the error of the failed kernel on every later call
        return True
    return False
