"""`Profile`: every choice of one (environment, layer, regime, backend), as versioned JSON."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PrivateAttr, model_validator

from moetune.errors import UsageError
from moetune.spec.environment import Environment
from moetune.spec.layer import FrozenModel, MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

SCHEMA_VERSION = 1


class Rejection(FrozenModel):
    """A tactic that could not win, and why."""

    tactic: Tactic
    reason: str


class Choice(FrozenModel):
    """The answer for one bucket.

    Times are medians of interleaved rounds, each a mean over the regime's draws. `gain` is default_time / time,
    with the bounds of its 95 % interval (paired bootstrap over rounds and draws). `noise` is the A/A noise floor: by how much
    two timings of the same tactic differed, relative. `stress_us` maps the factor on the busiest expert's load
    to the chosen tactic's time, `default_stress_us` to the default's. `load` is the number of slots of each local expert
    summed over all draws, `max_load` the busiest expert's in any one draw. `measured_at` is ISO 8601, UTC.
    """

    rows: int
    tactic: Tactic
    time_us: float
    default_tactic: Tactic
    default_time_us: float
    gain: float
    gain_low: float
    gain_high: float
    noise: float
    stress_us: dict[str, float] = {}
    default_stress_us: dict[str, float] = {}
    tried: int
    candidates: int
    rejected: tuple[Rejection, ...] = ()
    load: tuple[int, ...]
    max_load: int
    measured_at: str


class Profile(FrozenModel):
    """All choices of one layer under one regime, by one backend in one environment."""

    schema_version: Literal[1] = SCHEMA_VERSION
    layer: MoELayer
    regime: Regime
    backend: str
    environment: Environment
    choices: tuple[Choice, ...]
    _table: dict[int, Tactic] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _one_choice_a_bucket(self) -> Self:
        rows = [choice.rows for choice in self.choices]
        if rows != sorted(set(rows)):
            raise UsageError(f"A profile's buckets must be ascending and distinct, given {rows}.")
        return self

    def choice(self, rows: int) -> Choice:
        """The choice that `rows` run-time rows look up, by the regime's ladder."""
        raise NotImplementedError

    def tactic(self, rows: int) -> Tactic:
        """The tactic for `rows` run-time rows, in under a microsecond."""
        raise NotImplementedError
