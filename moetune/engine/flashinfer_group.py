"""Lets FlashInfer agree on the tactics of the ops that moetune does not tune, by FlashInfer's own means.

`flashinfer.autotuner.set_autotune_process_group`, in all versions that moetune knows: each tactic's time becomes the
mean over the ranks. It has no time-out of its own, and its ranks must enter with equal caches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

from moetune.engine.exchange import SLOWEST_S, Exchange
from moetune.engine.ranks import gather, together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def agreed_by_flashinfer(group: ProcessGroup, ranks: Exchange, logger: logging.Logger) -> Iterator[None]:
    """Makes FlashInfer's tuner take the mean of its times over the ranks of `group`, inside. Every rank must enter it.

    A group that FlashInfer has already stays. FlashInfer skips the collectives of an op that it finds in its cache, so
    ranks with different caches would wait forever (vLLM #54618, #57423). If the ranks have tuned different ops before,
    or one has loaded a file, it gets no group, and a warning is logged.

    Args:
        group: the group. FlashInfer gets a group of gloo with the same ranks, because NCCL ends a process that waits
            for a rank which has ended.
        ranks: the exchange between its ranks.
        logger: the engine's log.

    Raises:
        LostRankError: a rank does not enter.
        RankError: no group of gloo can be made on a rank.
    """
    from flashinfer.autotuner import AutoTuner, get_autotune_process_group, set_autotune_process_group

    ranks.step = "the begin of the warm-up"
    own = get_autotune_process_group()
    cache = AutoTuner.get().choices
    everywhere = gather((own is None, cache.entries_by_op(), cache.is_read_from_disk()), ranks)
    others = [rank for rank, theirs in enumerate(everywhere) if theirs != everywhere[0] or theirs[-1]]
    if others:
        logger.warning(
            "moetune: FlashInfer on %s has a file, or another cache or group than on %s, so the ops that moetune does "
            "not tune may get different tactics on the ranks",
            ranks.name(others[0]),
            ranks.name(0),
        )
    with nullcontext(own) if others or own is not None else _of_gloo(group, ranks) as agreeing:
        set_autotune_process_group(agreeing)
        try:
            yield
        finally:
            set_autotune_process_group(own)


@contextmanager
def _of_gloo(group: ProcessGroup, ranks: Exchange) -> Iterator[ProcessGroup]:
    """Yields `group` if it is one of gloo, otherwise a new group of gloo with its ranks. Every rank must enter it."""
    import torch.distributed as dist

    if dist.get_backend(group) == dist.Backend.GLOO:
        yield group
        return
    members, timeout = dist.get_process_group_ranks(group), timedelta(seconds=SLOWEST_S)
    made = together(
        lambda: dist.new_group(members, timeout, backend="gloo", use_local_synchronization=True),
        ranks,
    )
    try:
        yield made
    finally:
        dist.destroy_process_group(made)
