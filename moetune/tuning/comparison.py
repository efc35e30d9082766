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


class Comparison(FrozenModel):
    """All backends for one layer under one regime on one device.

    `families` has the result of each backend that ran, `left_out` those that could not run, each with the reason.
    `buckets` has one entry for each bucket in which any backend has a choice, ascending.
    """

    schema_version: Literal[1] = 1
    layer: MoELayer
    regime: Regime
    device: str
    families: tuple[BackendResult, ...]
    left_out: dict[str, str] = {}
    buckets: tuple[ComparedBucket, ...]
