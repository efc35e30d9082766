"""Samples k distinct experts of E so that each expert has a given chance to be among them.

A set of k experts has a chance in proportion to the product of its experts' odds. This is conditional Poisson sampling,
the law of largest entropy with these chances (Chen, Dempster and Liu, "Weighted finite population sampling to maximize
entropy", Biometrika 81(3), 1994). With equal odds every set is equally likely, as for a router on independent random
logits. All its sums are elementary symmetric polynomials e_r of the odds: e_r is the sum, over the sets of r experts,
of the products of their odds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moetune.errors import UsageError

_MOST = 1.0 - 1e-8
"""The largest chance that is asked of one expert; it keeps the odds finite."""
_STEPS = 200
_EXACT = 1e-8


def fitted_odds(chances: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the odds at which a set of `size` experts has each expert with the given chance, float64 `[E]`.

    Args:
        chances: float64 `[E]`, each between 0 and 1; they add up to `size`.
        size: the number of experts of a set.

    Each step multiplies the odds by the ratio of the asked to the found p / (1 − p), or by its root.
    """
    wanted = chances.clamp(1e-12, _MOST)
    ratio = wanted / (1.0 - wanted)
    odds = ratio / ratio.max()
    if size >= len(chances):
        return torch.ones_like(chances)
    power, before = 1.0, float("inf")
    for _ in range(_STEPS):
        found = inclusion(odds, size).clamp(1e-300, _MOST)
        error = float((found - wanted).abs().max())
        if error < _EXACT:
            break
        if error > 0.7 * before:  # steps that are too long swing around the solution
            power = 0.5
        before = error
        odds = odds * (ratio * (1.0 - found) / found) ** power
        odds = (odds / odds.max()).clamp(min=1e-18)
    return odds


def inclusion(odds: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the chance of each expert to be in a set of `size` experts, float64 `[E]`."""
    before, after = symmetric_sums(odds.flip(0), size).flip(0), symmetric_sums(odds, size)
    others = (before[:-1, :size] * after[1:, :size].flip(1)).sum(1)
    return odds * others / after[0, size]


def symmetric_sums(odds: torch.Tensor, size: int) -> torch.Tensor:
    """Returns e_r of the odds from index i on, as entry [i, r]: float64 `[E + 1, size + 1]`.

    Raises:
        UsageError: a sum exceeds float64, which takes more experts and a larger top-k than any model has.
    """
    row = [1.0] + [0.0] * size
    rows = [row]
    for value in reversed(odds.tolist()):
        row = [1.0, *(keep + value * more for keep, more in zip(row[1:], row, strict=False))]
        rows.append(row)
    if not math.isfinite(row[-1]):
        raise UsageError(f"A skew of {len(odds)} experts and top-{size} is out of range: a sum exceeds float64.")
    return torch.tensor(rows[::-1], dtype=torch.float64)


def sample(generator: torch.Generator, odds: torch.Tensor, size: int, rows: int) -> torch.Tensor:
    """Returns sets of `size` experts in random order, int64 `[rows, size]`."""
    sums = symmetric_sums(odds, size)
    return _shuffled(generator, _continued(generator, sums, torch.empty(rows, 0, dtype=torch.int64), size))


def sample_with(generator: torch.Generator, odds: torch.Tensor, size: int, rows: int, below: int) -> torch.Tensor:
    """Returns sets of `size` experts in random order of which at least one is below `below`, int64 `[rows, size]`."""
    sums = symmetric_sums(odds, size)
    weights = (odds * sums[1:, size - 1])[:below].cumsum(0)  # of the sets in which an expert is the lowest
    chance = torch.rand(rows, dtype=torch.float64, generator=generator) * weights[-1]
    lowest = torch.searchsorted(weights, chance, right=True).clamp(max=below - 1)
    return _shuffled(generator, _continued(generator, sums, lowest.unsqueeze(1), size))


def _continued(generator: torch.Generator, sums: torch.Tensor, start: torch.Tensor, size: int) -> torch.Tensor:
    """Returns sets of `size` experts in ascending order that begin with `start`.

    If the last expert was i − 1, the next is below j with the chance 1 − e_r(from j) / e_r(from i), where r experts are
    still to be drawn.
    """
    falling = sums.T.contiguous()
    rows, given = start.shape
    chosen = torch.empty(rows, size, dtype=torch.int64)
    chosen[:, :given] = start
    following = start[:, -1] + 1 if given else torch.zeros(rows, dtype=torch.int64)
    for column in range(given, size):
        left = falling[size - column]
        chance = 1.0 - torch.rand(rows, dtype=torch.float64, generator=generator)  # above 0, at most 1
        rising = left.flip(0)
        # the next expert is the first j with e_r(from j + 1) < chance · e_r(from i)
        expert = len(rising) - 1 - torch.searchsorted(rising, chance * left[following])
        chosen[:, column] = expert
        following = expert + 1
    return chosen


def _shuffled(generator: torch.Generator, rows: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, torch.rand(rows.shape, dtype=torch.float64, generator=generator).argsort(1))


def local_slots(odds: Sequence[float], local: Sequence[float], size: int) -> list[float]:
    """Returns the chances of c local slots of a set, for c = 0 … `size`.

    Args:
        odds: the odds of each expert.
        local: the chance that a slot of the expert is local: its local copies over all its copies.
        size: the number of experts of a set.

    The chance is the coefficient of t^k·z^c of the product of all 1 + t·odds·(1 − local + local·z), over e_k.
    """
    ways = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    ways[0, 0] = 1.0
    kinds: dict[float, list[float]] = {}
    for each, part in zip(odds, local, strict=True):
        kinds.setdefault(part, []).append(each)
    for part, of_kind in kinds.items():
        sums = symmetric_sums(torch.tensor(of_kind, dtype=torch.float64), size)[0]
        ways = _multiplied(ways, sums, part)
    return (ways[size] / ways[size].sum()).tolist()


def _multiplied(ways: torch.Tensor, sums: torch.Tensor, part: float) -> torch.Tensor:
    """Returns `ways` times the polynomial of experts whose slots are local with the chance `part`."""
    size = len(sums) - 1
    product = torch.zeros_like(ways)
    spread = torch.zeros(size + 1, dtype=torch.float64)
    spread[0] = 1.0
    for count in range(size + 1):  # spread: the chances of local slots among `count` slots
        if count:
            spread = torch.cat((spread[:1] * (1.0 - part), spread[1:] * (1.0 - part) + spread[:-1] * part))
        for local in range(count + 1):
            if spread[local]:
                factor = sums[count] * spread[local]
                product[count:, local:] += factor * ways[: size + 1 - count, : size + 1 - local]
    return product
