"""`Exchange`: the ranks of a process group give each other values, and no rank waits for one that has ended.

The values travel through torch.distributed's key-value store. So nothing is left unfinished in the engine's group if a
rank ends, no NCCL watchdog ends the others, and each error can name the rank that is missing.
"""

from __future__ import annotations

import atexit
import hashlib
import pickle
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from moetune.errors import LostRankError, UsageError
from moetune.measure.reasons import reason_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT_S: Final = 30.0
"""After this time without a sign of life a rank is lost."""
SLOWEST_S: Final = 1800.0
"""After this time a rank that still gives signs of life is lost too, as in torch's own collectives of gloo."""
BEATS: Final = 10
"""How many signs of life a rank gives in the time after which it would be lost."""
PAUSES_S: Final = (0.001, 0.05)
"""The first and the longest pause between two looks for the other ranks' values."""
AGREED: Final = "agreed"
_numbers: Counter[str] = Counter()


@dataclass(eq=False)
class Exchange:
    """Gives each rank of a group the values of all ranks.

    All ranks make the same calls of `gather` in the same order. The first rank that has seen all values, or misses one
    for too long, decides for all whether a call succeeded. So either all ranks go on with the same values, or all that
    are alive raise the same error.

    Attributes:
        store: a `torch.distributed.Store`. All its keys are this group's own.
        rank: this process's rank in the group.
        members: the ranks of the group as numbers of the whole world.
        timeout_s: after this time without a sign of life a rank is lost.
        step: what this rank does, for errors. Ranks that do not do the same raise an error.
    """

    store: Any
    rank: int
    members: Sequence[int]
    timeout_s: float = TIMEOUT_S
    step: str = ""
    _turn: int = 0
    _beating: tuple[threading.Thread, threading.Event] | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.members)

    def gather(self, value: Any) -> list[Any]:
        """Returns the `value` of every rank in rank order. Every rank must call it.

        Raises:
            LostRankError: a rank has ended, is not heard of, does something else, or the store has ended.
        """
        self.begin()
        self._turn += 1
        turn = self._turn
        keys = [f"{turn}/{rank}" for rank in range(self.size)]
        try:
            self.store.set(keys[self.rank], pickle.dumps((self.step, value)))
            outcome = self._outcome(turn, keys)
            given = [pickle.loads(self.store.get(key)) for key in keys] if outcome == AGREED else []
            if outcome == AGREED:  # so all ranks have ended the turn before this one
                self._forget(turn - 1)
        except RuntimeError as error:
            raise LostRankError(
                f"Rank {self.rank} of {self.size} does not reach torch.distributed's key-value store: "
                f"{reason_of(error)}.",
                "Rank 0 of the world usually holds it. See its log.",
            ) from None
        if outcome != AGREED:
            raise LostRankError(outcome, "See its log.")
        for rank, (step, _) in enumerate(given):
            if step != given[0][0]:
                raise LostRankError(
                    f"{self.name(rank)} is at {step!r}, but {self.name(0)} is at {given[0][0]!r}.",
                    "All ranks of a group must call the same ops in the same order.",
                )
        return [value for _, value in given]

    def name(self, rank: int) -> str:
        """Returns how errors name a rank of the group."""
        of_world = "" if self.members[rank] == rank else f" (rank {self.members[rank]} of the world)"
        return f"Rank {rank} of {self.size}{of_world}"

    def begin(self) -> None:
        """Begins to give signs of life. Further calls do nothing."""
        if self._beating is None:
            end = threading.Event()
            thread = threading.Thread(target=self._beat, args=(end,), name="moetune-alive", daemon=True)
            self._beating = (thread, end)
            thread.start()
            atexit.register(self.end)  # a thread inside the store would abort an interpreter that ends

    def end(self) -> None:
        """Gives no more signs of life. The other ranks no longer wait for this one."""
        if self._beating is not None:
            thread, end = self._beating
            self._beating = None
            atexit.unregister(self.end)
            end.set()
            thread.join(1.0)

    def _beat(self, end: threading.Event) -> None:
        with suppress(RuntimeError):  # the store has ended
            while True:
                self.store.add(f"alive/{self.rank}", 1)
                if end.wait(self.timeout_s / BEATS):
                    return

    def _outcome(self, turn: int, keys: Sequence[str]) -> str:
        """Returns `AGREED` once all values are there, or why one is missing. It is the same on all ranks."""
        decision = f"{turn}/outcome"
        began = time.monotonic()
        heard = dict.fromkeys(range(self.size), (-1, began))
        pause, longest = PAUSES_S
        while not self.store.check(list(keys)):
            if pause == longest:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                reason = self._lost(missing, heard, began)
                if reason or self.store.check([decision]):
                    return self._decided(decision, reason or AGREED)
            time.sleep(pause)  # `Store.wait` would keep the store from the engine's other threads
            pause = min(2 * pause, longest)
        return self._decided(decision, AGREED)

    def _decided(self, decision: str, outcome: str) -> str:
        """Returns the outcome that the first rank set, which is this one if it is the first."""
        decided: bytes = self.store.compare_set(decision, "", outcome)
        return decided.decode()

    def _lost(self, missing: Sequence[int], heard: dict[int, tuple[int, float]], began: float) -> str:
        """Returns why the ranks need not wait any longer for one that is missing, or an empty string.

        Args:
            missing: the ranks that have not answered.
            heard: each rank's last count of signs of life, and when it changed. It is updated.
            began: when this rank began to wait.
        """
        now = time.monotonic()
        for rank in missing:
            beats = self.store.add(f"alive/{rank}", 0)
            last, since = heard[rank]
            if beats != last:
                heard[rank] = (beats, now)
            elif now - since > self.timeout_s:
                return (
                    f"{self.name(rank)} gave no sign of life for {self.timeout_s:g} s: it has ended, or has left "
                    f"moetune. The others wait at {self.step!r}."
                )
            if now - began > SLOWEST_S:
                return f"{self.name(rank)} is alive, but did not reach {self.step!r} within {SLOWEST_S:g} s."
        return ""

    def _forget(self, turn: int) -> None:
        """Deletes what this rank has set in an earlier turn, which all ranks have ended."""
        self.store.delete_key(f"{turn}/{self.rank}")
        if self.rank == 0:
            self.store.delete_key(f"{turn}/outcome")


def exchange_of(group: ProcessGroup, timeout_s: float = TIMEOUT_S) -> Exchange:
    """Returns a new exchange between the ranks of `group`. Every rank must make one: they are matched by their number.

    Raises:
        UsageError: this process is no rank of the group.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    rank = dist.get_rank(group)
    if rank < 0:
        raise UsageError("This process is no rank of the group.", "Pass a group in which it is.")
    members = dist.get_process_group_ranks(group)
    name = hashlib.sha256(repr(members).encode()).hexdigest()[:16]
    _numbers[name] += 1
    return Exchange(PrefixStore(f"moetune/{name}/{_numbers[name]}", _get_default_store()), rank, members, timeout_s)
