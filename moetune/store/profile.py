"""`Profile`: every choice of one (environment, layer, regime, backend), as versioned JSON."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from moetune.errors import NoResultError, UsageError
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.stats import geomean

SCHEMA_VERSION: Final = 1

Finite = Annotated[float, Field(allow_inf_nan=False)]
OrInfinity = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "Infinity"}]})]
"""A float that JSON has as the string `Infinity` if it is infinite."""


class Rejection(FrozenModel):
    """A tactic that could not win, and why."""

    tactic: Tactic
    reason: str


class Choice(FrozenModel):
    """The answer for one bucket: `rows`, by which it is looked up.

    `met_rows`: where they are others, the rows of half the draws that it was timed on (see `workload.draws`).

    `time_us` is the mean over interleaved rounds, each on one of the regime's draws that the search has not seen.
    `gain` is the default's mean time over the tactic's, in the rounds in which both were timed, with the bounds of its
    95 % interval (paired bootstrap over these rounds), and `default_time_us` the product of the two: a default that is
    far behind is not timed in every round. `noise` is the A/A noise floor: by how much two timings of one tactic can be
    said to differ, relative. `stress_us` maps the factor on the busiest expert's load to the chosen tactic's time,
    `default_stress_us` to the default's; infinite where it failed. `tried` counts the tactics that the search timed or
    saw fail, `candidates` all, excluded ones too. `eager` says why the tactic was timed without a CUDA graph, launch
    overhead included. `load` is the number of slots of each local expert summed over the search's draws, `max_load` the
    busiest expert's in any one. `measured_at` is ISO 8601, UTC.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    rows: int
    met_rows: int | None = None
    tactic: Tactic
    time_us: Finite
    default_tactic: Tactic
    default_time_us: Finite
    gain: Finite
    gain_low: Finite
    gain_high: Finite
    noise: Finite
    stress_us: dict[str, OrInfinity] = {}
    default_stress_us: dict[str, OrInfinity] = {}
    tried: int
    candidates: int
    eager: str = ""
    rejected: tuple[Rejection, ...] = ()
    load: tuple[int, ...]
    max_load: int
    measured_at: str

    @model_validator(mode="after")
    def _measured_in_utc(self) -> Self:
        try:
            offset = self.measured_time.utcoffset()
        except ValueError:
            offset = None
        if offset != timedelta(0):
            raise UsageError(
                f"measured_at must be ISO 8601 in UTC, like 2026-01-31T12:00:00Z; given {self.measured_at!r}."
            )
        return self

    def __repr__(self) -> str:
        tactic = " ".join(f"{name}={value}" for name, value in self.tactic.items())
        return f"Choice({self.rows} rows, {tactic}, {self.gain:.2f}x)"

    __str__ = __repr__

    @property
    def measured_time(self) -> datetime:
        """`measured_at` as a point in time."""
        return datetime.fromisoformat(self.measured_at)


class Profile(FrozenModel):
    """All choices of one layer under one regime, by one backend in one environment."""

    schema_version: Literal[1] = SCHEMA_VERSION
    layer: MoELayer
    regime: Regime
    backend: str
    environment: Environment
    choices: tuple[Choice, ...]

    @model_validator(mode="after")
    def _choices_of_buckets(self) -> Self:
        rows = [choice.rows for choice in self.choices]
        if rows != sorted(set(rows)):
            raise UsageError(f"A profile's buckets must be ascending and distinct, given {rows}.")
        if foreign := set(rows) - set(self.regime.buckets):
            raise UsageError(
                f"A profile's choices are of its regime's buckets {list(self.regime.buckets)}, given {sorted(foreign)}."
            )
        return self

    def __repr__(self) -> str:
        gain = f", {self.gain:.2f}x" if all(choice.gain > 0 for choice in self.choices) and self.choices else ""
        buckets = f"{len(self.choices)} bucket{'' if len(self.choices) == 1 else 's'}"
        return f"Profile({self.layer.name}, {self.regime.slug}, {self.backend}, {buckets}{gain})"

    __str__ = __repr__

    @property
    def gain(self) -> float:
        """The geometric mean of the choices' gains.

        Raises:
            NoResultError: the profile has no choice.
        """
        if not self.choices:
            raise NoResultError("The profile has no choice.", "Tune it first.")
        return geomean([choice.gain for choice in self.choices])

    def choice(self, rows: int) -> Choice:
        """The choice that `rows` run-time rows look up, by the regime's ladder.

        Where the ladder's bucket has no choice (FlashInfer's uncapped miss, a bucket that a pool cannot have, a profile
        that is not complete yet) it is that of the smallest larger bucket that has one, else of the last. Any integer
        is allowed; less than one row counts as one.

        Raises:
            NoResultError: the profile is empty.
        """
        return self.choices[bisect_right(self._steps[0], rows)]

    def tactic(self, rows: int) -> Tactic:
        """The tactic of `choice(rows)`, in under a microsecond once the first call has laid out the steps.

        Raises:
            NoResultError: the profile is empty.
        """
        steps, tactics = self._steps
        return tactics[bisect_right(steps, rows)]

    def merged(self, newer: Profile) -> Profile:
        """`newer` with this profile's buckets added: of two choices of one bucket the later measured one stays.

        On a tie `newer`'s choice stays. Both must answer the same question; that is the caller's to know.
        """
        choices = {choice.rows: choice for choice in self.choices}
        for choice in newer.choices:
            stored = choices.get(choice.rows)
            if stored is None or stored.measured_time <= choice.measured_time:
                choices[choice.rows] = choice
        return newer.model_copy(update={"choices": tuple(choices[rows] for rows in sorted(choices))})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without the steps cached for the choices of the original."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("_steps", None)
        return copied

    @cached_property
    def _steps(self) -> tuple[tuple[int, ...], tuple[Tactic, ...]]:
        """The rows at which the look-up moves on to the next choice, and every choice's tactic.

        A ladder's look-up never falls as rows grow, and stays where it is past the last bucket, so the steps can be
        found by bisection and say all of it.
        """
        if not self.choices:
            raise NoResultError("The profile has no choice.", "Tune it first.")
        buckets = [choice.rows for choice in self.choices]
        ladder, maximum = self.regime.ladder, self.regime.tune_max_num_tokens

        def position(rows: int) -> int:
            return min(bisect_left(buckets, ladder.lookup(rows, maximum)), len(buckets) - 1)

        every_rows = range(maximum * ladder.divisor + 1)
        steps = tuple(bisect_right(every_rows, index, key=position) for index in range(len(buckets) - 1))
        return steps, tuple(choice.tactic for choice in self.choices)
