"""Starts the processes of a tune before torch is imported, where it is plain that something will be measured."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from moetune.backends import registry
from moetune.backends.base import Backend
from moetune.errors import MoetuneError
from moetune.inputs.presets import layer as layer_of
from moetune.measure.spares import Spares
from moetune.spec.layer import MoELayer
from moetune.store.store import Store


def start_early(
    spares: Spares,
    layer: MoELayer | str,
    backend: str | Backend,
    store: Store | Path | str | None,
    device: str | None,
    isolate: bool,
    surely: bool,
) -> None:
    """Starts the processes of a tune if its options say that it measures, or if nothing of its layer is stored.

    What is stored for this very question is known only once torch is imported, which takes as long as such a process
    takes to start. Neither is it known before which backend `auto` means, so then nothing is started.

    Args:
        spares: gets the processes.
        layer, backend, store, device, isolate: as `tune`. What is wrong with them is an error only where they are used.
        surely: whether the options say that it measures.
    """
    if backend == registry.AUTO:
        return
    with suppress(MoetuneError, ImportError, OSError):
        chosen = registry.backend(backend) if isinstance(backend, str) else backend
        folder = store if isinstance(store, Store) else Store(store)
        known = layer if isinstance(layer, MoELayer) else layer_of(layer)
        if surely or not folder.may_hold(known, chosen.name):
            spares.start_for(chosen, device, isolate)
