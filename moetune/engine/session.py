"""`Session`: the question that an engine asks, and what was served, tuned or missed so far."""

from __future__ import annotations

import logging
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moetune.engine.exchange import TIMEOUT_S, Exchange, exchange_of
from moetune.engine.strategy import RankStrategy
from moetune.errors import LostRankError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.store import Store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moetune.store.profile import Profile


Config = dict[str, int]
"""The tunables of one launch of a Triton kernel, as the engines name them."""
CutlassQuestion = tuple[str, tuple[tuple[str, str], ...], bool]
"""The regime's digest, the options of the backend of `cutlass_fused_moe`, and whether it was asked in tuning mode."""


@dataclass(slots=True)
class AskedShape:
    """One shape for which an engine asked, and what it is answered.

    Attributes:
        name: the shape, for the log.
        profile: the profile that answers, or None.
        largest_block_m: the largest BLOCK_SIZE_M of the profile.
        configs: the configuration for each number of rows that was asked for; None for the engine's own.
        own_rows: the numbers of rows for which the profile chose the engine's own configuration.
        hits: the number of calls that moetune answered.
        misses: the number of calls that the engine answered itself.
        same: those of the misses for which the profile chose the engine's own configuration.
    """

    name: str
    profile: Profile | None = None
    largest_block_m: int = 0
    configs: dict[int, Config | None] = field(default_factory=dict, repr=False)
    own_rows: set[int] = field(default_factory=set, repr=False)
    hits: int = 0
    misses: int = 0
    same: int = 0

    def summary(self) -> str:
        """Returns the line for the engine's log."""
        same = f", {self.same} of them because its own configuration is the profile's choice" if self.same else ""
        return f"moetune: {self.name}: {self.hits} calls hit, {self.misses} left to the engine{same}"


