"""`warmup`: FlashInfer's ops that an engine calls inside are tuned for one regime, or served from the store."""

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
    """The session of a question, with its defaults resolved.

    Raises:
        UsageError: the regime does not fit the layer, an unknown name, or no such rank.
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
    """Stock FlashInfer MoE ops called inside are tuned with this regime's dummies, or take the store's answer.

    Inside, FlashInfer is in its tuning mode; ops other than the layer's are tuned as FlashInfer does it. The answers
    lie in FlashInfer's own cache when the context ends, and stay in use. A nested warm-up asks its own question until
    it ends; other threads are left alone. Outside, FlashInfer is as it was.

    With a version of FlashInfer that moetune does not know, a warning is given and FlashInfer tunes in its own way.

    Args:
        layer: the layer that the ops compute, a preset's name, or a path to a Hugging Face config.json.
        regime: the deployment. Buckets and the largest of them are the op's own.
        rank: whose experts the ops have; told from the ops when not given.
        group: ranks that must choose the same tactics; all of them must call the same ops in here.
        store: a store or its folder; `MOETUNE_STORE`, else the user's cache folder, by default.

    Yields:
        The session; its `served`, `tuned` and `missed` hold (backend, rows).

    Raises:
        UsageError: the regime does not fit the layer, an unknown name, or no such rank.
        UnsupportedError: FlashInfer is not installed.
    """
    asked = session_for(layer, regime, rank, group, store)
    obstacle = flashinfer_versions.obstacle()
    if obstacle and flashinfer_versions.version() is None:
        raise UnsupportedError(f"A warm-up needs FlashInfer: {obstacle}", "pip install flashinfer-python")
    from flashinfer.autotuner import autotune

    if obstacle:
        asked.logger.warning("moetune: %s", obstacle)
        with autotune(True):
            yield asked
        return
    with flashinfer_hook.installed(), autotune(True):
        token = session.enter(asked)
        try:
            yield asked
        finally:
            session.leave(token)
            asked.announce()
