"""What `tune` and `tune_all` tell while they work, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile


@dataclass(frozen=True, slots=True)
class Served:
    """The store had the whole answer; nothing was measured. `packaged`: it is one of those that come with moetune."""

    profile: Profile
    path: Path
    packaged: bool = False


@dataclass(frozen=True, slots=True)
class Resumed:
    """There is the journal of an interrupted run.

    It knows something of the buckets `rows`; `failed` tactics that failed in them are not tried again. `unread` names
    its lines that say nothing to this moetune.
    """

    rows: tuple[int, ...]
    failed: int
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BucketStarted:
    """Bucket `index` of `count` begins, its inputs ready: `tactics` candidates, the excluded ones and the reasons."""

    rows: int
    index: int
    count: int
    tactics: int
    excluded: Mapping[Tactic, str]


@dataclass(frozen=True, slots=True)
class TacticMeasured:
    """A tactic was timed for the first time in its bucket, or failed: then `time_us` is None and `reason` says why."""

    rows: int
    tactic: Tactic
    time_us: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BucketChosen:
    """Bucket `index` of `count` has its answer, and it is in the store."""

    choice: Choice
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class BucketsSkipped:
    """The time budget ended before these buckets began; the next run goes on with them."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SearchStopped:
    """The time budget ended a bucket's search early: `tried` of `tactics` candidates were timed."""

    rows: int
    tried: int
    tactics: int


@dataclass(frozen=True, slots=True)
class FamilyStarted:
    """`tune_all` turns to backend `index` of `count`; the events that follow are those of its tune."""

    backend: str
    index: int
    count: int


@dataclass(frozen=True, slots=True)
class FamilyFailed:
    """The tune of a backend ended early; the others go on."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class BucketCompared:
    """The choices of all backends are about to meet in bucket `index` of `count`."""

    rows: int
    index: int
    count: int


Event = (
    Served
    | Resumed
    | BucketStarted
    | TacticMeasured
    | SearchStopped
    | BucketChosen
    | BucketsSkipped
    | FamilyStarted
    | FamilyFailed
    | BucketCompared
)
OnEvent = Callable[[Event], None]
