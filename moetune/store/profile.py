"""`Profile`: all choices for one environment, layer, regime and backend, as versioned JSON."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from moetune.errors import NoResultError, UsageError
from moetune.quoting import enumerated, quoted
from moetune.spec.bounds import (
    MOST_BUCKETS,
    MOST_ENTRIES,
    MOST_EXPERTS,
    MOST_TACTICS,
    Count,
    FileNamePart,
    Name,
    Prose,
    Rows,
)
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.recording import RecordingSummary
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.spec.under import Under
from moetune.stats import geomean

SCHEMA_VERSION: Final = 1

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e15, le=1e15)]
Time = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e15)]
"""A time in µs."""
Gain = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e15)]
OrInfinity = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "Infinity"}]})]
"""A float. In JSON, infinity is the string `Infinity`."""
Stress = Annotated[dict[Name, OrInfinity], Field(max_length=MOST_ENTRIES)]


class Rejection(FrozenModel):
    """A tactic that could not win, and the reason."""

    tactic: Tactic
    reason: Prose


class ComparedRows(Under):
    """How a bucket's tactic compares at one of the row counts that map to the bucket.

    Attributes:
        rows: the row count.
        time_us: the tactic's mean time in µs over interleaved rounds. Each round uses one draw that the search did not
            use.
        default_tactic: what the engine would run with this many rows.
        gain: the default's mean time over the tactic's, in the rounds in which both were timed.
        gain_low, gain_high: the bounds of the gain's 95 % interval (paired bootstrap over these rounds).
        noise: the A/A noise, relative.
        slowdown: under several distributions the tactic's time over that of the fastest tactic that was compared.
    """

    rows: Rows
    time_us: Time
    default_tactic: Tactic
    gain: Gain
    gain_low: Finite
    gain_high: Finite
    noise: Finite
    slowdown: Finite | None = None


class Choice(FrozenModel):
    """The answer for one bucket.

    Attributes:
        rows: the bucket.
        met_rows: in profiles without `by_rows`, the bucket's typical rows; half of the draws had them, and the times
            and the gain are means over all draws. Else None.
        tactic: the chosen tactic.
        time_us: its mean time in µs at the bucket's own rows, or at the nearest row count of `by_rows`, under the main
            distribution.
        default_tactic: the default tactic at the bucket's own rows.
        default_source: where the default tactic is from: an engine's heuristic, or a tuned file that the engine ships.
            Empty if the backend has one source only, and in profiles that do not record it.
        default_time_us: `time_us` times the gain at the same row count. It is not a mean over all rounds, because a
            default that is much slower is not timed in every round.
        gain: the geometric mean of the gains of `by_rows`, each distribution with its weight.
        gain_low, gain_high: the bounds of its 95 % interval.
        noise: the largest A/A noise of `by_rows`, relative.
        by_rows: how the tactic compares at each of the row counts that stand for the bucket, ascending; at each under
            every distribution.
        regret_high: by how much another finalist may be faster at one of these row counts, at 95 %, relative.
        equally_fast: finalists that could serve the bucket just as well.
        stress_us: the tactic's time in µs for each factor on the busiest expert's load; infinite if it failed.
        default_stress_us: the same for the default tactic.
        tried: the number of tactics that the search timed, or that failed in it.
        candidates: the number of all tactics, also the excluded ones.
        eager: the reason why the tactic was timed without a CUDA graph, launch overhead included; empty if it was not.
        rejected: the tactics that could not win.
        load: the slots of each local expert, summed over the search's draws.
        max_load: the slots of the busiest local expert in any one of these draws.
        measured_at: ISO 8601, UTC.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    rows: Rows
    met_rows: Rows | None = None
    tactic: Tactic
    time_us: Time
    default_tactic: Tactic
    default_source: Name = ""
    default_time_us: Time
    gain: Gain
    gain_low: Finite
    gain_high: Finite
    noise: Finite
    by_rows: Annotated[tuple[ComparedRows, ...], Field(max_length=MOST_BUCKETS)] = ()
    regret_high: Finite | None = None
    equally_fast: Annotated[tuple[Tactic, ...], Field(max_length=MOST_TACTICS)] = ()
    stress_us: Stress = {}
    default_stress_us: Stress = {}
    tried: Count
    candidates: Count
    eager: Prose = ""
    rejected: Annotated[tuple[Rejection, ...], Field(max_length=MOST_TACTICS)] = ()
    load: Annotated[tuple[Count, ...], Field(max_length=MOST_EXPERTS)]
    max_load: Count
    measured_at: Name

    @model_validator(mode="after")
    def _measured_in_utc(self) -> Self:
        try:
            offset = self.measured_time.utcoffset()
        except ValueError:
            offset = None
        if offset != timedelta(0):
            raise UsageError(
                f"measured_at must be ISO 8601 in UTC, like 2026-01-31T12:00:00Z; given {quoted(self.measured_at)}."
            )
        return self

    def __repr__(self) -> str:
        tactic = " ".join(f"{name}={value}" for name, value in self.tactic.items())
        return f"Choice({self.rows} rows, {tactic}, {self.gain:.2f}x)"

    __str__ = __repr__

    @property
    def measured_time(self) -> datetime:
        """Returns `measured_at` as a point in time."""
        return datetime.fromisoformat(self.measured_at)


