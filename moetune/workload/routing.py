"""Samples the routing that one rank's kernel receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetune.errors import UsageError
from moetune.recordings.reading import with_digest
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime, Shard
from moetune.workload.distribution import (
    deal,
    deal_counts,
    interleaved_order,
    quotas,
    saturated_rows,
    seeded_generator,
    spaced_order,
    uniform_subsets,
)
from moetune.workload.law import local_slot_law
from moetune.workload.placed import copies_of
from moetune.workload.router import (
    Choice,
    arriving_top_k,
    front_of_blocks,
    has_closed_form,
    is_local,
    random_top_k,
    representative_shard,
)
from moetune.workload.skewed import SkewedSampler

_SERIAL_ELEMENTS = 16384  # torch wakes its thread pool above 32768, which costs milliseconds on a busy host
_WEIGHT_ROWS = 1021


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """One sampled routing, on the CPU.

    Attributes:
        topk_ids: int32 `[M, k]`, ids of physical experts, −1 for none; k is 1 in the slot layout.
        topk_weights: float32 `[M, k]`, 0 where there is no id.
        load: int64 `[L]`, the slots of each local expert, counted from the ids.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    load: torch.Tensor


def realize(layer: MoELayer, regime: Regime, rows: int, rank: int | None = None, draw: int = 0) -> Routing:
    """Returns draw number `draw` of `rows` rows for `rank`'s kernel; None means the regime's rank.

    The result depends only on E, k, routing method, shard, dispatch, layout, EPLB, distribution, seed, rows and draw.
    If all ranks are alike and no expert is redundant, every rank has the ids of rank 0, shifted by whole shards.

    In a balanced draw the loads of any two physical experts differ by at most one: of all experts for the dispatches
    none and allgather, and of the local experts for an all-to-all. With redundant experts this can be impossible,
    because no row has two copies of one expert. Then the rows stay valid, and the loads are as even as in
    `saturated_rows`. In the layouts deduplicated and pool, a row for which there are too few non-local experts has more
    local ones.

    Under a skew the ids of a row are distinct too. `placed.is_local_skew` says over which experts it is skewed.

    A recording replaces the router: whole recorded tokens are drawn with replacement, and dispatched like others. In
    packed rows, where all slots are local, the recorded loads of the local experts are kept, not which are together.

    Weights come from the layer's router if it chose the ids, or from the recording if it has them. Otherwise they are
    random, add up to the routing's scaling in each row, and repeat after 1021 rows.

    Raises:
        UsageError: `rows` is below 1, `draw` is below 0, ep does not divide the rows of a pool, the regime does not fit
            the layer, there is no such rank, or a recording cannot be read or is not at hand.
    """
    regime = with_digest(regime)
    if rows < 1:
        raise UsageError(f"rows must be at least 1, given {rows}.")
    if draw < 0:
        raise UsageError(f"draw must be at least 0, given {draw}.")
    if regime.layout == "pool" and rows % regime.ep_size:
        raise UsageError(
            f"A pool has ep_size = {regime.ep_size} equal blocks, given {rows} rows.",
            f"Ask for a multiple of {regime.ep_size}.",
        )
    shard = regime.shard(layer, rank)
    drawn_for = representative_shard(layer, regime, rank)
    sampler: _Sampler | SkewedSampler
    if regime.skew:
        sampler = SkewedSampler(layer, regime, rows, drawn_for, draw)
        ids, weights = sampler.ids()
    else:
        sampler = _Sampler(layer, regime, rows, drawn_for, draw)
        ids, weights = sampler.balanced() if regime.distribution == "balanced" else sampler.random()
    if shard != drawn_for:
        ids = torch.where(ids < 0, ids, (ids + shard.first) % shard.num_physical)
    ids = ids.int()
    if weights is None:
        weights = _random_weights(sampler.generator, ids, layer.routing.scaling)
    return Routing(ids, weights, _load(ids, shard))


