"""A file system that fails at its n-th call that changes something."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import Any

import pytest

CHANGING = ("open", "write", "pwrite", "ftruncate", "fsync", "mkdir", "replace", "rename", "unlink", "fchmod", "fchown")


@dataclass
class FaultyFiles:
    """Counts the calls of this process that change files, and fails from the `first` one on.

    Attributes:
        first: the number of the first call that fails, from 1 on.
        lasting: whether the calls after it fail, too.
        code: the error's number. A write that fails has written the first half before.
        calls: the number of calls so far.
        failing: the names of the calls that failed.
    """

    first: int
    lasting: bool
    code: int = errno.ENOSPC
    calls: int = 0
    failing: list[str] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        return self.calls >= self.first

    def install(self, patched: pytest.MonkeyPatch) -> None:
        for name in CHANGING:
            patched.setattr(os, name, self._failing(name, getattr(os, name)))

    def _failing(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*arguments, **options)
            self.calls += 1
            if self.calls != self.first and not (self.lasting and self.has_failed):
                return real(*arguments, **options)
            self.failing.append(name)
            if name == "write":
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            raise OSError(self.code, os.strerror(self.code))

        return call