@dataclass(eq=False)
class Session:
    """The layer and regime for which FlashInfer's MoE ops are tuned, the store, and the buckets seen so far.

    Attributes:
        layer: the layer that the ops compute.
        regime: the deployment.
        rank: the rank whose shard the ops have, or None for any rank.
        store: where choices are looked up and saved.
        group: the ranks that must choose the same tactics. None stands for FlashInfer's own autotune group, else in
            tuning mode for the group of the running engine's ranks that share the experts, if there is one.
        strategy: how the ranks share the tuning.
        timeout_s: after this time without a sign of life a rank is lost, in seconds.
        logger: the engine's log.
        served: (backend, rows) of the buckets that the store answered.
        tuned: (backend, rows) of the buckets that were measured.
        missed: (backend, rows) of the buckets that were left to FlashInfer.
        placed: the tactic that this session placed for each of FlashInfer's keys, and the key's optimization profile.
        placed_profiles: each optimization profile that was placed, by its identity.
        agreed: those of the keys that were placed in tuning mode. They are the same on all ranks of the group.
        answered: the keys that were placed, by the signature of each call that was answered in tuning mode.
        passed: identities of the calls that FlashInfer answers by itself, and names of ops of which it answers all.
        undecided: identities of the calls for which the ranks of a group could not choose together. FlashInfer's
            default runs on all of them.
        lost: why the ranks of the group no longer reach each other; empty as long as they do. Nothing is tuned then.
        looked_up: identities of the calls for which the store was read.
        profiles: the profiles of `cutlass_fused_moe` by what was asked. None if there was none.
        exchanges: the exchange between the ranks of each group.
        has_tuned: whether an MoE op was called in tuning mode.
        asked: the shapes for which the engine asked for a Triton configuration or a FlashInfer tactic, with the number
            of hits and misses. Those of FlashInfer are counted until the warm-up ends.
        asked_ops: those of FlashInfer's ops, by `TunerCall.identity`.
        spent_s: the seconds that moetune's own work has taken, tuning included. Hits are not counted.
        is_warm: whether the engine's warm-up has ended.
        announced: the summary that was logged last.
    """

    layer: MoELayer
    regime: Regime
    rank: int | None
    store: Store
    group: ProcessGroup | None = None
    strategy: RankStrategy = RankStrategy.MERGE
    timeout_s: float = TIMEOUT_S
    logger: logging.Logger = field(default_factory=lambda: logging.getLogger("moetune"))
    served: set[tuple[str, int]] = field(default_factory=set)
    tuned: set[tuple[str, int]] = field(default_factory=set)
    missed: set[tuple[str, int]] = field(default_factory=set)
    placed: dict[Any, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    placed_profiles: dict[int, Any] = field(default_factory=dict, repr=False)
    agreed: set[Any] = field(default_factory=set, repr=False)
    answered: dict[Any, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    passed: set[Any] = field(default_factory=set, repr=False)
    undecided: set[Any] = field(default_factory=set, repr=False)
    lost: str = ""
    exchanges: dict[Any, Exchange] = field(default_factory=dict, repr=False)
    looked_up: set[Any] = field(default_factory=set, repr=False)
    profiles: dict[CutlassQuestion, Profile | None] = field(default_factory=dict, repr=False)
    has_tuned: bool = False
    asked: list[AskedShape] = field(default_factory=list, repr=False)
    asked_ops: dict[Any, AskedShape] = field(default_factory=dict, repr=False)
    spent_s: float = 0.0
    is_warm: bool = False
    announced: str = ""

    def count(self, backend: str, *, served: object = (), tuned: object = (), missed: object = ()) -> None:
        """Adds buckets, given by their rows. A bucket that is served or tuned is no longer missed."""
        for kind, rows in ((self.served, served), (self.tuned, tuned), (self.missed, missed)):
            kind.update((backend, bucket) for bucket in rows)  # type: ignore[attr-defined]
        self.served -= self.tuned
        self.missed -= self.served | self.tuned

    def summary(self) -> str:
        """Returns the line for the engine's log."""
        backends = sorted({backend for kind in (self.served, self.tuned, self.missed) for backend, _ in kind})
        of = f" of {', '.join(backends)}" if backends else ""
        return (
            f"moetune: {self.layer.name} under {self.regime.slug}: buckets{of}: "
            f"{len(self.served)} served, {len(self.tuned)} tuned, {len(self.missed)} missed"
        )

    def exchange(self, group: ProcessGroup | None) -> Exchange | None:
        """Returns the exchange between the ranks of `group`; None if each of them tunes for itself.

        Raises:
            LostRankError: the ranks no longer reach each other.
            UsageError: this process is no rank of the group.
        """
        if group is None or self.strategy is RankStrategy.INDEPENDENT:
            return None
        if self.lost:
            raise LostRankError(self.lost)
        found = self.exchanges.get(group)
        if found is None:
            found = self.exchanges[group] = exchange_of(group, self.timeout_s)
        return found

    def leave(self) -> None:
        """Gives the other ranks no more signs of life: this one exchanges nothing more."""
        for exchange in self.exchanges.values():
            exchange.end()

    def announce(self) -> None:
        """Logs the summary if it differs from the last one."""
        line = self.summary()
        if line != self.announced:
            self.announced = line
            self.logger.info(line)

    def end_warm_up(self) -> None:
        """Logs a line for each shape that the engine asked for, and moetune's own time. Further calls do nothing."""
        if self.is_warm:
            return
        self.is_warm = True
        self.leave()
        for shape in self.asked:
            self.logger.info(shape.summary())
        if self.asked:
            self.logger.info("moetune: took %.1f s until the end of the warm-up", self.spent_s)


_here: ContextVar[Session | None] = ContextVar("moetune_session")
_everywhere: Session | None = None


def current() -> Session | None:
    """Returns the session of this context, else the process's; None if calls must pass through unchanged."""
    return _here.get(_everywhere)


def enter(session: Session | None) -> Token[Session | None]:
    """Sets the session of this context; with None, calls in it pass through unchanged."""
    return _here.set(session)


def leave(token: Token[Session | None]) -> None:
    """Restores the session that this context had before `enter`."""
    _here.reset(token)


def set_for_process(session: Session | None) -> None:
    """Sets the session of every context and thread that has none of its own."""
    global _everywhere
    _everywhere = session
