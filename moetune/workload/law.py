"""Computes the distribution of a token's local slots on one rank under random router logits.

A grouped router decides how many of a token's experts lie in one group (`group_counts`). All else is uniform, because
groups are exchangeable, and so are the experts of a group: which groups have which numbers, which experts of a group
are chosen, and which copy of an expert. So the law of every rank is a sum over the few ways to split k into the groups.
The sum is exact if the chances of these ways are exact. Where they are simulated, one simulation serves all ranks, with
and without redundant experts.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Shard
from moetune.workload.distribution import seeded_generator
from moetune.workload.ranks import num_copies, straddles
from moetune.workload.router import has_closed_form, random_top_k

LAW_TOKENS = 16384

Counts = tuple[int, ...]
"""How many of a token's experts lie in each of the router's groups, ascending."""
Chances = tuple[float, ...]
"""Entry c is the chance of c local slots."""
Group = tuple[tuple[tuple[int, int], int], ...]
"""A shard's part of one group. Each entry is ((local copies, all copies), the number of experts with these copies)."""


@dataclass(frozen=True)
class _ShardInSeed:
    """A shard as part of a seed. Its representation must not change, because recorded numbers depend on the seed."""

    rank: int
    first: int
    num_local: int
    num_physical: int

    def __repr__(self) -> str:
        return f"Shard(rank={self.rank}, first={self.first}, num_local={self.num_local}, num_slots={self.num_physical})"


@dataclass(frozen=True, slots=True)
class LocalSlotLaw:
    """The distribution of a token's local slots on one rank.

    Attributes:
        probabilities: entry c is the chance that c of the token's k slots are local.
        simulated: whether these are frequencies of simulated routing.
    """

    probabilities: Chances
    simulated: bool

    @property
    def hit_fraction(self) -> float:
        """Returns the chance that a token has a slot on the rank."""
        return 1.0 - self.probabilities[0]


@lru_cache(maxsize=1024)
def local_slot_law(layer: MoELayer, shard: Shard, seed: int = 0) -> LocalSlotLaw:
    """Returns the distribution of a token's local slots in `shard` under random router logits.

    An ungrouped router on independent logits chooses a uniform k-subset of E experts. So the number of chosen experts
    among L given ones is hypergeometric: C(L, c)·C(E − L, k − c) / C(E, k). With a group limit, and shards that are
    whole groups or lie in one group each, the law is simulated: it is the average over all shards of this size of the
    frequencies in `LAW_TOKENS` tokens of the router, seeded by `seed`. In all other cases it is the sum that the
    module's docstring describes.
    """
    experts, top_k, local = layer.num_experts, layer.top_k, shard.num_local
    if has_closed_form(layer, shard):
        ways = [math.comb(local, c) * math.comb(experts - local, top_k - c) for c in range(top_k + 1)]
        return LocalSlotLaw(tuple(way / math.comb(experts, top_k) for way in ways), simulated=False)
    if _experts_are_alike(layer, shard):
        return LocalSlotLaw(_average_over_shards(layer, local, shard, seed), simulated=True)
    counts = group_counts(layer, seed)
    tables = [_table(group, top_k) for group in _groups(layer, shard)]
    return LocalSlotLaw(_mixed(counts, tables, top_k), simulated=_counts_are_simulated(layer))


@lru_cache(maxsize=1024)
def expert_shares(layer: MoELayer, shard: Shard, seed: int = 0) -> tuple[tuple[int, Chances], ...]:
    """Returns, for each kind of local physical experts, their number and the chances to be among c local slots.

    Entry c of the chances is for a token with c local slots, c/L if all local physical experts are of one kind. Two are
    of one kind if their experts have equally many copies, equally many of them local, and lie in groups of which the
    shard holds equal parts.
    """
    top_k, local = layer.top_k, shard.num_local
    if has_closed_form(layer, shard) or _experts_are_alike(layer, shard):
        return ((local, tuple(count / local for count in range(top_k + 1))),)
    law = local_slot_law(layer, shard, seed).probabilities
    counts, groups = group_counts(layer, seed), _groups(layer, shard)
    tables = [_table(group, top_k) for group in groups]
    kinds = []
    for group, alike in Counter(groups).items():
        at = groups.index(group)
        for (mine, copies), experts in group:
            if mine:
                with_it = [*tables[:at], _table_with(group, (mine, copies), top_k), *tables[at + 1 :]]
                joint = _mixed(counts, with_it, top_k)
                shares = tuple(
                    together / chance if chance else 0.0 for together, chance in zip(joint, law, strict=True)
                )
                kinds.append((alike * experts * mine, shares))
    return tuple(kinds)


