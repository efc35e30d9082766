"""`Session`: one warm-up's question, and what became of it."""

from __future__ import annotations

import logging
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.store import Store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moetune.store.profile import Profile


@dataclass(eq=False)
class Session:
    """The layer, the regime and the store that FlashInfer's MoE ops are tuned by, and the buckets seen so far.

    `served`, `tuned` and `missed` hold (backend, rows): taken from the store, measured, and left to FlashInfer.
    `rank`: whose shard the ops must have; None takes any. `group`: ranks that choose alike; FlashInfer's own
    autotune group where it has one.
    """

    layer: MoELayer
    regime: Regime
    rank: int | None
    store: Store
    group: ProcessGroup | None = None
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("moetune"))
    served: set[tuple[str, int]] = field(default_factory=set)
    tuned: set[tuple[str, int]] = field(default_factory=set)
    missed: set[tuple[str, int]] = field(default_factory=set)
    placed: dict[Any, Any] = field(default_factory=dict, repr=False)
    """FlashInfer's keys that hold this session's answer, each with its tactic."""
    not_ours: set[Any] = field(default_factory=set, repr=False)
    """Identities of calls that are FlashInfer's own."""
    looked_up: set[Any] = field(default_factory=set, repr=False)
    """Identities of calls for which the store holds nothing further."""
    profiles: dict[str, Profile] = field(default_factory=dict, repr=False)
    """`cutlass_fused_moe`'s answers by the digest of the regime."""
    announced: str = ""

    def count(self, backend: str, *, served: object = (), tuned: object = (), missed: object = ()) -> None:
        """Adds buckets, in rows, to what was seen; a bucket that has an answer is no longer missed."""
        for kind, rows in ((self.served, served), (self.tuned, tuned), (self.missed, missed)):
            kind.update((backend, bucket) for bucket in rows)  # type: ignore[attr-defined]
        self.served -= self.tuned
        self.missed -= self.served | self.tuned

    def summary(self) -> str:
        """The one line for the engine's log."""
        backends = sorted({backend for kind in (self.served, self.tuned, self.missed) for backend, _ in kind})
        of = f" of {', '.join(backends)}" if backends else ""
        return (
            f"moetune: {self.layer.name} under {self.regime.slug}: buckets{of}: "
            f"{len(self.served)} served, {len(self.tuned)} tuned, {len(self.missed)} missed"
        )

    def announce(self) -> None:
        """Logs the summary if it says something new."""
        line = self.summary()
        if line != self.announced:
            self.announced = line
            self.logger.info(line)


_here: ContextVar[Session | None] = ContextVar("moetune_session")
_everywhere: Session | None = None


def current() -> Session | None:
    """The session of this context, else the process's; None where calls are not ours."""
    return _here.get(_everywhere)


def enter(session: Session | None) -> Token[Session | None]:
    """Makes `session` the current one of this context; None makes calls pass through."""
    return _here.set(session)


def leave(token: Token[Session | None]) -> None:
    """Undoes `enter`."""
    _here.reset(token)


def set_for_process(session: Session | None) -> None:
    """Makes `session` that of every context and thread which has none of its own."""
    global _everywhere
    _everywhere = session
