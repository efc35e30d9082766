"""`Comparison`: the profiles of several backends and who is fastest in each bucket, as versioned JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.store.profile import Profile

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Family(FrozenModel):
    """What became of one backend.

    `profile` is its answer, in the file `path`: None where it has none. `served`: nothing of it was measured.
    `packaged`: it came with moetune. `failed` says what ended its tune; the profile then has the buckets before that.
    `flags`: what selects these kernels, by engine.
    """

    backend: str
    profile: Profile | None
    path: str = ""
    served: bool = False
    packaged: bool = False
    failed: str = ""
    flags: dict[str, str]


class ComparedBucket(FrozenModel):
    """One bucket's choices side by side.

    `times_us`: where `interleaved` each backend's mean over the same rounds, else its own as it was tuned. `ratio`
    is the time of `runner_up` over that of `winner`, with its 95 % bounds; `noise` the A/A noise floor.
    `decided`: the bounds lie beyond the noise, else it is too close to call. Bounds and noise are None where times are
    not interleaved, and nothing is decided then. `failed`: the backends that did not run in the final, and why.
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
    """All families of one layer under one regime on one device. `left_out`: the backends that could not try, and why.

    `buckets`: one for each in which any family has a choice, ascending.
    """

    schema_version: Literal[1] = 1
    layer: MoELayer
    regime: Regime
    device: str
    families: tuple[Family, ...]
    left_out: dict[str, str] = {}
    buckets: tuple[ComparedBucket, ...]
