"""`Ranks`, the processes that torchrun has started, each with its device."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from moetune.engine.exchange import Exchange, exchange_of
from moetune.engine.ranks import from_first, gather, together
from moetune.errors import UsageError
from moetune.measure.probe import device_for

T = TypeVar("T")
MOST_RANKS = 8
COLLECTIVE_LIMIT = timedelta(minutes=5)
"""How long a rank waits in a collective of the block."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among the ranks.

    Attributes:
        rank, size: this process's number, and the number of all.
        device: its torch device.
        host: gives each rank the Python values of all ranks; None if there is one process.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    host: Exchange | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which tunes, reads and writes files, and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Returns the `value` of every rank. Every rank must call it. Raises LostRankError if one has ended."""
        return gather(value, self.host)

    def broadcast(self, value: Any) -> Any:
        """Returns the `value` of the first rank. Every rank must call it. Raises the errors of `gather`."""
        return self.gather(value if self.leads else None)[0]

    def together(self, make: Callable[[], T]) -> T:
        """Returns what `make` returns here, if it succeeds on every rank. Every rank must call it.

        Raises:
            RankError: `make` raised on another rank.
            Exception: what `make` raised here.
        """
        return together(make, self.host)

    def of_first(self, make: Callable[[], T]) -> T:
        """Returns on every rank what `make` returns on the first one. Every rank must call it.

        Raises:
            RankError: `make` raised on the first rank, and this is another one.
            Exception: what `make` raised here.
        """
        return from_first(make, self.host)


def started_ranks() -> int:
    """Returns the number of processes that torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """Joins the processes that torchrun has started, over NCCL on GPUs and gloo on the CPU.

    Args:
        device: `cpu`, `cuda` or None. With several ranks each one takes the GPU of its local rank.

    Raises:
        UsageError: there are more than `MOST_RANKS` ranks, a numbered GPU is asked for all of them, or there are fewer
            GPUs than ranks.
    """
    size = started_ranks()
    if size > MOST_RANKS:
        raise UsageError(f"dep-bench runs on up to {MOST_RANKS} ranks, given {size}.", "Start fewer with torchrun.")
    if size > 1 and device is not None and ":" in device:
        raise UsageError(
            f"--device {device} is one GPU, and {size} ranks need one each.", "Give --device cuda, or leave it out."
        )
    import torch

    found = device_for(device)
    if size > 1 and found != "cpu":
        found = _gpu_of_rank(size)
    if ":" in found:
        torch.cuda.set_device(found)  # streams, events and FlashInfer's ops take the current device
    if size == 1:
        yield Ranks(device=found)
        return
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo" if found == "cpu" else "nccl", timeout=COLLECTIVE_LIMIT)
    assert dist.group.WORLD is not None
    host = exchange_of(dist.group.WORLD)
    try:
        yield Ranks(rank, size, found, host)
    except BaseException:
        if found == "cpu":  # NCCL would wait for the other ranks, which torchrun ends
            dist.destroy_process_group()
        raise
    finally:
        host.end()
    gc.collect()  # NCCL's end waits until no graph holds a collective
    dist.destroy_process_group()


def _gpu_of_rank(size: int) -> str:
    """Returns the torch device of this rank, one of `size` on this host.

    Raises:
        UsageError: there are too few GPUs.
    """
    import torch

    local, count = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            f"{size} ranks need a GPU each, and rank {os.environ['RANK']} sees {count}.",
            "Start fewer processes with torchrun, or set CUDA_VISIBLE_DEVICES to more GPUs.",
        )
    return f"cuda:{local}"
