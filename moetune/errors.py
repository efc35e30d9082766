"""Every error moetune raises: a message, a hint that says what to do next, and the CLI's exit code."""

from __future__ import annotations

from collections.abc import Mapping


class MoetuneError(Exception):
    """Base of all moetune errors. `message` says what was given and what is allowed, `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".rstrip())
        self.message = message
        self.hint = hint


class UsageError(MoetuneError):
    """A question that cannot be asked: a value out of range, an unknown name, options that exclude each other."""

    exit_code = 2


class UnsupportedError(UsageError):
    """A question that is well formed and that this backend, dispatcher or machine cannot answer."""


class NoResultError(MoetuneError):
    """Tuning ended without one valid measurement for some bucket."""


class DeviceLostError(NoResultError):
    """A kernel broke the device's context: nothing else can run on it in this process."""


class MissError(MoetuneError):
    """No stored profile matches. `differing` maps each differing field's Python name to (wanted, stored)."""

    exit_code = 3

    def __init__(
        self, message: str, hint: str = "", differing: Mapping[str, tuple[object, object]] | None = None
    ) -> None:
        super().__init__(message, hint)
        self.differing = dict(differing or {})


class StoreError(MoetuneError):
    """The store cannot be read or written."""


class DamagedProfileError(StoreError):
    """A profile file that is no valid profile; it was moved aside unharmed."""


class NewerSchemaError(StoreError):
    """A profile written by a newer moetune; it is left where it is."""
