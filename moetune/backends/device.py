"""What the backends ask of a CUDA device: whether it is of the right kind, and what tactics depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from moetune.backends.grouped_triton.space import Limits


@dataclass(frozen=True, slots=True)
class Device:
    """What tactics depend on: what one block of threads can get at most, and the number of multiprocessors.

    The defaults are those of an H100 and an H200.
    """

    shared_bytes: int = 232_448
    registers: int = 65_536
    multiprocessors: int = 132

    @classmethod
    def of(cls, device: str) -> Self:
        """Returns those of a CUDA device; of an H100 for a CPU, on which tactics are listed but do not run."""
        limits = Limits.of(device)
        if limits is None:
            return cls()
        import torch

        count = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(limits.shared_bytes, limits.registers_per_block, count)


def without_device(fits: Callable[[tuple[int, int]], bool], needs: str, hint: str) -> tuple[str, str] | None:
    """Returns a reason and a hint if torch sees no CUDA device, or the current one is of another kind.

    Args:
        fits: whether a device of this compute capability, (major, minor), is of the right kind.
        needs: what is needed, for the reason if it is not.
        hint: what to do then.
    """
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none", "Run on a GPU host with a CUDA build of torch."
    capability = torch.cuda.get_device_capability()
    if fits(capability):
        return None
    return f"{needs}; the device has {capability[0]}.{capability[1]}", hint
