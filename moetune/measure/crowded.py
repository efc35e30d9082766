"""Waits for device memory that other processes hold, so that no tactic is blamed for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from moetune.measure.reasons import CrowdedError, asked_bytes, is_out_of_memory

BACKOFF_S: Final = (1.0, 2.0, 4.0, 8.0)
"""How long a device is left alone after each failed try. After the last one follows the last try."""
OWN_BYTES: Final = 2 << 30
"""What this process may hold beside torch's allocations: its context, its kernels, the workspaces of libraries."""

Value = TypeVar("Value")


class Crowded:
    """Tries again where memory is lacking that other processes hold.

    Once all waits of one object have been in vain, its later tries do not wait any more.

    Args:
        held: returns the bytes that other processes hold on the device, and the bytes that it has; None if that is not
            known, as on a CPU.
        free: frees what failed tries hold. Returns whether the device is lost.
        waits: is called before a wait.
        sleep_s: waits for some seconds. Tests replace it.
    """

    def __init__(
        self,
        held: Callable[[], tuple[int, int] | None],
        free: Callable[[], bool],
        waits: Callable[[], None],
        sleep_s: Callable[[float], None] = time.sleep,
    ) -> None:
        self._held, self._free, self._waits, self._sleep_s = held, free, waits, sleep_s
        self._backoff_s: tuple[float, ...] = BACKOFF_S

    def tried(self, attempt: Callable[[], Value]) -> Value:
        """Returns what `attempt` returns, which is called again after a wait while others hold the memory it lacks.

        Raises:
            CrowdedError: memory is lacking after the last wait, and other processes hold some of it.
            Exception: what `attempt` raises, if no other process holds memory, the whole device has less than was asked
                for, or it is another error.
        """
        tries = 0
        while True:
            tries += 1
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                lost = self._free()
                held = None if lost else self._held()
                if held is None or held[0] <= OWN_BYTES or asked_bytes(error) > held[1]:
                    raise
            if tries > len(self._backoff_s):
                self._backoff_s = ()
                raise CrowdedError(*held, tries)
            self._waits()
            self._sleep_s(self._backoff_s[tries - 1])


def held_by_others(device: str) -> tuple[int, int] | None:
    """Returns the bytes that other processes hold on a GPU, about, and the bytes that it has; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device), total
    except Exception:  # a device that does not answer is judged by the error of the tactic
        return None
