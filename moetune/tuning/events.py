"""Defines the events that `tune`, `tune_all` and `check` report while they work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetune.errors import Difference
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile
from moetune.tuning.checked import CheckedBucket


@dataclass(frozen=True, slots=True)
class Served:
    """All choices were stored, so nothing was measured. `packaged`: the profile is one that comes with moetune.

    `differences` are the versions in which its environment differs, and its ladder if that has fewer buckets.
    """

    profile: Profile
    path: Path
    packaged: bool = False
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class Revalidated:
    """The tactics of an older profile are about to be checked. It differs from the question in `differences`."""

    profile: Profile
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Resumed:
    """The journal of an interrupted run was found.

    It has measurements of the buckets `rows`: `timed` tactics ran, and their times are not measured again; `failed`
    tactics failed and are not tried again. `unread` names the lines of the journal that this moetune cannot read.
    """

    rows: tuple[int, ...]
    failed: int
    timed: int = 0
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TuneStarted:
    """A tune begins to measure `count` buckets with one backend on the device of this name."""

    backend: str
    device: str
    count: int


@dataclass(frozen=True, slots=True)
class BucketStarted:
    """Bucket `index` of `count` begins. It has `tactics` candidates; `excluded` ones are listed with the reasons."""

    rows: int
    index: int
    count: int
    tactics: int
    excluded: Mapping[Tactic, str]


@dataclass(frozen=True, slots=True)
class DefaultDiffers:
    """The default of bucket `rows` is not what an engine runs; `warning` says why. Each text is reported once."""

    rows: int
    warning: str


@dataclass(frozen=True, slots=True)
class Throttled:
    """The GPU was slowed down by heat or by its power supply while `backend` was tuned, for these `reasons`."""

    backend: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TacticMeasured:
    """A tactic was timed for the first time in its bucket. If it failed, `time_us` is None and `reason` says why.

    `known`: an interrupted run did so, and it is not done again.
    """

    rows: int
    tactic: Tactic
    time_us: float | None
    reason: str = ""
    known: bool = False


@dataclass(frozen=True, slots=True)
class BucketChosen:
    """The choice of bucket `index` of `count` is made, and stored unless `NotSaved` was reported before."""

    choice: Choice
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class BucketChecked:
    """Bucket `index` of `count` of a check is compared."""

    checked: CheckedBucket
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class BucketFailed:
    """The default of bucket `rows` failed, so the bucket has no choice. The other buckets go on."""

    rows: int
    reason: str


@dataclass(frozen=True, slots=True)
class NotSaved:
    """The choice of bucket `rows` cannot be saved now. That is tried again after each bucket; `reason` says why."""

    rows: int
    reason: str


@dataclass(frozen=True, slots=True)
class NotJournaled:
    """The journal cannot be written, so a run after this one, if it is interrupted, measures its bucket again."""

    reason: str


@dataclass(frozen=True, slots=True)
class BucketsSkipped:
    """The time budget ended before these buckets began. The next run measures them."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SearchStopped:
    """The time budget ended a bucket's search early: `tried` of `tactics` candidates were timed."""

    rows: int
    tried: int
    tactics: int


@dataclass(frozen=True, slots=True)
class NoisyBucket:
    """The A/A noise of a bucket's final comparison was too large to decide.

    The comparison is taken again after the other buckets, at most `tries` more times. If that is 0, the default stays.
    """

    rows: int
    noise: float
    tries: int


@dataclass(frozen=True, slots=True)
class BackendStarted:
    """`tune_all` begins with backend `index` of `count`. The events that follow are those of its tune."""

    backend: str
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class BackendFailed:
    """The tune of a backend ended early. The other backends are tuned all the same."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class BucketCompared:
    """The choices of all backends are about to be timed side by side in bucket `index` of `count`."""

    rows: int
    index: int
    count: int


Event = (
    Served
    | Revalidated
    | Resumed
    | TuneStarted
    | BucketStarted
    | DefaultDiffers
    | TacticMeasured
    | SearchStopped
    | NoisyBucket
    | BucketChosen
    | BucketChecked
    | BucketFailed
    | NotSaved
    | NotJournaled
    | BucketsSkipped
    | Throttled
    | BackendStarted
    | BackendFailed
    | BucketCompared
)
OnEvent = Callable[[Event], None]
