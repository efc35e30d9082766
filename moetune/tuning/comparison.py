"""Defines `Comparison`, the profiles of several backends and the fastest one in each bucket, as versioned JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moetune.errors import Plain
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.store.profile import Profile

Finite = Annotated[float, Field(allow_inf_nan=False)]
Ratio = Annotated[float, Field(allow_inf_nan=False, ge=1)]


class BackendResult(FrozenModel):
    """The result of one backend.

    `profile` is its profile, in the file `path`, or None if it has none. `served`: the profile was stored and nothing
    was measured. `packaged`: it came with moetune. `near` and `neutral`: the versions in which a served profile's
    environment differs, those that can change ranks and those that cannot. `measured_ladder`: its ladder, if that has
    fewer buckets than the regime's. `failed` says why its tune ended early; the profile then has the buckets before
    that. `flags`: the flags that select these kernels, by engine.
    """

    backend: str
    profile: Profile | None
    path: str = ""
    served: bool = False
    packaged: bool = False
    near: dict[str, dict[str, Plain]] = {}
    neutral: dict[str, dict[str, Plain]] = {}
    measured_ladder: str | None = None
    failed: str = ""
    flags: dict[str, str]


class ComparedBucket(FrozenModel):
    """One bucket's choices side by side.

    `times_us`: each backend's mean time. If `interleaved`, all were timed in the same rounds; else these are the
    profiles' times. `ratio` is the time of `runner_up` over that of `winner`, with its 95 % bounds; `noise` is the A/A
    noise. `decided`: the bounds lie beyond the noise; otherwise it is too close to call. Bounds and noise are None if
    the times are not interleaved, and then nothing is decided. `failed`: the backends that did not run side by side,
    each with the reason.
    """

    rows: int
    times_us: dict[str, Finite]
    winner: str
    runner_up: str | None = None
    ratio: Finite | None = None
    ratio_low: Finite | None = None
    ratio_high: Finite | None = None
    noise: Finite | None = None
    interleaved: bool = False
    decided: bool = False
    failed: dict[str, str] = {}


class FlagRange(FrozenModel):
    """Neighboring buckets in which one flag is the fastest, or as fast as the fastest within the noise.

    `first_rows`, `last_rows`: the smallest and the largest of these buckets. `backend`: what `flag` selects.
    """

    first_rows: int
    last_rows: int
    flag: str
    backend: str


class FlagCost(FrozenModel):
    """What a flag costs in some buckets against the fastest flag in each of them.

    `mean`: the geometric mean of its slowdowns. `worst`: the largest slowdown, at `worst_rows` rows.
    """

    mean: Ratio
    worst: Ratio
    worst_rows: int


class FlagResult(FrozenModel):
    """One flag of an engine.

    `backend`: the backend that it selects. `decode`, `prefill`: what it costs there; None if there are no such buckets,
    or if its kernels have no time in some of them, the `missing` ones.
    """

    flag: str
    backend: str
    decode: FlagCost | None
    prefill: FlagCost | None
    missing: tuple[int, ...] = ()


class FlagAnswer(FrozenModel):
    """The flags of one engine.

    `decode_rows`: buckets up to this row count are decode, larger ones prefill. `ranges`: the fastest flag by row
    count, with as few changes as the noise allows. `flags`: each flag and what it costs, the cheapest first.
    `decode_flag`, `prefill_flag`: the cheapest flag for a pool of its own; None if there are no such buckets.
    `one_flag`: the cheapest flag for both; None if no flag has a time in every bucket. `default`: the backend that the
    engine runs without a flag, None if that is not known or has no time. `interleaved`: whether all flags were timed
    side by side in every bucket; if not, small differences say nothing.
    """

    decode_rows: int
    ranges: tuple[FlagRange, ...]
    flags: tuple[FlagResult, ...]
    decode_flag: str | None
    prefill_flag: str | None
    one_flag: str | None
    default: str | None = None
    interleaved: bool

    def result(self, flag: str | None) -> FlagResult | None:
        """Returns the result of a flag; None if it has none."""
        return next((each for each in self.flags if each.flag == flag), None)


class Comparison(FrozenModel):
    """All backends for one layer under one regime on one device.

    `families` has the result of each backend that ran, `left_out` those that could not run, each with the reason.
    `buckets` has one entry for each bucket in which any backend has a choice, ascending. `answers`: by engine, the
    flags that select the fastest kernels, for each engine that can run one of the backends.
    """

    schema_version: Literal[1] = 1
    layer: MoELayer
    regime: Regime
    device: str
    families: tuple[BackendResult, ...]
    left_out: dict[str, str] = {}
    buckets: tuple[ComparedBucket, ...]
    answers: dict[str, FlagAnswer] = {}
