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
CLIFF = 2.0
"""A finalist slower than this times the default on a stress draw cannot win."""
SECONDS = 2.0
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
    alike, as long as enough rounds remain.

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
            series = [[times[number] for number in quiet] if times else [] for times in series]
            break
    kept = {t: tuple(times) for t, times in zip(finalists, series[1:-1], strict=True) if t not in bench.failures}
    return Final(default, tuple(series[0]), noise_floor(series[0], series[-1]), kept)


def decide(final: Final, bench: BenchLike, stress_draws: Mapping[str, int]) -> Verdict:
    """The fastest finalist that beats the default beyond noise and falls off no cliff; else the default.

    Args:
        final: who played.
        bench: where finalists are timed under stress.
        stress_draws: the bench's draws on which the busiest expert has a factor of its load, by that factor.
    """
    cliffs: dict[Tactic, str] = {}
    for tactic, series in sorted(final.finalists.items(), key=lambda item: sum(item[1])):
        ratio = paired_ratio(series, final.default_us)
        if ratio.high >= 1 - final.noise:
            break
        if median(series) >= median(final.default_us):
            continue  # its mean is better by a few disturbed rounds alone
        stress_us, default_stress_us = _stress(bench, tactic, final.default, stress_draws)
        cliff = next((f for f in stress_us if stress_us[f] > CLIFF * default_stress_us[f]), None)
        if cliff is None:
            return Verdict(tactic, series, paired_ratio(final.default_us, series), stress_us, default_stress_us, cliffs)
        slower = stress_us[cliff] / default_stress_us[cliff]
        cliffs[tactic] = (
            f"cliff: {slower:.1f} times the default's time with the busiest expert at {cliff} times its load"
        )
    stress_us, _ = _stress(bench, final.default, final.default, stress_draws)
    gain = paired_ratio(final.default_us, final.default_us)
    return Verdict(final.default, final.default_us, gain, stress_us, stress_us, cliffs)


def _stress(
    bench: BenchLike, tactic: Tactic, default: Tactic, stress_draws: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Median times in µs of a tactic and of the default on each stress draw, by its factor."""
    mine: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for factor, draw in stress_draws.items():
        for times, series in zip((mine, theirs), bench.samples((tactic, default), [draw] * 3), strict=True):
            times[factor] = median(series) if series else float("inf")
    return mine, theirs
