"""What the ranks of one process group do together to choose the same tactics, and how the engine's group is found."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from moetune.engine.exchange import Exchange
from moetune.errors import LostRankError, MoetuneError, RankError
from moetune.measure.reasons import reason_of, shortened
from moetune.store.store import Store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
GLANCE_S = 0.2
"""The interval at which a process looks for the answer of another one."""
ENGINE_GROUPS = (
    ("vllm", "vllm.distributed.parallel_state", "get_ep_group", ("0.26.", "0.33.")),
    ("sglang", "sglang.srt.distributed.parallel_state", "get_moe_ep_group", ("0.5.23",)),
)
"""Each engine, the module and the function that returns the group of the ranks that share the experts, and the versions
(by how they begin) of which the sources were read: all these ranks are in tuning mode at the same time.

vLLM 0.27 … 0.33 give FlashInfer a group of all ranks themselves (`set_autotune_process_group` in
`warmup/kernel_warmup.py`); that one comes first. In other versions the first rank may tune alone. It would wait for the
others until the time-out, and then tune nothing.
"""


def engine_group() -> ProcessGroup | None:
    """Returns the CPU group of the ranks among which the running engine has divided the experts.

    Returns None if no engine is imported, its version is not one of `ENGINE_GROUPS`, it has no such group yet, the
    group has one rank, or torch.distributed does not know it (the groups of vLLM's elastic EP).
    """
    for engine, name, function, versions in ENGINE_GROUPS:
        find = getattr(sys.modules.get(name), function, None)
        if find is None or not _version(engine).startswith(versions):
            continue
        import torch.distributed as dist

        try:
            group: ProcessGroup = find().cpu_group
            if dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1:
                return group
        except Exception:  # vLLM asserts that the group exists, SGLang raises one of several errors
            continue
    return None


def _version(engine: str) -> str:
    """Returns the version of the engine that is imported, or an empty string if it does not say."""
    found = getattr(sys.modules.get(engine), "__version__", "")
    with suppress(importlib.metadata.PackageNotFoundError):
        found = found or importlib.metadata.version(engine)
    return str(found)


def gather(value: Any, ranks: Exchange | None) -> list[Any]:
    """Returns the `value` of every rank in rank order; without other ranks only this process's.

    Every rank must call it.

    Raises:
        LostRankError: a rank is missing.
    """
    return [value] if ranks is None else ranks.gather(value)


def together(make: Callable[[], T], ranks: Exchange | None) -> T:
    """Returns what `make` returns here, if it succeeds on every rank. Every rank must call it.

    Without it, a rank on which `make` fails would leave the others waiting in their next exchange.

    Raises:
        RankError: `make` failed on another rank. The message names the rank and the reason.
        Exception: what `make` raised here.
    """
    made, error = attempt(make)
    reasons = gather(said(error), ranks)
    if error is not None:
        raise error
    for rank, reason in enumerate(reasons):
        if reason is not None:
            assert ranks is not None
            raise RankError(f"{ranks.name(rank)} failed: {reason}.", "See its log.")
    return made[0]


def from_first(make: Callable[[], T], ranks: Exchange | None) -> T:
    """Returns what `make` returns on the first rank, the only one that calls it. Every rank must call `from_first`.

    Raises:
        RankError: `make` failed on the first rank.
        Exception: what `make` raised here.
    """
    made, error = attempt(make) if leads(ranks) else ([], None)
    found, reason = gather((made, said(error)), ranks)[0]
    if error is not None:
        raise error
    if reason is not None:
        assert ranks is not None
        raise RankError(f"{ranks.name(0)}, which answers for all, failed: {reason}.", "See its log.")
    answer: T = found[0]
    return answer


def attempt(make: Callable[[], T]) -> tuple[list[T], Exception | None]:
    """Returns what `make` returns, in a list, or an empty list and its error.

    Raises:
        LostRankError: `make` raised it. No other rank waits then.
    """
    try:
        return [make()], None
    except LostRankError:
        raise
    except Exception as error:  # the other ranks wait for this one, whatever it raised
        return [], error


def said(error: Exception | None) -> str | None:
    """Returns one line for the errors of the other ranks, without a period at its end; None if there is no error."""
    if error is None:
        return None
    return (shortened(error.message) if isinstance(error, MoetuneError) else reason_of(error)).rstrip(".")


def writes(store: Store, ranks: Exchange | None) -> bool:
    """Returns whether this rank writes what the ranks chose together into `store`. Every rank must call it.

    Of the ranks of one host that have the same store, only the first does.
    """
    folders = gather((platform.node(), str(store.root.absolute())), ranks)
    mine = 0 if ranks is None else ranks.rank
    return folders.index(folders[mine]) == mine


def first_answer(name: str, make: Callable[[], str], limit_s: float) -> str | None:
    """Returns what `make` returns in that process of the engine which asks for `name` first.

    The processes are those of torch.distributed, and its key-value store carries the answer. This is no collective: a
    process waits only for one that has begun, at most `limit_s`, and leaves nothing unfinished in the engine's group if
    it stops waiting. An error of `make` is an answer too.

    Args:
        name: what is asked. A process that asks again gets the same answer.
        make: is called in the first process. Without torch.distributed it is called in each.
        limit_s: how long the other processes wait for the answer.

    Returns:
        The answer, or None if there was none in time, or `make` raised in another process.

    Raises:
        Exception: what `make` raised here.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return make()
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    store = PrefixStore(f"moetune/{name}", _get_default_store())
    if store.add("asked", 1) == 1:
        answer = ""
        try:
            answer = make()
        finally:
            store.set("answer", answer)
        return answer
    end = time.monotonic() + limit_s
    while not store.check(["answer"]):  # `wait` would keep the store from the engine's other threads
        if time.monotonic() > end:
            return None
        time.sleep(GLANCE_S)
    return store.get("answer").decode() or None


def leads(ranks: Exchange | None) -> bool:
    """Returns whether this process is the first rank. Without other ranks it is."""
    return ranks is None or ranks.rank == 0
