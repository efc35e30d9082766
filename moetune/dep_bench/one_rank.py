"""`OneRank`, the calls of one point if one GPU stands for one rank of many, without the wire."""

from __future__ import annotations

from functools import partial

import torch

from moetune.dep_bench.block import TacticOf
from moetune.dep_bench.experts import Experts
from moetune.dep_bench.part_clock import Mark, MarkedCall
from moetune.dep_bench.reference import require_right
from moetune.dep_bench.router import router_of
from moetune.dep_bench.setting import Setting
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.dispatch import rows_for_tokens


class OneRank:
    """One batch size on one rank of `regime.ep_size`. The simulated router makes the rows that reach the rank.

    The parts are the router and top-k of the rank's own tokens, and the experts' kernel. The arguments and attributes
    are those of `OverRanks`.
    """

    is_static = True

    def __init__(self, setting: Setting, regime: Regime, tokens: int) -> None:
        self._setting = setting
        layer, device = setting.layer, setting.ranks.device
        self._router = router_of(layer, regime.distribution, regime.seed, device)
        rows = max(1, round(rows_for_tokens(layer, regime, tokens)))
        self.rows, self.received_bytes = [rows] * setting.batches, [0] * setting.batches
        experts = Experts(setting.backend, layer, setting.regime, regime.rank, device)
        self._runner = experts.sampled(regime, rows, setting.batches)
        generator = torch.Generator(device).manual_seed(regime.seed)
        self._hidden = torch.randn((setting.batches, tokens, layer.hidden_size), generator=generator, device=device).to(
            torch.bfloat16
        )

    def warm(self, tactic_of: TacticOf) -> torch.Tensor:
        """Runs an arm on the first batch, and returns the kernel's output, which the next run overwrites."""
        return self._call(tactic_of(self.rows[0]), 0, lambda part: None)

    def check(self, out: torch.Tensor) -> float:
        """Returns the relative error of what `warm` returned. Raises NoResultError if it is too large."""
        setting = self._setting
        tolerance = setting.backend.tolerance(setting.layer)
        return require_right(out, self._runner.reference(0), tolerance, "The kernel's output")

    def call(self, tactic_of: TacticOf, batch: int) -> MarkedCall:
        """Returns a call of this rank's part of the block on one batch."""
        return partial(self._call, tactic_of(self.rows[batch]), batch)

    def dummy(self, tactic_of: TacticOf, batch: int) -> None:
        """Returns None: the rows of the block are sampled already."""

    def _call(self, tactic: Tactic, batch: int, mark: Mark) -> torch.Tensor:
        logits = self._router.logits(self._hidden[batch])
        mark("router")
        self._router.top_k(logits)
        mark("top-k")
        out = self._runner.run(tactic, batch)
        mark("experts")
        return out
