"""Chooses the backend of a command and reads the options that only this backend has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from moetune.errors import UnsupportedError, UsageError
from moetune.quoting import quoted

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.spec.layer import MoELayer
    from moetune.spec.regime import Regime

_NONE: Mapping[str, str] = MappingProxyType({})
_OF_ENGINE: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("sglang", "triton"): {"remote": "zero"},
    ("sglang", "marlin"): {"formula": "sglang"},
    ("sglang", "flashinfer-cutlass"): {"caller": "sglang"},
}
"""What an engine's own kernel does, by engine and backend, if no option that selects a kernel is given."""
_ANY_KERNEL = {"engine_configs", "mxfp4_activations"}
"""Options that leave open which engine's kernel is computed."""
_BOOLEANS = {"true": True, "false": False}


def choose(
    name: str | None, given: Mapping[str, str], engine: str | None, layer: MoELayer, regime: Regime
) -> tuple[Backend, bool]:
    """Returns the backend, and whether it was left to moetune.

    Args:
        name: a backend's name, `auto` or None.
        given: options of the backend, as text by name. They alone can determine the backend.
        engine: the engine whose dispatcher is given. It decides what its kernels do if `given` does not.
        layer: the layer, and
        regime: the regime that `auto` has to compute.

    Raises:
        UsageError: an unknown backend, an option that it does not have, or a value that it refuses.
    """
    from moetune.backends import registry

    named = backend_named(name, given, regime)
    if named is None:
        return registry.preferred(layer, regime), True
    of_engine = _NONE if given.keys() - _ANY_KERNEL else engine_options(engine, named)
    return backend_with(named, {**of_engine, **given}), False


def backend_named(name: str | None, given: Mapping[str, str], regime: Regime) -> str | None:
    """Returns the backend's name; None if neither the name nor an option in `given` determines one.

    Backends whose kernels do not read the rows of the deployment are left aside.

    Raises:
        UsageError: no backend, or more than one, has all options in `given`.
    """
    from moetune.backends import registry

    if name is not None and name != registry.AUTO:
        return name
    if not given:
        return None
    having = owners(given)
    if len(having) > 1:
        having = [found for found in having if registry.backend(found).other_rows(regime) is None] or having
    if len(having) == 1:
        return having[0]
    keys = ", ".join(given)
    if having:
        raise UsageError(f"More than one backend has the option {keys}.", f"Give --backend {' or '.join(having)}.")
    raise UsageError(f"No backend has the option {keys}.", _all_options())


def owners(keys: Iterable[str]) -> list[str]:
    """Returns the names of the backends that have all these options."""
    from moetune.backends import registry

    return [name for name in registry.backends() if set(keys) <= option_types(name).keys()]


def engine_options(engine: str | None, backend: str) -> Mapping[str, str]:
    """Returns the options with which `backend` computes what the engine's own kernel computes."""
    return _OF_ENGINE.get((engine or "", backend), _NONE)


def options_of_engine(engine: str | None) -> dict[str, Mapping[str, str]]:
    """Returns `engine_options` of every backend for which the engine has some."""
    return {backend: options for (name, backend), options in _OF_ENGINE.items() if name == engine}


def backend_of_engine(engine: str, layer: MoELayer, regime: Regime) -> Backend | None:
    """Returns the backend to name if a command selects none: one that computes the layer and that the engine can run.

    Those that can run here come first, then moetune's order of preference. None if the engine can run none of them.
    """
    from moetune.backends import registry
    from moetune.inputs.engine_flags import engine_flags, reaches

    names = [
        name
        for name in registry.backends_computing(layer, regime)
        if engine in engine_flags(name, layer.precision, regime.layout) and reaches(name, regime.layout)
    ]
    if regime.layout == "pool" or (engine == "trtllm" and regime.attention_dp):
        names.sort(key=lambda name: name != "flashinfer-trtllm-routed")
    here = [name for name in names if registry.diagnosis(name).available]
    return next((backend_with(name, engine_options(engine, name)) for name in (*here, *names)), None)