class Profile(FrozenModel):
    """All choices of one layer under one regime, by one backend in one environment.

    `recording` says which recording the regime names by its digest, the first one if there are several. It is in dumps
    only if there is one.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")  # a serializer of its own does not take that of `Choice`

    schema_version: Literal[1] = SCHEMA_VERSION
    layer: MoELayer
    regime: Regime
    backend: FileNamePart
    environment: Environment
    choices: Annotated[tuple[Choice, ...], Field(max_length=MOST_BUCKETS)]
    recording: RecordingSummary | None = None

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        if self.recording is None:
            dumped.pop("recording", None)
        return dumped

    @model_validator(mode="after")
    def _recording_by_digest(self) -> Self:
        for replay in self.regime.recordings:
            if replay.digest is None:
                raise UsageError(
                    "A profile names a recording by its digest, replay: and 16 hex digits; given "
                    f"{quoted(str(replay))}."
                )
        return self

    @model_validator(mode="after")
    def _choices_of_buckets(self) -> Self:
        rows = [choice.rows for choice in self.choices]
        if rows != sorted(set(rows)):
            raise UsageError(f"A profile's buckets must be ascending and distinct, given {enumerated(rows)}.")
        if self.regime.ladder.name == "adaptive":
            buckets: Collection[int] = range(1, self.regime.tune_max_num_tokens + 1)
        else:
            buckets = frozenset(self.regime.buckets)
        if others := [each for each in rows if each not in buckets]:
            raise UsageError(
                f"A profile has choices for its regime's buckets {enumerated(self.regime.buckets, 32)} only, given "
                f"{enumerated(others)}."
            )
        return self

    def __repr__(self) -> str:
        gain = f", {self.gain:.2f}x" if all(choice.gain > 0 for choice in self.choices) and self.choices else ""
        buckets = f"{len(self.choices)} bucket{'' if len(self.choices) == 1 else 's'}"
        return f"Profile({self.layer.name}, {self.regime.slug}, {self.backend}, {buckets}{gain})"

    __str__ = __repr__

    @property
    def rows(self) -> frozenset[int]:
        """Returns the buckets that have a choice."""
        return frozenset(choice.rows for choice in self.choices)

    @property
    def gain(self) -> float:
        """Returns the geometric mean of the choices' gains.

        Raises:
            NoResultError: the profile has no choice.
        """
        if not self.choices:
            raise NoResultError("The profile has no choice.", "Tune it first.")
        return geomean([choice.gain for choice in self.choices])

    def choice(self, rows: int) -> Choice:
        """Returns the choice of the bucket to which the regime's ladder maps `rows` run-time rows.

        The bucket can be without a choice: the ladder `hybrid` maps some rows to no bucket, a pool cannot have some
        buckets, and a profile can be incomplete. Then the choice is that of the smallest larger bucket that has one, or
        of the last bucket. Any integer is allowed; less than one row counts as one.

        Raises:
            NoResultError: the profile is empty.
        """
        return self.choices[bisect_right(self._steps[0], rows)]

    def tactic(self, rows: int) -> Tactic:
        """Returns the tactic of `choice(rows)`. From the second call on it takes less than a microsecond.

        Raises:
            NoResultError: the profile is empty.
        """
        steps, tactics = self._steps
        return tactics[bisect_right(steps, rows)]

    def merged(self, newer: Profile, *, replacing: bool = False) -> Profile:
        """Returns `newer` with this profile's choices added.

        Of two choices for one bucket the later measured one stays, and on a tie that of `newer`. Both profiles must
        answer the same question, which is not checked.

        Args:
            newer: the other profile.
            replacing: of two choices for one bucket that of `newer` stays, whenever they were measured.
        """
        choices = {choice.rows: choice for choice in self.choices}
        for choice in newer.choices:
            stored = choices.get(choice.rows)
            if replacing or stored is None or stored.measured_time <= choice.measured_time:
                choices[choice.rows] = choice
        return newer.model_copy(update={"choices": tuple(choices[rows] for rows in sorted(choices))})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Returns a copy as pydantic's `model_copy` does, without the cached steps of the original's choices."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("_steps", None)
        return copied

    @cached_property
    def _steps(self) -> tuple[tuple[int, ...], tuple[Tactic, ...]]:
        """Returns the row counts at which the next choice begins, and the tactic of every choice.

        The bucket of a ladder's look-up never decreases as rows grow, and is constant above the last bucket. So the
        steps describe the look-up completely, and bisection finds them.
        """
        if not self.choices:
            raise NoResultError("The profile has no choice.", "Tune it first.")
        buckets = [choice.rows for choice in self.choices]
        ladder, maximum = self.regime.ladder, self.regime.tune_max_num_tokens

        def position(rows: int) -> int:
            if ladder.name == "adaptive":
                rows = max(1, rows // ladder.divisor)
                return min(range(len(buckets)), key=lambda at: abs(buckets[at] - rows))
            return min(bisect_left(buckets, ladder.lookup(rows, maximum)), len(buckets) - 1)

        every_rows = range(maximum * ladder.divisor + 1)
        steps = tuple(bisect_right(every_rows, index, key=position) for index in range(len(buckets) - 1))
        return steps, tuple(choice.tactic for choice in self.choices)
