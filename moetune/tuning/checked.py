"""The records of a check: how the choices of a profile compare with the default and with a new search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.spec.under import Under, place
from moetune.stats import Ratio
from moetune.tuning.final_comparison import FinalSamples
from moetune.tuning.verdict import CLIFF, NOISY, StressTimes

SCHEMA_VERSION: Final = 1
Finding = Literal["holds", "beaten", "slower", "failed", "noisy"]


class CheckedRows(Under):
    """How a choice compares at one row count.

    Attributes:
        rows: the row count.
        default_tactic: what the engine would run with this many rows.
        gain: the default's time over the choice's. `gain_low` and `gain_high` are its 95 % bounds.
        lag: the choice's time over that of the tactic that a new tune chooses; 1 if that is the same tactic. `lag_low`
            and `lag_high` are its 95 % bounds.
        noise: the A/A noise.
    """

    rows: int
    default_tactic: Tactic
    gain: float
    gain_low: float
    gain_high: float
    lag: float
    lag_low: float
    lag_high: float
    noise: float

    @property
    def place(self) -> str:
        """Returns where it was compared: `8 rows`, or `8 rows under zipf:1`."""
        return place(self.rows, self.distribution)


class CheckedBucket(FrozenModel):
    """How the choice of one bucket compares under one distribution.

    Attributes:
        rows: the bucket.
        distribution: the distribution of its draws; all of them if the profile's regime has several.
        tactic: the choice.
        recorded_gain: the gain that the profile records.
        by_rows: the comparison at each row count that maps to the bucket; empty if the choice failed.
        rival: the tactic that a new tune chooses, or None if the choice failed.
        cliff_at: the smallest factor on the busiest expert's load at which the choice has a cliff, or None.
        finding: `holds`; `beaten` by the rival or `slower` than the default, by more than is allowed; `failed`; or
            `noisy`, so that nothing is decided.
        reason: why it does not hold; else an empty string.
    """

    rows: int
    distribution: str
    tactic: Tactic
    recorded_gain: float
    by_rows: tuple[CheckedRows, ...] = ()
    rival: Tactic | None = None
    cliff_at: int | None = None
    finding: Finding
    reason: str = ""


class Check(FrozenModel):
    """The result of a check of a profile.

    Attributes:
        layer, regime, backend: those of the profile.
        measured: the environment in which the profile was measured.
        environment: the environment of the check.
        within: by how much a choice may be slower, relative.
        buckets: the findings, by distribution and rows.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    layer: MoELayer
    regime: Regime
    backend: str
    measured: Environment
    environment: Environment
    within: float
    buckets: tuple[CheckedBucket, ...]

    def of(self, *findings: Finding) -> tuple[CheckedBucket, ...]:
        """Returns the buckets with one of these findings."""
        return tuple(bucket for bucket in self.buckets if bucket.finding in findings)


def compared_rows(
    comparisons: Sequence[FinalSamples], tactic: Tactic, rival: Tactic
) -> tuple[tuple[CheckedRows, ...], tuple[Ratio, ...]]:
    """Returns how `tactic` compares at each row count, ascending, and the rival's times over its times."""
    rows, reverse = [], []
    for samples in sorted(comparisons, key=lambda samples: samples.rows):
        gain = samples.gain(tactic)
        lag = samples.ratio(tactic, rival) if tactic != rival else Ratio(1.0, 1.0, 1.0)
        reverse.append(samples.ratio(rival, tactic) if tactic != rival else lag)
        rows.append(
            CheckedRows(
                rows=samples.rows,
                default_tactic=samples.default,
                gain=gain.value,
                gain_low=gain.low,
                gain_high=gain.high,
                lag=lag.value,
                lag_low=lag.low,
                lag_high=lag.high,
                noise=samples.noise,
                distribution=samples.distribution,
            )
        )
    return tuple(rows), tuple(reverse)


def finding_of(by_rows: Sequence[CheckedRows], reverse: Sequence[Ratio], within: float) -> tuple[Finding, str]:
    """Returns whether a choice holds, and why not.

    It is slower if at some row count its time exceeds the default's by more than `within`, at 95 %. It is beaten if at
    some row count its time exceeds the rival's by more than `within`, at 95 %, and the rival loses less at every other
    one. A bucket has one tactic for several row counts, so of two good ones each can be the faster one somewhere.

    Args:
        by_rows: the comparison at each row count.
        reverse: the rival's time over the choice's, at each row count.
        within: by how much the choice may be slower, relative.
    """
    noisiest = max(by_rows, key=lambda each: each.noise)
    if noisiest.noise > NOISY:
        return "noisy", f"A/A noise of {100 * noisiest.noise:.1f} % at {noisiest.place}"
    slowest = min(by_rows, key=lambda each: each.gain_high)
    if slowest.gain_high < 1 / (1 + within):
        return "slower", f"slower than the default by {100 / slowest.gain - 100:.1f} % at {slowest.place}"
    worst = max(by_rows, key=lambda each: each.lag_low)
    if worst.lag_low > 1 + within and worst.lag > max(ratio.value for ratio in reverse):
        return "beaten", f"slower than another tactic by {100 * worst.lag - 100:.1f} % at {worst.place}"
    return "holds", ""


def cliff_at(tactic: Tactic, stress_us: StressTimes, usual_us: Mapping[Tactic, float]) -> int | None:
    """Returns the smallest factor on the busiest expert's load at which a tactic has a cliff, or None.

    A cliff is as in `verdict.cliffs`, for the default too.

    Args:
        tactic: the tactic.
        stress_us: the times under stress, also of others.
        usual_us: the mean times in µs without stress; a tactic that is missing counts as fast as any.
    """
    for factor, time_us in sorted(stress_us.get(tactic, {}).items(), key=lambda item: int(item[0])):
        best = min(stress_us, key=lambda other: stress_us[other][factor])
        usual = max(1.0, usual_us.get(tactic, 0.0) / usual_us.get(best, float("inf")))
        if time_us > CLIFF * usual * stress_us[best][factor]:
            return int(factor)
    return None
