"""The backends by name, imported when they are asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

from moetune.backends.base import Backend
from moetune.errors import UsageError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

AUTO = "auto"
"""In the place of a name: the backend that is `preferred`."""

_HOMES: Mapping[str, str] = {
    "triton": "moetune.backends.grouped_triton.backend:TritonBackend",
    "flashinfer-trtllm": "moetune.backends.flashinfer_trtllm.backend:TrtllmBackend",
    "flashinfer-trtllm-routed": "moetune.backends.flashinfer_trtllm.backend:TrtllmRoutedBackend",
    "flashinfer-cutlass": "moetune.backends.flashinfer_cutlass.backend:FlashInferCutlassBackend",
    "torch": "moetune.backends.plain_torch.backend:TorchBackend",
}
"""In the order of preference: `--backend auto` takes the first that can run and computes the layer."""


class Diagnosis(NamedTuple):
    """Whether a backend can run on this machine; if not, `reason` and `hint` say why and what to do."""

    name: str
    available: bool
    reason: str = ""
    hint: str = ""


def backends() -> tuple[str, ...]:
    """The names of all backends, available here or not, the preferred first."""
    return tuple(_HOMES)


def backend(name: str, **options: object) -> Backend:
    """A new backend.

    Args:
        name: one of `backends()`.
        options: what its class takes, as `kernel` and `remote` of triton.

    Raises:
        UsageError: no such name, an option that this backend has not, or a value that it refuses.
    """
    if name not in _HOMES:
        raise UsageError(f"Unknown backend {name!r}.", f"Backends: {', '.join(_HOMES)}.")
    if foreign := options.keys() - _options(name):
        owners = [other for other in _HOMES if foreign <= _options(other)]
        raise UsageError(
            f"Backend {name} has no {' and no '.join(sorted(foreign))} to choose.",
            f"Those that have: {', '.join(owners)}." if owners else "Leave the option out.",
        )
    return _home(name)(**options)


def preferred(layer: MoELayer, regime: Regime) -> Backend:
    """The first backend that can run here and computes the layer.

    Where none can run here it is the first that computes the layer elsewhere, so that what it lacks is said.
    """
    computing = [name for name in backends() if _why_not(name, layer, regime) is None]
    able_here = (name for name in computing if diagnosis(name).available)
    return backend(next(able_here, (computing or backends())[0]))


def able(layer: MoELayer, regime: Regime) -> tuple[list[Backend], dict[str, str]]:
    """The backends that can run here and compute the layer, the preferred first; and why the others cannot.

    That one does not compute the layer is said before what it lacks here.
    """
    found: list[Backend] = []
    left_out: dict[str, str] = {}
    for name in backends():
        if reason := _why_not(name, layer, regime):
            left_out[name] = reason
        elif (state := diagnosis(name)).available:
            found.append(backend(name))
        else:
            left_out[name] = state.reason
    return found, left_out


def _why_not(name: str, layer: MoELayer, regime: Regime) -> str | None:
    """Why a backend does not compute this layer: it says so, or it cannot be asked; else None."""
    try:
        return backend(name).unsupported(layer, regime)
    except (ImportError, OSError) as error:
        return _not_imported(error)


def _not_imported(error: Exception) -> str:
    return f"cannot be imported: {error}"


def chosen(asked: str | Backend, layer: MoELayer, regime: Regime) -> Backend:
    """The backend that is asked for: itself, by its name, or the preferred one for `AUTO`.

    Raises:
        UsageError: no such name.
    """
    if not isinstance(asked, str):
        return asked
    return preferred(layer, regime) if asked == AUTO else backend(asked)


def diagnose() -> list[Diagnosis]:
    """Every backend's state on this machine."""
    return [diagnosis(name) for name in _HOMES]


def diagnosis(name: str, **options: object) -> Diagnosis:
    """One backend's state on this machine; what it takes to find out is imported, and no more.

    Raises:
        UsageError: as `backend`.
    """
    try:
        obstacle = backend(name, **options).unavailable()
    except (ImportError, OSError) as error:  # OSError: a library of the system that a package loads
        return Diagnosis(name, False, _not_imported(error), "Reinstall moetune with its dependencies.")
    return Diagnosis(name, True) if obstacle is None else Diagnosis(name, False, *obstacle)


def _home(name: str) -> Callable[..., Backend]:
    module, _, attribute = _HOMES[name].partition(":")
    return cast(Callable[..., Backend], getattr(importlib.import_module(module), attribute))


def _options(name: str) -> frozenset[str]:
    return frozenset(inspect.signature(_home(name)).parameters)
