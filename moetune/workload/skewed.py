"""Samples the ids that one rank's kernel receives under a skewed distribution or from a recording."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from moetune.errors import UsageError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard
from moetune.workload.distribution import seeded_generator, uniform_subsets
from moetune.workload.placed import copies_of, is_local_skew, local_parts
from moetune.workload.preferences import Preferences, Weighted, preferences
from moetune.workload.router import Choice, arriving, front_of_blocks, is_local
from moetune.workload.scope import of_scope
from moetune.workload.skew import capped

_MOST_TOKENS = 1 << 17
"""The most tokens that are sampled at a time to find those that arrive."""
_LEAST_HIT = 1e-3
"""The least hit fraction at which a grouped router is simulated until enough tokens arrive."""


class Copies:
    """The physical experts of some experts.

    Attributes:
        count: int64 `[n]`, the copies of each expert, at least 1.
        slots: int64 `[n, most copies]`, their ids; the places beyond `count` are undefined.
    """

    def __init__(self, of_slot: Sequence[tuple[int, int]], num_experts: int) -> None:
        """Args: of_slot: (expert, id) of each physical expert; num_experts: n."""
        slots: list[list[int]] = [[] for _ in range(num_experts)]
        for expert, slot in of_slot:
            slots[expert].append(slot)
        most = max(map(len, slots))
        self.count = torch.tensor([len(ids) for ids in slots])
        self.slots = torch.tensor([ids + ids[:1] * (most - len(ids)) for ids in slots])

    def chosen(self, generator: torch.Generator, experts: torch.Tensor) -> torch.Tensor:
        """Returns a random copy of each of `experts`, int64 of the same shape."""
        if self.slots.shape[1] == 1:
            return self.slots[:, 0][experts]
        chance = torch.rand(experts.shape, dtype=torch.float64, generator=generator)
        return self.slots[experts, (chance * self.count[experts]).long()]


class Packed:
    """The preferences of rows that have local experts only.

    Attributes:
        experts: the local experts, each once.
        preferences: over these experts, of min(k, their number).
        copies: their local physical experts.
    """

    def __init__(self, layer: MoELayer, regime: Regime, shard: Shard) -> None:
        of_slot = copies_of(layer, regime)
        local = range(shard.first, shard.first + shard.num_local)
        self.experts = sorted({of_slot[slot] for slot in local})
        place = {expert: index for index, expert in enumerate(self.experts)}
        self.copies = Copies([(place[of_slot[slot]], slot) for slot in local], len(self.experts))
        self.preferences = self._preferences(layer, regime, shard)

    def _preferences(self, layer: MoELayer, regime: Regime, shard: Shard) -> Preferences:
        if is_local_skew(regime):
            return of_scope(layer, regime, shard.rank)
        top_k = min(layer.top_k, len(self.experts))
        counts = torch.bincount(torch.tensor(copies_of(layer, regime))).tolist()
        of_all = of_scope(layer, regime).chances
        loads = [
            of_all[expert] * copies / counts[expert]
            for expert, copies in zip(self.experts, self.copies.count.tolist(), strict=True)
        ]
        if not sum(loads):
            raise UsageError(
                f"Under {regime.distribution} rank {shard.rank} gets no tokens, so there is nothing to measure.",
                "Choose another rank, such as --rank fullest.",
            )
        without_groups = layer.routing.model_copy(update={"num_groups": 1, "top_k_groups": 1})
        return preferences(without_groups, tuple(top_k * share for share in capped(loads, 1.0 / top_k)), top_k)

    def chances(self) -> list[float]:
        """Returns the chance that a row selects each local physical expert, in the order of their ids."""
        of_slot = {
            slot: chance / count
            for chance, count, slots in zip(
                self.preferences.chances, self.copies.count.tolist(), self.copies.slots.tolist(), strict=True
            )
            for slot in slots[:count]
        }
        return [of_slot[slot] for slot in sorted(of_slot)]


@lru_cache(maxsize=32)
def packed(layer: MoELayer, regime: Regime, rank: int) -> Packed:
    """Returns the preferences of the packed rows of `rank`."""
    return Packed(layer, regime, regime.shard(layer, rank))


class SkewedSampler:
    """Samples one draw for the rank of `shard`. The arguments are those of `routing.realize`."""

    def __init__(self, layer: MoELayer, regime: Regime, rows: int, shard: Shard, draw: int) -> None:
        self.layer, self.regime, self.rows, self.shard = layer, regime, rows, shard
        self.generator = seeded_generator(
            "skew",
            layer.num_experts,
            layer.top_k,
            repr(layer.routing),
            (shard.first, shard.num_local, shard.num_physical, regime.ep_size),
            regime.dispatch,
            regime.layout,
            regime.eplb,
            regime.distribution,
            regime.seed,
            rows,
            draw,
        )
        of_slot = copies_of(layer, regime)
        self.copies = Copies([(expert, slot) for slot, expert in enumerate(of_slot)], layer.num_experts)

    def ids(self) -> Choice:
        """Returns ids of physical experts, and the router's weights for them, or None if no router chose them."""
        match self.regime.layout:
            case "packed":
                return self._packed()
            case "deduplicated":
                return self._deduplicated()
            case "slot":
                ids, weights = self._deduplicated()
                local, first = is_local(ids, self.shard), slice(0, self.rows)
                return ids[local][first].unsqueeze(1), None if weights is None else weights[local][first].unsqueeze(1)
            case "pool":
                ids, weights = self._global(self.rows)
                return front_of_blocks(ids, weights, self.shard, self.regime.ep_size)
            case None | "batched":
                return self._global(self.rows)

    def _global(self, rows: int) -> Choice:
        experts, weights = of_scope(self.layer, self.regime).sample(self.generator, rows)
        return self.copies.chosen(self.generator, experts), weights

    def _deduplicated(self) -> Choice:
        scope, parts = of_scope(self.layer, self.regime), local_parts(self.layer, self.regime, self.shard.rank)
        size = min(max(64, 2 * self.rows), _MOST_TOKENS)
        if isinstance(scope, Weighted):
            held = [expert for expert, part in enumerate(parts) if part]
            if not self.regime.redundant_experts:
                return scope.sample_any_of(self.generator, self.rows, held), None

            def holding() -> Choice:
                experts = scope.sample_any_of(self.generator, size, held)
                return self.copies.chosen(self.generator, experts), None

            return arriving(iter(holding, None), self.shard, self.rows)
        if 1.0 - scope.local_slots(parts)[0] < _LEAST_HIT:
            raise UsageError(
                f"Under {self.regime.distribution} rank {self.shard.rank} gets fewer than one token of "
                f"{round(1 / _LEAST_HIT):,}, so its rows cannot be sampled.",
                "Choose another rank, such as --rank fullest.",
            )
        return arriving(iter(lambda: self._global(size), None), self.shard, self.rows)

    def _packed(self) -> Choice:
        local = packed(self.layer, self.regime, self.shard.rank)
        experts, weights = local.preferences.sample(self.generator, self.rows)
        ids = local.copies.chosen(self.generator, experts)
        missing = self.layer.top_k - ids.shape[1]
        if not missing:
            return ids, weights
        others = torch.tensor(sorted(set(range(self.layer.num_experts)).difference(local.experts)))
        chosen = others[uniform_subsets(self.generator, self.rows, len(others), missing)]
        return torch.cat((ids, self.copies.chosen(self.generator, chosen)), dim=1), None
