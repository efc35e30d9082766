"""`OverRanks`, the calls of one point if the block runs over several ranks."""

from __future__ import annotations

from functools import cached_property, partial

import torch

from moetune.backends.base import FillableRunner
from moetune.dep_bench.block import Block, TacticOf
from moetune.dep_bench.dispatchers import dispatcher_for
from moetune.dep_bench.experts import Experts
from moetune.dep_bench.part_clock import Mark, MarkedCall
from moetune.dep_bench.reference import block_reference, require_right
from moetune.dep_bench.router import router_of
from moetune.dep_bench.setting import Setting
from moetune.spec.regime import Regime
from moetune.workload.dispatch import rows_for_tokens

SEEDS_APART = 1_000_003
"""Between the seeds of two batches' hidden states."""


class OverRanks:
    """One batch size of the block over all ranks. `warm` and the calls of `call` are collectives.

    Args:
        setting: what is measured.
        regime: its regime, with the distribution of the router's choices.
        tokens: the tokens of each rank.

    Attributes:
        rows: the rows that entered this rank's kernel, by batch, after `warm`.
        received_bytes: what this rank received in the dispatch, by batch, after `warm`.
    """

    def __init__(self, setting: Setting, regime: Regime, tokens: int) -> None:
        self._setting, self._regime, self._tokens = setting, regime, tokens
        layer, ranks, backend = setting.layer, setting.ranks, setting.backend
        self._router = router_of(layer, regime.distribution, regime.seed, ranks.device)
        self._experts = Experts(backend, layer, setting.regime, ranks.rank, ranks.device)
        dispatcher = dispatcher_for(ranks, setting.form, layer, setting.regime)
        self._block = Block(layer, setting.regime, setting.form, self._router, dispatcher, self._experts)
        self.rows, self.received_bytes = [0] * setting.batches, [0] * setting.batches
        self._hidden = [self._made(batch) for batch in range(setting.batches)]
        self._dummies: FillableRunner | None = None

    @property
    def is_static(self) -> bool:
        """Whether a CUDA graph can capture the calls."""
        return self._block.is_static

    def warm(self, tactic_of: TacticOf) -> torch.Tensor:
        """Runs an arm on each batch once, and returns the output on the first one."""
        out = self._run(0, tactic_of)
        for batch in range(1, self._setting.batches):
            self._run(batch, tactic_of)
        return out

    def check(self, out: torch.Tensor) -> float:
        """Returns the relative error of what `warm` returned. Raises NoResultError if it is too large."""
        setting = self._setting
        tolerance = setting.backend.tolerance(setting.layer)
        return require_right(out, self._reference, tolerance, f"Rank {setting.ranks.rank}'s output")

    def call(self, tactic_of: TacticOf, batch: int) -> MarkedCall:
        """Returns a call of the block on one batch."""
        return partial(self._call, tactic_of, batch)

    def dummy(self, tactic_of: TacticOf, batch: int) -> MarkedCall:
        """Returns a call of the experts' kernel alone, on a sampled routing of this rank."""
        runner, rows = self._sampled()
        tactic = tactic_of(rows)
        runner.run(tactic, batch)  # what compiles cannot be captured

        def call(mark: Mark) -> None:
            runner.run(tactic, batch)
            mark("experts")

        return call

    @cached_property
    def _reference(self) -> torch.Tensor:
        setting = self._setting
        deployed = setting.layer, setting.regime, setting.form
        return block_reference(setting.spare, *deployed, self._router, self._hidden[0])

    def _call(self, tactic_of: TacticOf, batch: int, mark: Mark) -> torch.Tensor:
        return self._block.run(self._hidden[batch], tactic_of, mark)

    def _run(self, batch: int, tactic_of: TacticOf) -> torch.Tensor:
        out = self._block.run(self._hidden[batch], tactic_of)
        self.rows[batch], self.received_bytes[batch] = self._block.arrived
        return out

    def _sampled(self) -> tuple[FillableRunner, int]:
        setting, rank = self._setting, self._setting.ranks.rank
        rows = max(1, round(rows_for_tokens(setting.layer, self._regime, self._tokens, rank)))
        if self._dummies is None:
            self._dummies = self._experts.sampled(self._regime, rows, setting.batches)
        return self._dummies, rows

    def _made(self, batch: int) -> torch.Tensor:
        setting = self._setting
        ranks, number = setting.ranks, setting.ranks.rank * setting.batches + batch
        generator = torch.Generator(ranks.device).manual_seed(self._regime.seed + SEEDS_APART * (number + 1))
        shape = self._tokens, setting.layer.hidden_size
        dtype = self._experts.inputs(self._tokens).x.dtype
        return torch.randn(shape, generator=generator, device=ranks.device).to(dtype)
