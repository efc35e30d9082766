"""Ranks of one process group that must choose alike: everyone's answer, or the first rank's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(value: Any, group: ProcessGroup | None) -> list[Any]:
    """`value` of every rank of `group`, in rank order; only this one's without a group. A collective: all must call."""
    if group is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Any, group: ProcessGroup | None) -> Any:
    """`value` of the first rank of `group`. A collective: all must call."""
    return gather(value if leads(group) else None, group)[0]


def leads(group: ProcessGroup | None) -> bool:
    """Whether this process is the first of `group`; without a group it is."""
    if group is None:
        return True
    import torch.distributed as dist

    return dist.get_rank(group) == 0
