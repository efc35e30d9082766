"""Finds backends by name. A backend's module is imported only when the backend is made."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

from moetune.backends.base import Backend
from moetune.errors import UsageError
from moetune.inputs.suggestions import did_you_mean
from moetune.quoting import quoted
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

TORCH = "torch"
REINSTALL = "Reinstall moetune with its dependencies."
AUTO = "auto"
"""May be given instead of a backend's name: the preferred backend is taken; see `preferred`."""

_CLASSES: Mapping[str, str] = {
    "triton": "moetune.backends.grouped_triton.backend:TritonBackend",
    "batched-triton": "moetune.backends.batched_triton.backend:BatchedTritonBackend",
    "flashinfer-trtllm": "moetune.backends.flashinfer_trtllm.backend:TrtllmBackend",
    "flashinfer-trtllm-routed": "moetune.backends.flashinfer_trtllm.backend:TrtllmRoutedBackend",
    "triton-kernels": "moetune.backends.triton_kernels.backend:TritonKernelsBackend",
    "humming": "moetune.backends.humming.backend:HummingBackend",
    "marlin": "moetune.backends.marlin.backend:MarlinBackend",
    "flashinfer-cutlass": "moetune.backends.flashinfer_cutlass.backend:FlashInferCutlassBackend",
    "flashinfer-fp8-block": "moetune.backends.flashinfer_fp8_block.backend:FlashInferFp8BlockBackend",
    "deep-gemm": "moetune.backends.vllm_experts.backend:DeepGemmBackend",
    "batched-deep-gemm": "moetune.backends.vllm_experts.backend:BatchedDeepGemmBackend",
    "vllm-cutlass": "moetune.backends.vllm_experts.backend:VllmCutlassBackend",
    "torch": "moetune.backends.plain_torch.backend:TorchBackend",
}
"""The class of each backend, in the order of preference: `preferred` takes the first that fits and is no rival."""


class Diagnosis(NamedTuple):
    """Says whether a backend can run on this machine; if it cannot, `reason` says why and `hint` what to do next."""

    name: str
    available: bool
    reason: str = ""
    hint: str = ""


def backends() -> tuple[str, ...]:
    """Returns the names of all backends in the order of preference, whether they can run here or not."""
    return tuple(_CLASSES)


def backend(name: str, **options: object) -> Backend:
    """Makes a backend.

    Args:
        name: one of `backends()`.
        options: keyword arguments of the backend's class, such as `kernel` and `remote` of triton.

    Raises:
        UsageError: the name is unknown, the backend has no such option, or the option's value is not allowed.
    """
    if name not in _CLASSES:
        near = did_you_mean(name, _CLASSES)
        raise UsageError(f"Unknown backend {quoted(name)}.", f"{near} Choose one of {', '.join(_CLASSES)}.".lstrip())
    if unknown := options.keys() - _options(name):
        others = [other for other in _CLASSES if unknown <= _options(other)]
        raise UsageError(
            f"The backend {name} does not take {' or '.join(sorted(unknown))}.",
            f"Leave it out or choose a backend that takes it: {', '.join(others)}." if others else "Leave it out.",
        )
    return _class(name)(**options)


def of_environment(name: str, environment: Mapping[str, str]) -> Backend:
    """Returns the backend that measured a profile, with the options that its environment names.

    Args:
        name: one of `backends()`.
        environment: the strict fields of the profile's environment.

    Raises:
        UsageError: the name is unknown, or an option's value is not allowed.
    """
    made = backend(name)
    return backend(name, **made.options_in(environment))


def preferred(layer: MoELayer, regime: Regime) -> Backend:
    """Returns the first backend that can run here and computes the layer.

    If no backend can do both, returns the first one that computes the layer, so that the caller can report what is
    missing here.
    """
    computing = backends_computing(layer, regime)
    able_here = (name for name in computing if diagnosis(name).available)
    return backend(next(able_here, (computing or backends())[0]))


def backends_computing(layer: MoELayer, regime: Regime) -> list[str]:
    """Returns the names of the backends that tune the layer, whether they can run here or not. Rivals tune nothing."""
    return [name for name in _names(rivals=False) if _why_not(name, layer, regime) is None]


def rivals_computing(layer: MoELayer, regime: Regime) -> list[str]:
    """Returns the names of the rivals that compute the layer, whether they can run here or not."""
    return [name for name in backends() if _is_rival(name) and _why_not(name, layer, regime) is None]


def able(layer: MoELayer, regime: Regime, *, rivals: bool = False) -> tuple[list[Backend], dict[str, str]]:
    """Returns the backends that can run here and compute the layer, and the reason for each other backend.

    The backends are in the order of preference. If a backend neither computes the layer nor runs here, the reason
    names the layer.

    Args:
        layer: the layer.
        regime: the deployment.
        rivals: whether to look at rivals too.
    """
    found: list[Backend] = []
    left_out: dict[str, str] = {}
    for name in _names(rivals=rivals):
        if reason := _why_not(name, layer, regime):
            left_out[name] = reason
        elif (state := diagnosis(name)).available:
            found.append(backend(name))
        else:
            left_out[name] = state.reason
    return found, left_out


def _names(*, rivals: bool) -> list[str]:
    """Returns the names of the backends; without rivals those that tune, and those that cannot be imported."""
    return [name for name in backends() if rivals or not _is_rival(name)]


def _is_rival(name: str) -> bool:
    try:
        return backend(name).rival
    except (ImportError, OSError):
        return False


def _why_not(name: str, layer: MoELayer, regime: Regime) -> str | None:
    """Returns why a backend does not compute this layer or cannot be imported; None if it computes the layer."""
    try:
        return backend(name).unsupported(layer, regime)
    except (ImportError, OSError) as error:
        return _not_imported(error)


def _not_imported(error: Exception) -> str:
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing not in ("", "moetune"):
        return f"{missing} is not installed"
    return f"cannot be imported: {error}"


def chosen(given: str | Backend, layer: MoELayer, regime: Regime) -> Backend:
    """Returns a backend as it is given, makes it from its name, or makes the preferred one if `AUTO` is given.

    Raises:
        UsageError: the name is unknown.
    """
    if not isinstance(given, str):
        return given
    return preferred(layer, regime) if given == AUTO else backend(given)


def diagnose() -> list[Diagnosis]:
    """Returns for every backend whether it can run on this machine."""
    return [diagnosis(name) for name in _CLASSES]


def diagnosis(name: str, **options: object) -> Diagnosis:
    """Returns whether one backend can run on this machine. Imports only what this question needs.

    Raises:
        UsageError: as in `backend`.
    """
    try:
        obstacle = backend(name, **options).unavailable()
    except (ImportError, OSError) as error:  # OSError: a package cannot load a system library
        hint = f"pip install {TORCH}" if getattr(error, "name", None) == TORCH else REINSTALL
        return Diagnosis(name, False, _not_imported(error), hint)
    return Diagnosis(name, True) if obstacle is None else Diagnosis(name, False, *obstacle)


def _class(name: str) -> Callable[..., Backend]:
    module, _, attribute = _CLASSES[name].partition(":")
    return cast(Callable[..., Backend], getattr(importlib.import_module(module), attribute))


def _options(name: str) -> frozenset[str]:
    return frozenset(inspect.signature(_class(name)).parameters)
