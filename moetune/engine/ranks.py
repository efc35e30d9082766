"""Exchange between the ranks of one process group that must choose the same tactics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Returns the `value` of every rank of `group` in rank order; without a group only this process's.

    It is a collective: every rank of the group must call it.
    """
    if group is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Any, group: ProcessGroup | None) -> Any:
    """Returns the `value` of the first rank of `group`. It is a collective: every rank of the group must call it."""
    return gather(value if leads(group) else None, group)[0]


def leads(group: ProcessGroup | None) -> bool:
    """Returns whether this process is the first rank of `group`. Without a group it is."""
    if group is None:
        return True
    import torch.distributed as dist

    return dist.get_rank(group) == 0
