"""The final of a bucket: the default and the finalists side by side, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from moetune.errors import NoResultError
from moetune.spec.tactic import Tactic
from moetune.stats import Ratio, median, noise_floor, paired_ratio

if TYPE_CHECKING:
    from moetune.measure.bench import BenchLike

STRESS_FACTORS = (2, 3, 4)
"""A finalist is also timed with the busiest expert at these times its load."""
STRESS_SAMPLES = 3
CLIFF = 2.0
"""A finalist that is slower than this times the best of all, the default included, on a stress draw cannot win."""
SECONDS = 1.0
"""About how long the interleaved rounds of one final may take."""
SAMPLES = (20, 96)
"""The least and the most paired samples of a final."""
TRIES = 3
"""How often a final is prolonged when too many of its rounds were disturbed."""
DISTURBED = 1.25
"""A round is disturbed where the default's two times differ by more than this factor."""


@dataclass(frozen=True, slots=True)
class Final:
    """Paired samples in µs of the default and of every finalist; `noise` is the A/A noise floor of the default."""

    default: Tactic
    default_us: tuple[float, ...]
    noise: float
    finalists: Mapping[Tactic, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The tactic that won, its samples, its gain over the default, and who lost the win to a cliff."""

    tactic: Tactic
    samples_us: tuple[float, ...]
    gain: Ratio
    stress_us: Mapping[str, float]
    default_stress_us: Mapping[str, float]
    cliffs: Mapping[Tactic, str]


def play(
    bench: BenchLike,
    default: Tactic,
    finalists: Sequence[Tactic],
    draws: Sequence[int],
    seconds: float = SECONDS,
) -> Final:
    """Interleaves the default, the finalists and the default again (A/A), on `draws` in turn.

    A round in which the default took two different times says nothing about the others either: it is dropped for all
    alike, as long as enough rounds remain. A finalist that fails in any round is no finalist any more.

    Raises:
        NoResultError: the default failed.
    """
    tactics = (default, *finalists, default)
    once = bench.samples(tactics, draws[:1])
    round_us = sum(series[0] for series in once if series)
    least, most = SAMPLES
    rounds = min(most, max(least, int(seconds * 1e6 / max(round_us, 1.0))))
    turns = cycle(draws)
    series: list[list[float]] = [[] for _ in tactics]
    for _ in range(TRIES):
        for times, taken in zip(series, bench.samples(tactics, list(islice(turns, rounds))), strict=True):
            times.extend(taken or ())
        if default in bench.failures:
            raise NoResultError(f"The default tactic {default} failed in the final: {bench.failures[default]}.")
        pairs = enumerate(zip(series[0], series[-1], strict=True))
        quiet = [number for number, pair in pairs if max(pair) <= DISTURBED * min(pair)]
        if len(quiet) >= least:
            break
    else:
        quiet = list(range(len(series[0])))
    kept = {
        tactic: tuple(times[number] for number in quiet)
        for tactic, times in zip(finalists, series[1:-1], strict=True)
        if tactic not in bench.failures
    }
    first, again = ([times[number] for number in quiet] for times in (series[0], series[-1]))
    return Final(default, tuple(first), noise_floor(first, again), kept)


def decide(final: Final, bench: BenchLike, stress_draws: Mapping[str, int]) -> Verdict:
    """The fastest finalist that beats the default beyond noise, and neither fails nor falls off a cliff under stress.

    Where there is none it is the default.

    Args:
        final: who played.
        bench: where finalists are timed under stress.
        stress_draws: the bench's draws on which the busiest expert has a factor of its load, by that factor.
    """
    better = [
        tactic
        for tactic, series in sorted(final.finalists.items(), key=lambda item: sum(item[1]))
        if paired_ratio(series, final.default_us).high < 1 - final.noise
        and median(series) < median(final.default_us)  # else its mean is better by a few disturbed rounds alone
    ]
    stress_us = _stress(bench, (final.default, *better), stress_draws)
    cliffs: dict[Tactic, str] = {}
    for tactic in better:
        if tactic in bench.failures:
            continue
        if cliff := _cliff(tactic, stress_us):
            cliffs[tactic] = cliff
            continue
        series = final.finalists[tactic]
        gain = paired_ratio(final.default_us, series)
        return Verdict(tactic, series, gain, stress_us[tactic], stress_us[final.default], cliffs)
    unchanged = paired_ratio(final.default_us, final.default_us)
    of_default = stress_us[final.default]
    return Verdict(final.default, final.default_us, unchanged, of_default, of_default, cliffs)


def _stress(
    bench: BenchLike, tactics: Sequence[Tactic], stress_draws: Mapping[str, int]
) -> dict[Tactic, dict[str, float]]:
    """Median times in µs of each tactic on each stress draw, by its factor; infinite where it failed."""
    draws = [draw for _ in range(STRESS_SAMPLES) for draw in stress_draws.values()]
    taken = bench.samples(tactics, draws)
    return {
        tactic: {
            factor: median(series[at :: len(stress_draws)]) if series else float("inf")
            for at, factor in enumerate(stress_draws)
        }
        for tactic, series in zip(tactics, taken, strict=True)
    }


def _cliff(tactic: Tactic, stress_us: Mapping[Tactic, Mapping[str, float]]) -> str | None:
    """Where a tactic falls off, in words, or None."""
    for factor, time_us in stress_us[tactic].items():
        best_us = min(times[factor] for times in stress_us.values())
        if time_us > CLIFF * best_us:
            return (
                f"cliff: {time_us / best_us:.1f} times the best finalist's time with the busiest expert at {factor} "
                "times its load"
            )
    return None
