"""`warmup`: a context in which FlashInfer's MoE ops are tuned for one regime or served from the store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.engine import flashinfer_hook, session
from moetune.engine.session import Session
from moetune.errors import UnsupportedError
from moetune.inputs import flashinfer_versions
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.store import Store
from moetune.tuning.question import resolved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def session_for(
    layer: MoELayer | str,
    regime: Regime,
    rank: int | None = None,
    group: ProcessGroup | None = None,
    store: Store | Path | str | None = None,
    logger: logging.Logger | None = None,
) -> Session:
    """Returns a session for this layer and regime, with their defaults filled in. See `warmup` for the arguments.

    Raises:
        UsageError: the layer's name is unknown, the regime does not fit the layer, or it has no such rank.
    """
    layer, regime = resolved(layer, regime)
    regime.shard(layer, rank or 0)
    store = store if isinstance(store, Store) else Store(store)
    return Session(layer, regime, rank, store, group, logger or logging.getLogger("moetune"))


@contextmanager
def warmup(
    layer: MoELayer | str,
    regime: Regime,
    *,
    rank: int | None = None,
    group: ProcessGroup | None = None,
    store: Store | Path | str | None = None,
) -> Iterator[Session]:
    """Tunes the layer's FlashInfer MoE ops that are called inside for one regime, or serves them from the store.

    Inside, FlashInfer is in its tuning mode, and it tunes all other ops as usual. The choices are in FlashInfer's own
    cache when the context ends, and stay in use. A nested warm-up replaces the outer one until it ends. Ops that other
    threads call are not affected. After the context, FlashInfer works as before it.

    If moetune does not know the installed version of FlashInfer, it logs a warning, and FlashInfer tunes all ops as
    usual.

    Args:
        layer: the layer that the ops compute, a preset's name, or a path to a Hugging Face config.json.
        regime: the deployment. The buckets are the op's own, not the regime's.
        rank: the rank whose experts the ops have. [default: the rank that fits the op's arguments]
        group: the ranks that must choose the same tactics. All of them must call the same ops inside.
        store: a store or its folder. [default: `MOETUNE_STORE`, else the user's cache folder]

    Yields:
        The session; its `served`, `tuned` and `missed` hold (backend, rows).

    Raises:
        UsageError: the layer's name is unknown, the regime does not fit the layer, or it has no such rank.
        UnsupportedError: FlashInfer is not installed.
    """
    opened = session_for(layer, regime, rank, group, store)
    obstacle = flashinfer_versions.obstacle()
    if obstacle and flashinfer_versions.version() is None:
        raise UnsupportedError(f"A warm-up needs FlashInfer: {obstacle}", "Run `pip install flashinfer-python`.")
    from flashinfer.autotuner import autotune

    if obstacle:
        opened.logger.warning("moetune: %s", obstacle)
        with autotune(True):
            yield opened
        return
    with flashinfer_hook.installed(), autotune(True):
        token = session.enter(opened)
        try:
            yield opened
        finally:
            session.leave(token)
            opened.announce()