def require_kernels_of(engine: str, layer: MoELayer, regime: Regime) -> None:
    """Checks that kernels that the engine runs can run here, because it reads no result of others.

    Raises:
        UnsupportedError: the engine runs none of moetune's kernels for this layer, or they cannot run here.
    """
    from moetune.backends.registry import backends_computing
    from moetune.spec.enums import ENGINE_TITLES

    title, backend = ENGINE_TITLES[engine], backend_of_engine(engine, layer, regime)
    trial = ", or give --backend torch for a trial of moetune" if "torch" in backends_computing(layer, regime) else ""
    if backend is None:
        raise UnsupportedError(
            f"{title} runs none of moetune's kernels for {layer.precision.value} experts of this deployment.",
            f"Run `moetune plan` to see the load{trial}.",
        )
    if obstacle := backend.unavailable():
        raise UnsupportedError(
            f"{title} runs these experts with {backend.name}, which cannot run here: {obstacle[0]}.",
            f"Run this on a GPU of the kind that you deploy on{trial}.",
        )


def backend_with(name: str, given: Mapping[str, str]) -> Backend:
    """Returns the backend with its options read from text.

    Raises:
        UsageError: as `choose`.
    """
    from moetune.backends import registry

    types = option_types(name) if given else {}
    for key in given:
        if key not in types:
            having = owners([key])
            raise UsageError(
                f"Backend {name} has no option {key}.",
                f"Backends with it: {', '.join(having)}." if having else _options_line(name),
            )
    return registry.backend(name, **{key: _value(name, key, text, types[key]) for key, text in given.items()})


def read_pairs(pairs: Iterable[str], named: Mapping[str, str] = _NONE) -> dict[str, str]:
    """Returns the values of `--backend-option KEY=VALUE`, added to those in `named`.

    Raises:
        UsageError: a pair without a key or without `=`, or a key that is given twice.
    """
    found = dict(named)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(
                f"--backend-option takes KEY=VALUE, given {quoted(pair)}.",
                "Example: --backend-option fp8_block_layout=plain.",
            )
        if key in found:
            raise UsageError(f"The backend's option {key} is given twice.", "Give it once.")
        found[key] = value.strip()
    return found


def option_types(name: str) -> dict[str, Any]:
    """Returns the options that a backend's class takes, each with its type, `None` taken out of a union."""
    from moetune.backends import registry

    hints = get_type_hints(type(registry.backend(name)).__init__)
    hints.pop("return", None)
    return {key: _without_none(hint) for key, hint in hints.items()}


def allowed(name: str, key: str, hint: Any) -> tuple[str, ...]:
    """Returns the values that backend `name` accepts for its option; empty if its type allows any number or text."""
    if hint is bool:
        return tuple(_BOOLEANS)
    values = get_args(hint) if get_origin(hint) is Literal else ()
    return tuple(str(value) for value in values if _accepted(name, key, value))


def _accepted(name: str, key: str, value: object) -> bool:
    from moetune.backends import registry

    try:
        registry.backend(name, **{key: value})
    except UsageError:
        return False
    return True


def _without_none(hint: Any) -> Any:
    kept = [part for part in get_args(hint) if part is not type(None)]
    return kept[0] if type(None) in get_args(hint) and len(kept) == 1 else hint


def _value(name: str, key: str, text: str, hint: Any) -> Any:
    values = allowed(name, key, hint)
    if values and text not in values:
        raise UsageError(f"The backend's option {key} must be {' or '.join(values)}, given {quoted(text)}.")
    if hint is bool:
        return _BOOLEANS[text]
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"The backend's option {key} must be an integer, given {quoted(text)}.") from None
    return text


def _options_line(name: str) -> str:
    return f"Its options: {', '.join(found)}." if (found := option_types(name)) else "It has no options."


def _all_options() -> str:
    from moetune.backends import registry

    found = [f"{name}: {', '.join(types)}" for name in registry.backends() if (types := option_types(name))]
    return f"Options are {'; '.join(found)}."