def stress(layer: MoELayer, regime: Regime, routing: Routing, rank: int | None, factor: float) -> Routing:
    """Returns `routing` with `factor` times the load of `rank`'s busiest expert; None means the regime's rank.

    If there are too few rows for this load, the expert is in every row that can have it. Its new slots replace slots of
    other local experts, and those of non-local experts only if there are not enough. So the sum of `load` stays the
    same where possible. The experts of a row stay distinct, and no row has two copies of one expert. Rows of −1 stay
    as they are.

    Raises:
        UsageError: `factor` is below 1, or there is no such rank.
    """
    if factor < 1:
        raise UsageError(f"A stress factor must be at least 1, given {factor}.")
    shard = regime.shard(layer, rank)
    busiest = int(routing.load.argmax())
    load = int(routing.load[busiest])
    hot = shard.first + busiest
    ids = routing.topk_ids.clone()

    expert = torch.tensor(copies_of(layer, regime))
    twin = (ids >= 0) & (expert[ids.long().clamp(min=0)] == expert[hot])
    preference = (ids >= 0).int() + is_local(ids, shard)
    preference[twin.any(1)] = 0
    preference[twin & (ids != hot)] = 2
    preference[(ids == hot).any(1)] = 0

    generator = seeded_generator("stress", regime.seed, tuple(ids.shape), load)
    jitter = torch.rand(ids.shape, dtype=torch.float64, generator=generator)
    willing, column = (preference + jitter).masked_fill_(preference == 0, 0.0).max(1)
    wanted = min(round(factor * load) - load, int((willing > 0).sum()))
    changed = willing.topk(wanted).indices
    ids[changed, column[changed]] = hot
    return Routing(ids, routing.topk_weights, _load(ids, shard))


def padded(routing: Routing, rows: int) -> Routing:
    """Returns `routing` with rows of −1 appended until it has `rows` rows; `load` is the same."""
    missing = rows - len(routing.topk_ids)
    if not missing:
        return routing
    pad = torch.nn.functional.pad
    ids, weights = routing.topk_ids, routing.topk_weights
    return Routing(pad(ids, (0, 0, 0, missing), value=-1), pad(weights, (0, 0, 0, missing)), routing.load)


def _load(ids: torch.Tensor, shard: Shard) -> torch.Tensor:
    counts = torch.zeros(shard.num_physical + 1, dtype=torch.int64)
    for part in torch.split(ids.flatten(), _SERIAL_ELEMENTS):
        counts += torch.bincount(part + 1, minlength=len(counts))
    return counts[1 + shard.first : 1 + shard.first + shard.num_local].clone()


def _random_weights(generator: torch.Generator, ids: torch.Tensor, scaling: float) -> torch.Tensor:
    rows, width = ids.shape
    weights = torch.rand(min(rows, _WEIGHT_ROWS), width, generator=generator).add_(0.5)
    weights = deal(weights.mul_(scaling / weights.sum(1, keepdim=True)), rows, width)
    empty = ids[:, 0] < 0
    return weights.masked_fill_(empty.unsqueeze(1), 0.0) if bool(empty.any()) else weights


