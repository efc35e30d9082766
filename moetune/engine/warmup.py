"""`warmup`: a context in which FlashInfer's MoE ops are tuned for one regime or served from the store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.engine import flashinfer_hook, session
from moetune.engine.exchange import TIMEOUT_S
from moetune.engine.flashinfer_group import agreed_by_flashinfer
from moetune.engine.session import Session
from moetune.engine.strategy import RankStrategy, strategy_of
from moetune.errors import LostRankError, UnsupportedError
from moetune.inputs import flashinfer_versions
from moetune.measure.reasons import reason_of
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
    strategy: RankStrategy = RankStrategy.MERGE,
    timeout_s: float = TIMEOUT_S,
) -> Session:
    """Returns a session for this layer and regime, with their defaults filled in. See `warmup` for the arguments.

    Raises:
        UsageError: the layer's name is unknown, the regime does not fit the layer, or it has no such rank.
    """
    layer, regime = resolved(layer, regime)
    regime.shard(layer, rank or 0)
    store = store if isinstance(store, Store) else Store(store)
    logger = logger or logging.getLogger("moetune")
    return Session(layer, regime, rank, store, group, strategy, timeout_s, logger)


@contextmanager
def warmup(
    layer: MoELayer | str,
    regime: Regime,
    *,
    rank: int | None = None,
    group: ProcessGroup | None = None,
    store: Store | Path | str | None = None,
    strategy: RankStrategy | str = RankStrategy.MERGE,
    timeout_s: float = TIMEOUT_S,
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
        strategy: how the ranks of `group` share the tuning; see `RankStrategy`. With all but `independent` they choose
            the same tactics.
        timeout_s: after this time without a sign of life a rank of `group` is lost, in seconds. Then FlashInfer's
            default runs on the others, for all that was not agreed on before.

    Yields:
        The session; its `served`, `tuned` and `missed` hold (backend, rows), and `lost` says which rank is lost.

    Raises:
        UsageError: the layer's name is unknown, the regime does not fit the layer, it has no such rank, there is no
            such strategy, or this process is no rank of `group`.
        UnsupportedError: FlashInfer is not installed.
    """
    strategy = strategy_of(strategy, "strategy")
    opened = session_for(layer, regime, rank, group, store, strategy=strategy, timeout_s=timeout_s)
    obstacle = flashinfer_versions.obstacle()
    if obstacle and flashinfer_versions.version() is None:
        raise UnsupportedError(f"A warm-up needs FlashInfer: {obstacle}", "Run `pip install flashinfer-python`.")
    from flashinfer.autotuner import autotune

    if obstacle:
        opened.logger.warning("moetune: %s", obstacle)
        with autotune(True):
            yield opened
        return
    with flashinfer_hook.installed(), _agreeing(opened), autotune(True):
        token = session.enter(opened)
        try:
            yield opened
        finally:
            session.leave(token)
            opened.leave()
            opened.announce()


@contextmanager
def _agreeing(opened: Session) -> Iterator[None]:
    """Lets FlashInfer agree on the ops that moetune does not tune, if the session has a group."""
    ranks = opened.exchange(opened.group)
    if ranks is None or opened.group is None:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(agreed_by_flashinfer(opened.group, ranks, opened.logger))
        except LostRankError as error:
            opened.lost = str(error)
            opened.logger.warning("moetune: nothing is tuned: %s", error)
        except Exception as error:  # on all ranks alike
            opened.logger.warning("moetune: FlashInfer's own ops are tuned on each rank alone: %s", reason_of(error))
        yield