@lru_cache(maxsize=64)
def group_counts(layer: MoELayer, seed: int = 0) -> tuple[tuple[Counts, float], ...]:
    """Returns the ways in which a token's k experts split into the router's groups, each with its chance.

    Without a group limit all experts are one group. If a group's score is that of its best expert, the chances follow
    from the order of the experts alone: see `_counts_by_best`. If it is the sum of its two best, they depend on the
    scores themselves. Then they are the frequencies in `LAW_TOKENS` tokens of the router, seeded by `seed`.
    """
    if not layer.routing.grouped:
        return (((layer.top_k,), 1.0),)
    if not _counts_are_simulated(layer):
        return _counts_by_best(layer)
    generator = seeded_generator("group counts", layer.num_experts, layer.top_k, repr(layer.routing), seed)
    experts, _ = random_top_k(generator, layer, 0, layer.num_experts, LAW_TOKENS, layer.top_k)
    group_size = layer.num_experts // layer.routing.num_groups
    found = torch.zeros(LAW_TOKENS, layer.routing.num_groups, dtype=torch.int64)
    found.scatter_add_(1, experts // group_size, torch.ones_like(experts))
    ways = Counter(tuple(way) for way in found.sort(1).values.tolist())
    return tuple((way, times / LAW_TOKENS) for way, times in sorted(ways.items()))


def _counts_are_simulated(layer: MoELayer) -> bool:
    return layer.routing.grouped and layer.routing.group_score == "top2"


def _counts_by_best(layer: MoELayer) -> tuple[tuple[Counts, float], ...]:
    """Returns `group_counts` for a router that keeps the groups of the best experts.

    Such a router goes through the experts from the best to the worst. Each of the remaining experts is equally likely
    to be the next. Once experts of `top_k_groups` groups are taken, experts of other groups are skipped. The first k
    experts that are not skipped are the token's.
    """
    method, group_size = layer.routing, layer.num_experts // layer.routing.num_groups
    ways: dict[Counts, float] = {(): 1.0}
    for taken in range(layer.top_k):
        longer: defaultdict[Counts, float] = defaultdict(float)
        for counts, chance in ways.items():
            new_groups = method.num_groups - len(counts) if len(counts) < method.top_k_groups else 0
            left = group_size * (len(counts) + new_groups) - taken
            if new_groups:
                longer[tuple(sorted((*counts, 1)))] += chance * new_groups * group_size / left
            for at, count in enumerate(counts):
                if count == group_size:
                    continue
                one_more = tuple(sorted((*counts[:at], count + 1, *counts[at + 1 :])))
                longer[one_more] += chance * (group_size - count) / left
        ways = longer
    return tuple(((*(0,) * (method.num_groups - len(counts)), *counts), chance) for counts, chance in ways.items())


def _groups(layer: MoELayer, shard: Shard) -> list[Group]:
    """Returns the shard's part of each router group of which it holds an expert."""
    num_groups = layer.routing.num_groups if layer.routing.grouped else 1
    group_size = layer.num_experts // num_groups
    local = Counter(slot % layer.num_experts for slot in range(shard.first, shard.first + shard.num_local))
    groups = []
    for first in range(0, layer.num_experts, group_size):
        experts = range(first, first + group_size)
        if any(local[expert] for expert in experts):
            kinds = Counter((local[expert], num_copies(layer.num_experts, shard, expert)) for expert in experts)
            groups.append(tuple(sorted(kinds.items())))
    return groups


@cache
def _table(group: Group, top_k: int) -> tuple[Chances, ...]:
    """Returns, as entry j, the chances of local slots if j of the group's experts are chosen.

    There is no entry for more experts than the group has, or than `top_k`. The slot of a chosen expert is local with
    chance q = local copies / all copies. Multiply the polynomials 1 + t·(1 − q + q·z) of all n experts of the group:
    the coefficient of t^j is C(n, j) times the generating function of entry j.
    """
    size = sum(experts for _, experts in group)
    ways: list[list[float]] = [[1.0]]
    for (mine, copies), experts in group:
        q = mine / copies
        of_kind = [
            [math.comb(experts, j) * math.comb(j, c) * q**c * (1 - q) ** (j - c) for c in range(j + 1)]
            for j in range(min(experts, top_k) + 1)
        ]
        product = [[0.0] * (j + 1) for j in range(min(len(ways) + len(of_kind) - 1, top_k + 1))]
        for j, many in enumerate(ways):
            for i, more in enumerate(of_kind[: len(product) - j]):
                _add(product[j + i], _times(many, more), 1.0)
        ways = product
    return tuple(tuple(way / math.comb(size, j) for way in of_j) for j, of_j in enumerate(ways))


def _table_with(group: Group, kind: tuple[int, int], top_k: int) -> tuple[Chances, ...]:
    """Returns the entries of `_table`, each chance jointly with the choice of one given physical expert.

    This is one of the local physical experts of `kind`. Its expert is among j chosen ones of n with chance j/n, and
    then this copy is chosen with chance 1/copies. The other experts are as in a group without this expert.
    """
    others = Counter(dict(group))
    others[kind] -= 1
    rest = _table(tuple(sorted((+others).items())), top_k)
    size = sum(experts for _, experts in group)
    table: list[Chances] = [(0.0,)]
    for j, of_others in enumerate(rest[:top_k], start=1):
        table.append((0.0, *(j / size / kind[1] * chance for chance in of_others)))
    return tuple(table)


def _mixed(law: Iterable[tuple[Counts, float]], tables: Sequence[tuple[Chances, ...]], top_k: int) -> Chances:
    """Returns the chances of local slots if the counts of `law` are assigned to the groups in random order.

    `tables` has one entry for each group with local experts; the other groups add no local slots.
    """

    @cache
    def local_from(at: int, counts: Counts) -> Chances:
        """Returns the chances of local slots in the groups from index `at` on; `counts` are not yet assigned."""
        if at == len(tables):
            return (1.0,)
        chances = [0.0] * (top_k + 1)
        for count, times in Counter(counts).items():
            where = counts.index(count)
            rest = local_from(at + 1, counts[:where] + counts[where + 1 :])
            _add(chances, _times(tables[at][count], rest), times / len(counts))
        return tuple(chances)

    total = [0.0] * (top_k + 1)
    for counts, chance in law:
        _add(total, local_from(0, counts), chance)
    return tuple(total)


def _add(total: list[float], chances: Sequence[float], factor: float) -> None:
    for count, chance in enumerate(chances):
        if chance:
            total[count] += factor * chance


def _times(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Returns the product of two polynomials."""
    product = [0.0] * (len(one) + len(other) - 1)
    for i, a in enumerate(one):
        if a:
            for j, b in enumerate(other):
                product[i + j] += a * b
    return product


def _experts_are_alike(layer: MoELayer, shard: Shard) -> bool:
    """Returns whether no expert is redundant and every shard of this size is whole router groups or lies in one."""
    local = shard.num_local
    equal = shard.num_physical == layer.num_experts and layer.num_experts % local == 0 and shard.first % local == 0
    return equal and not straddles(layer, local)


def _average_over_shards(layer: MoELayer, local: int, shard: Shard, seed: int) -> Chances:
    key = _ShardInSeed(shard.rank, shard.first, shard.num_local, shard.num_physical)
    generator = seeded_generator("local slot law", layer.num_experts, layer.top_k, repr(layer.routing), key, seed)
    slots, _ = random_top_k(generator, layer, 0, shard.num_physical, LAW_TOKENS, layer.top_k)
    received = torch.zeros(LAW_TOKENS, layer.num_experts // local, dtype=torch.int64)
    received.scatter_add_(1, slots // local, torch.ones_like(slots))
    counts = torch.bincount(received.flatten(), minlength=layer.top_k + 1).tolist()
    return tuple(count / received.numel() for count in counts)