class _Sampler:
    """Samples one draw for the rank of `shard`."""

    def __init__(self, layer: MoELayer, regime: Regime, rows: int, shard: Shard, draw: int) -> None:
        self.layer, self.regime, self.rows, self.shard = layer, regime, rows, shard
        self.num_distinct = min(shard.num_local, layer.num_experts)
        self.local_k = min(layer.top_k, self.num_distinct)
        self.replicated = shard.num_physical > layer.num_experts
        self.generator = seeded_generator(
            layer.num_experts,
            layer.top_k,
            repr(layer.routing),
            (shard.first, shard.num_local, shard.num_physical, regime.ep_size),
            regime.dispatch,
            regime.layout,
            regime.distribution,
            regime.seed,
            rows,
            draw,
        )

    def random(self) -> Choice:
        match self.regime.layout:
            case "packed":
                return self._random_packed()
            case "deduplicated":
                return self._random_deduplicated()
            case "slot":
                return self._random_slot()
            case "pool":
                return self._random_pool()
            case None | "batched":
                return self._random_global()

    def balanced(self) -> Choice:
        match self.regime.layout:
            case "packed":
                return self._balanced_packed(), None
            case "deduplicated":
                return self._balanced_with(self._shuffled(self._balanced_counts(arrived_only=True))), None
            case "slot":
                order = torch.randperm(self.shard.num_local, dtype=torch.int32, generator=self.generator)
                return deal(order + self.shard.first, self.rows, 1), None
            case "pool":
                return self._balanced_pool(), None
            case None | "batched":
                return self._balanced_global(), None

    def _random_global(self) -> Choice:
        return random_top_k(self.generator, self.layer, 0, self.shard.num_physical, self.rows, self.layer.top_k)

    def _random_packed(self) -> Choice:
        if self.local_k == self.layer.top_k:
            first, count = self.shard.first, self.shard.num_local
            return random_top_k(self.generator, self.layer, first, count, self.rows, self.local_k)
        counts = torch.full((self.rows,), self.local_k)
        if self.replicated:
            return self._completed(self._uniform_local(counts)), None
        return self._uniform_with(counts), None

    def _random_deduplicated(self) -> Choice:
        if not has_closed_form(self.layer, self.shard):
            return arriving_top_k(self.generator, self.layer, self.shard, self.rows)
        law = torch.tensor(self._law(arrived_only=True), dtype=torch.float64)
        chance = torch.rand(self.rows, dtype=torch.float64, generator=self.generator) * law.sum()
        counts = torch.bucketize(chance, law.cumsum(0)[:-1], right=True)
        ids = self._uniform_with(counts)
        shuffle = torch.rand(ids.shape, dtype=torch.float64, generator=self.generator).argsort(1)
        return ids.gather(1, shuffle), None

    def _random_slot(self) -> Choice:
        ids, weights = self._random_deduplicated()
        local = is_local(ids, self.shard)
        first = slice(0, self.rows)
        return ids[local][first].unsqueeze(1), None if weights is None else weights[local][first].unsqueeze(1)

    def _random_pool(self) -> Choice:
        ids, weights = self._random_global()
        return front_of_blocks(ids, weights, self.shard, self.regime.ep_size)

    def _balanced_global(self) -> torch.Tensor:
        layer, shard = self.layer, self.shard
        if not self.replicated:
            sizes = [self.regime.shard(layer, rank).num_local for rank in range(self.regime.ep_size)]
            return deal(interleaved_order(self.generator, sizes, shard.rank), self.rows, layer.top_k)
        order = spaced_order(self.generator, shard.num_physical, layer.num_experts, layer.top_k)
        if order is None:
            return saturated_rows(self.generator, self.rows, layer.top_k, shard.num_physical, layer.num_experts)
        start = int(is_local(order, shard).int().argmax())
        return deal(order.roll(-start), self.rows, layer.top_k)

    def _balanced_packed(self) -> torch.Tensor:
        if self.local_k < self.layer.top_k:
            return self._balanced_with(torch.full((self.rows,), self.local_k))
        order = spaced_order(self.generator, self.shard.num_local, self.num_distinct, self.local_k)
        if order is None:
            ids = saturated_rows(self.generator, self.rows, self.local_k, self.shard.num_local, self.num_distinct)
            return ids + self.shard.first
        return deal(order + self.shard.first, self.rows, self.local_k)

    def _balanced_pool(self) -> torch.Tensor:
        counts = self._balanced_counts(arrived_only=False).flip(0)
        blocks = counts.view(-1, self.regime.ep_size).T
        keys = torch.rand(blocks.shape, dtype=torch.float64, generator=self.generator) + (blocks == 0)
        counts = blocks.gather(1, keys.argsort(1)).flatten()
        return self._balanced_with(counts).masked_fill_((counts == 0).unsqueeze(1), -1)

    def _balanced_counts(self, arrived_only: bool) -> torch.Tensor:
        """Returns the number of local slots of each row, ascending, from the rounded router's law: int64 `[M]`."""
        law = torch.tensor(quotas(self._law(arrived_only), self.rows))
        return torch.arange(len(law)).repeat_interleave(law)

    def _balanced_with(self, counts: torch.Tensor) -> torch.Tensor:
        """Returns rows with `counts[t]` local ids, dealt cyclically, then non-local ones (−1 if the count is 0)."""
        top_k = self.layer.top_k
        order = spaced_order(self.generator, self.shard.num_local, self.num_distinct, self.local_k)
        if order is None:
            ids = saturated_rows(self.generator, self.rows, self.local_k, self.shard.num_local, self.num_distinct)
            ids = ids.masked_fill_(torch.arange(self.local_k) >= counts.unsqueeze(1), -1 - self.shard.first)
            local = torch.nn.functional.pad(ids + self.shard.first, (0, top_k - self.local_k), value=-1)
        else:
            local = deal_counts(order + self.shard.first, counts, top_k)
        if self.replicated:
            return self._completed(local)
        non_local = torch.arange(self.shard.num_physical - self.shard.num_local, dtype=torch.int32)
        if not len(non_local):
            return local
        non_local = non_local[torch.randperm(len(non_local), generator=self.generator)]
        non_local += self.shard.num_local * (non_local >= self.shard.first)
        missing = torch.where(counts > 0, top_k - counts, 0)
        return _join(local, deal_counts(non_local, missing, top_k), counts)

    def _uniform_with(self, counts: torch.Tensor) -> torch.Tensor:
        """Returns rows of a uniform `counts[t]`-subset of the local experts, then uniform non-local ones.

        No expert may be redundant.
        """
        local = self._uniform_local(counts)
        num_non_local = self.shard.num_physical - self.shard.num_local
        size = min(self.layer.top_k, num_non_local)
        non_local = uniform_subsets(self.generator, self.rows, num_non_local, size)
        non_local += self.shard.num_local * (non_local >= self.shard.first)
        return _join(local, non_local, counts)

    def _uniform_local(self, counts: torch.Tensor) -> torch.Tensor:
        """Returns a uniform `counts[t]`-subset of the local physical experts in each row, then −1: int64 `[M, k]`."""
        ids = uniform_subsets(self.generator, self.rows, self.shard.num_local, self.local_k) + self.shard.first
        ids = torch.nn.functional.pad(ids, (0, self.layer.top_k - self.local_k), value=-1)
        return ids.masked_fill_(torch.arange(self.layer.top_k) >= counts.unsqueeze(1), -1)

    def _completed(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns `ids` with each −1 replaced by a random non-local id of an expert that is not yet in the row.

        A row that needs more experts than have a non-local copy gets random local ones.
        """
        num_experts, top_k, shard = self.layer.num_experts, self.layer.top_k, self.shard
        slots = torch.arange(shard.num_physical)
        slots = slots[torch.randperm(shard.num_physical, generator=self.generator)]
        slots = slots[is_local(slots, shard).int().argsort(stable=True, descending=True)]
        holder = torch.empty(num_experts, dtype=torch.int64)
        for slot in slots.tolist():
            holder[slot % num_experts] = slot
        keys = torch.rand(len(ids), num_experts, dtype=torch.float64, generator=self.generator)
        keys += is_local(holder, shard)
        present = torch.where(ids < 0, num_experts, ids.long() % num_experts)
        taken = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool).scatter_(1, present, True)
        others = keys.masked_fill_(taken[:, :-1], 3.0).topk(top_k, dim=1, largest=False).indices
        return _join(ids.long(), holder[others], (ids >= 0).sum(1))

    def _law(self, arrived_only: bool) -> list[float]:
        probabilities = local_slot_law(self.layer, self.shard, self.regime.seed).probabilities
        return [0.0 if arrived_only and not count else p for count, p in enumerate(probabilities)]

    def _shuffled(self, values: torch.Tensor) -> torch.Tensor:
        return values[torch.randperm(len(values), generator=self.generator)]


def _join(head: torch.Tensor, tail: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns, as row t, the first `counts[t]` entries of `head` `[M, k]`, then the first k − `counts[t]` of `tail`."""
    column = torch.arange(head.shape[1])
    position = column - counts.unsqueeze(1)
    filled = tail.gather(1, position.clamp(0, max(tail.shape[1] - 1, 0))) if tail.shape[1] else head
    return torch.where(position < 0, head, filled)
