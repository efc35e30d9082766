"""The backends by name, imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import NamedTuple

from moetune.backends.base import Backend
from moetune.errors import UsageError

_HOMES: Mapping[str, str] = {
    "torch": "moetune.backends.torch_ops:TorchBackend",
}


class Diagnosis(NamedTuple):
    """Whether a backend can run on this machine; if not, `reason` and `hint` say why and what to do."""

    name: str
    available: bool
    reason: str = ""
    hint: str = ""


def backends() -> tuple[str, ...]:
    """The names of all backends, available here or not."""
    return tuple(_HOMES)


def backend(name: str) -> Backend:
    """A new backend.

    Raises:
        UsageError: no such name.
    """
    if name not in _HOMES:
        raise UsageError(f"Unknown backend {name!r}.", f"Backends: {', '.join(_HOMES)}.")
    module, _, attribute = _HOMES[name].partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made


def diagnose() -> list[Diagnosis]:
    """Every backend's state on this machine."""
    return [_diagnosis(name) for name in _HOMES]


def _diagnosis(name: str) -> Diagnosis:
    try:
        obstacle = backend(name).unavailable()
    except ImportError as error:
        return Diagnosis(name, False, f"cannot be imported: {error}", "Reinstall moetune with its dependencies.")
    return Diagnosis(name, True) if obstacle is None else Diagnosis(name, False, *obstacle)
