"""Lets the ranks of a group time the tactics of one `tune` together: the first rank tunes, and all ranks take times.

The first rank's benches send each request to all ranks, which answer it on a bench of their own. A time is that of the
slowest rank.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from moetune.engine.exchange import Exchange
from moetune.engine.op_bench import on_ranks, slowest_samples
from moetune.engine.ranks import attempt, gather, leads, said
from moetune.errors import NoResultError, RankError
from moetune.spec.tactic import Tactic

if TYPE_CHECKING:
    from moetune.backends.base import Backend, Problem
    from moetune.measure.bench import BenchLike, Series
    from moetune.measure.worker import OpenBenches

T = TypeVar("T")


@dataclass(frozen=True)
class _Request:
    """What the first rank asks of all benches with one number.

    `released`: the numbers of the benches that are no longer needed. With `prepare`, `given` is the problem, otherwise
    the arguments of the bench's method.
    """

    act: Literal["prepare", "samples", "check"]
    bench: int
    given: Any
    released: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Answer:
    """What one rank's bench returned, and which of the tactics have failed on it or were timed without a CUDA graph."""

    value: Any
    failures: Mapping[Tactic, str]
    eager: Mapping[Tactic, str]


@dataclass(frozen=True)
class _End:
    """The end of the tune: its result, or why it failed on the first rank."""

    result: list[Any]
    reason: str | None


@dataclass(eq=False)
class _Benches:
    """The benches of one rank, by number. `device`: the torch device of its problems."""

    bench_of: Callable[[Problem], BenchLike]
    device: str
    benches: dict[int, BenchLike] = field(default_factory=dict)

    def answer(self, request: _Request) -> _Answer | None:
        """Does what the first rank asks."""
        for number in request.released:
            self.benches.pop(number, None)
        if request.act == "prepare":
            self.benches[request.bench] = self.bench_of(replace(request.given, device=self.device))
            return None
        bench = self.benches[request.bench]
        value: Any
        if request.act == "check":
            tactic, draw = request.given
            tactics, value = (tactic,), bench.check(tactic, draw)
        else:
            tactics, draws, limit_us = request.given
            value = bench.samples(tactics, draws, limit_us)
        return _Answer(value, _of(tactics, bench.failures), _of(tactics, bench.eager))


def _of(tactics: Sequence[Tactic], reasons: Mapping[Tactic, str]) -> dict[Tactic, str]:
    return {tactic: reasons[tactic] for tactic in tactics if tactic in reasons}


@dataclass(eq=False)
class SharedBench:
    """`BenchLike` of the first rank, which all ranks answer.

    Attributes:
        failures: the tactics that failed or were wrong on any rank, each with the reason, which names the rank.
        eager: the tactics that were timed without a CUDA graph on any rank, each with the reason.
    """

    ask: Callable[[_Request], list[_Answer]]
    number: int
    ranks: Exchange
    failures: dict[Tactic, str] = field(default_factory=dict)
    eager: dict[Tactic, str] = field(default_factory=dict)

    def samples(self, tactics: Sequence[Tactic], draws: Sequence[int], limit_us: float = math.inf) -> Series:
        """Returns the largest over the ranks of each sample; see `Bench.samples`."""
        running = [tactic for tactic in tactics if tactic not in self.failures]
        if not running:
            return [None] * len(tactics)
        answers = self._asked("samples", (running, list(draws), limit_us))
        series = iter(slowest_samples([answer.value for answer in answers]))
        return [next(series) if tactic in running else None for tactic in tactics]

    def check(self, tactic: Tactic, draw: int) -> bool:
        """Returns whether the output is right on every rank; see `Bench.check`."""
        if tactic in self.failures:
            return False
        return all(answer.value for answer in self._asked("check", (tactic, draw)))

    def _asked(self, act: Literal["samples", "check"], given: Any) -> list[_Answer]:
        answers = self.ask(_Request(act, self.number, given))
        self.failures |= on_ranks([answer.failures for answer in answers], self.ranks)
        self.eager |= on_ranks([answer.eager for answer in answers], self.ranks)
        return answers


@dataclass(eq=False)
class _Leader:
    """The first rank's side: opens shared benches, and asks all ranks."""

    ranks: Exchange
    open_benches: OpenBenches
    number: int = 0
    released: list[int] = field(default_factory=list)

    @contextmanager
    def open(self, backend: Backend, device: str, isolate: bool) -> Iterator[Callable[[Problem], BenchLike]]:
        """Yields a function that prepares a problem on all ranks and returns its shared bench."""
        with self.open_benches(backend, device, isolate) as bench_of:
            own = _Benches(bench_of, device)

            def ask(request: _Request) -> list[_Answer]:
                released, self.released[:] = tuple(self.released), ()
                request = replace(request, released=released)
                gather(request, self.ranks)
                made, error = attempt(partial(own.answer, request))
                return self._answers(made, error)

            def shared(problem: Problem) -> BenchLike:
                self.number += 1
                ask(_Request("prepare", self.number, problem))
                bench = SharedBench(ask, self.number, self.ranks)
                weakref.finalize(bench, self.released.append, self.number)
                return bench

            yield shared

    def _answers(self, made: list[Any], error: Exception | None) -> list[Any]:
        answers = gather((made, said(error)), self.ranks)
        if error is not None:
            raise error
        for rank, (_, reason) in enumerate(answers):
            if reason is not None:
                raise NoResultError(f"{self.ranks.name(rank)} failed: {reason}.", "See its log.")
        return [answer for (answer,), _ in answers]


def tuned_together(
    tune: Callable[[OpenBenches], T],
    open_benches: OpenBenches,
    backend: Backend,
    device: str,
    ranks: Exchange,
) -> T:
    """Returns the result of a tune whose times all ranks take. Every rank must call it.

    Args:
        tune: tunes in this process, on the benches that it is given a function to open. The first rank calls it.
        open_benches: opens this rank's own benches.
        backend: the backend of the tune.
        device: this rank's torch device.
        ranks: the ranks.

    Raises:
        LostRankError: a rank is missing.
        RankError: the tune failed on the first rank.
        Exception: what `tune` raised here.
    """
    ranks.step = f"the tune of {backend.name}"
    if leads(ranks):
        leader = _Leader(ranks, open_benches)
        made, error = attempt(lambda: tune(leader.open))
        gather(_End(made, said(error)), ranks)
        if error is not None:
            raise error
        return made[0]
    with open_benches(backend, device, False) as bench_of:
        own = _Benches(bench_of, device)
        while True:
            request = gather(None, ranks)[0]
            if isinstance(request, _End):
                break
            answer, error = attempt(partial(own.answer, request))
            gather((answer, said(error)), ranks)
    if request.reason is not None:
        raise RankError(f"{ranks.name(0)}, which tunes for all, failed: {request.reason}.", "See its log.")
    result: T = request.result[0]
    return result
