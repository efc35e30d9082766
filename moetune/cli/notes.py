"""Writes the notes that a command prints on stderr about its request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moetune.spec.enums import ENGINE_TITLES

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.spec.layer import MoELayer
    from moetune.spec.regime import Regime

_HOPPER = 9
_GENERATIONS = {_HOPPER: "Hopper", 10: "Blackwell"}


def preferred_kernels(engine: str, backend: Backend, layer: MoELayer, regime: Regime) -> Iterator[str]:
    """Yields a note for each GPU generation, possibly the one here, on which `engine` prefers other kernels to Triton.

    Args:
        engine: the engine whose dispatcher is given.
        backend: the backend that will be tuned. There are no notes unless it is a Triton one.
        layer: the layer.
        regime: the regime.
    """
    from moetune.inputs.engine_flags import TRITON, engine_flags

    if backend.name not in TRITON:
        return
    for generation, other in preferred_to(backend, engine, layer, regime).items():
        title = ENGINE_TITLES[engine]
        yield (
            f"note: for {layer.precision.value} experts at EP {regime.ep_size} on {generation}, {title} prefers "
            f"{other} to Triton. Start it with {engine_flags(backend.name, layer.precision)[engine]}, "
            "or it reads no Triton file."
        )


def other_kernel(engine: str, backend: Backend) -> Iterator[str]:
    """Yields a warning if the kernel of one engine is timed for another."""
    from moetune.backends.grouped_triton.backend import TritonBackend

    if isinstance(backend, TritonBackend) and backend.kernel not in ("builtin", engine):
        kernel = ENGINE_TITLES[backend.kernel]
        yield f"warning: --kernel {backend.kernel} times {kernel}'s kernel. {ENGINE_TITLES[engine]} runs its own."


def preferred_to(backend: Backend, engine: str, layer: MoELayer, regime: Regime) -> dict[str, str]:
    """Returns what `engine` prefers to the backend by default, by GPU generation, possibly the one here.

    It is empty unless the engine runs the backend. For backends other than Triton's it is known for Hopper alone.
    """
    from moetune.inputs.engine_flags import TRITON, engine_flags, preferred_to_triton
    from moetune.inputs.hopper_kernels import on_hopper

    if engine not in engine_flags(backend.name, layer.precision):
        return {}
    if backend.name not in TRITON:
        kernel = on_hopper(engine, layer, regime) if _may_have(_HOPPER) else None
        other = kernel.name if kernel and kernel.backend != backend.name else ""
        return {_GENERATIONS[_HOPPER]: other} if other else {}
    others = {
        generation: preferred_to_triton(engine, layer.precision, regime.ep_size, capability, regime.layout)
        for capability, generation in _GENERATIONS.items()
        if _may_have(capability)
    }
    return {generation: other for generation, other in others.items() if other}


def _may_have(capability: int) -> bool:
    """Returns whether the GPU here has this major compute capability; True if there is no GPU."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == capability


def dp_alone(regime: Regime) -> str:
    """Returns a note on the dispatch and the layout that `--dp` without `--dispatch` implies."""
    from moetune.inputs import dispatcher

    dispatchers = dispatcher.matching(regime.dispatch, regime.layout)
    note = f"note: --dp alone means --dispatch {regime.dispatch} --layout {regime.layout}"
    note += f", as with {', '.join(dispatchers)}." if dispatchers else "."
    if any(name.startswith(("vllm:", "sglang:")) for name in dispatchers):
        return note
    return (
        f"{note} No dispatcher of vLLM or SGLang produces such rows. Give yours: --dispatch "
        "vllm:allgather_reducescatter, vllm:deepep_high_throughput or sglang:none, or the whole command as "
        "--launch 'vllm serve …'."
    )
