"""The errors that moetune raises. Each has a message, a hint and the exit code of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Plain = bool | int | float | str | None


class MoetuneError(Exception):
    """Base of all moetune errors. `message` says what was given and what is allowed, `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".rstrip())
        self.message = message
        self.hint = hint


class UsageError(MoetuneError):
    """An input is wrong: a value out of range, an unknown name, or options that exclude each other."""

    exit_code = 2


class UnsupportedError(UsageError):
    """The input is valid, but the backend, dispatcher or machine does not support it."""


class RankError(MoetuneError):
    """Another rank of the group failed, so the ranks cannot choose a tactic together. The message names the rank."""


class LostRankError(RankError):
    """The ranks of a group no longer reach each other, or they do different things. No more can be agreed on."""


class NoResultError(MoetuneError):
    """Tuning ended without a valid measurement for some bucket."""


class DefaultFailedError(NoResultError):
    """The default tactic of a bucket failed or computes a wrong result, so nothing can be compared with it."""


class DeviceLostError(NoResultError):
    """A kernel broke the device's context, so nothing else can run on it in this process."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which a stored profile differs from the one that was looked up. None is a missing field."""

    field: str
    wanted: object
    stored: object

    def plain(self) -> dict[str, Plain]:
        """Returns `wanted` and `stored` as JSON values."""
        return {"wanted": _plain(self.wanted), "stored": _plain(self.stored)}


def _plain(value: object) -> Plain:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class MissError(MoetuneError):
    """No stored profile matches. `differences` are those of the nearest profile, whose file is `nearest`.

    `near`: whether that profile differs in versions only, so that `near=True` serves it. `taken_with`: the options of
    `moetune show` with which the same look-up takes it; empty if there are none.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        hint: str = "",
        differences: tuple[Difference, ...] = (),
        nearest: Path | None = None,
        *,
        near: bool = False,
        taken_with: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint)
        self.differences = differences
        self.nearest = nearest
        self.near = near
        self.taken_with = taken_with

    def hinting(self, hint: str) -> MissError:
        """Returns the same miss with another hint."""
        return MissError(self.message, hint, self.differences, self.nearest, near=self.near, taken_with=self.taken_with)


class StoreError(MoetuneError):
    """The store cannot be read or written."""


class CheckFailedError(MoetuneError):
    """Choices of a profile are slower than they may be, or do not run any more."""

    exit_code = 4


class NotSavedError(StoreError):
    """A tune has ended, and some of what it measured cannot be saved.

    `answer` has all of it: the profile, or the comparison of `tune_all`. `rows` names the buckets that are not saved,
    by backend.
    """

    exit_code = 5

    def __init__(self, message: str, hint: str, answer: object, rows: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(message, hint)
        self.answer = answer
        self.rows = rows


class DamagedProfileError(StoreError):
    """A file in the store is not a valid profile. It was renamed, not deleted."""


class NewerSchemaError(StoreError):
    """A profile was written by a newer moetune. It is left unchanged."""
