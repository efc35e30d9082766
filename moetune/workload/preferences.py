"""Makes a router choose experts with given chances."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch

from moetune.spec.layer import RoutingMethod
from moetune.workload.distribution import random_logits, seeded_generator
from moetune.workload.router import Choice, route
from moetune.workload.skew import effective_experts
from moetune.workload.weighted_subsets import fitted_odds, inclusion, local_slots, sample, sample_with

LAW_TOKENS = 16384
_FIT_TOKENS = 8192
_FIT_STEPS = 12
_MOST_FACTOR = 64.0
_NEAR = 0.01
_CHUNK_LOGITS = 1 << 20


class Preferences(ABC):
    """A router of k distinct experts of n, in which each expert has its chance to be chosen.

    Attributes:
        chances: the chance that a token selects each expert; they add up to k. They are what is achieved.
        simulated: whether they are frequencies of simulated routing.
    """

    chances: tuple[float, ...]
    simulated: bool

    @abstractmethod
    def sample(self, generator: torch.Generator, rows: int) -> Choice:
        """Returns the experts of `rows` tokens."""

    @abstractmethod
    def local_slots(self, local: Sequence[float]) -> tuple[float, ...]:
        """Returns the chances of c = 0 … k local slots; `local` is the chance that each expert's slot is local."""


class Weighted(Preferences):
    """Preferences without a group limit: the sets of `weighted_subsets`. All numbers are exact."""

    simulated = False

    def __init__(self, chances: Sequence[float], top_k: int) -> None:
        self.top_k = top_k
        self.odds = fitted_odds(torch.tensor(chances, dtype=torch.float64), top_k)
        self.chances = tuple(inclusion(self.odds, top_k).tolist())

    def sample(self, generator: torch.Generator, rows: int) -> Choice:
        return sample(generator, self.odds, self.top_k, rows), None

    def sample_any_of(self, generator: torch.Generator, rows: int, experts: Sequence[int]) -> torch.Tensor:
        """Returns the experts of `rows` tokens that select at least one of `experts`, int64 `[rows, k]`."""
        others = sorted(set(range(len(self.odds))).difference(experts))
        order = torch.tensor([*experts, *others])
        return order[sample_with(generator, self.odds[order], self.top_k, rows, len(experts))]

    def local_slots(self, local: Sequence[float]) -> tuple[float, ...]:
        return tuple(local_slots(self.odds.tolist(), local, self.top_k))


class Biased(Preferences):
    """Preferences of a router with groups: its own rule on random logits, to which each expert's bias is added.

    The biases are fitted on `_FIT_TOKENS` simulated tokens. The chances are frequencies in `LAW_TOKENS` other ones. A
    group limit can make the asked chances impossible, for instance if the busiest experts lie in too many groups. Then
    all biases are multiplied by one factor, so that at least the effective number of experts is the asked one.
    """

    simulated = True

    def __init__(self, method: RoutingMethod, chances: Sequence[float], top_k: int) -> None:
        self.method, self.top_k = method, top_k
        wanted = torch.tensor(chances, dtype=torch.float64)
        logits = random_logits(seeded_generator("fit of biases", len(chances), top_k), _FIT_TOKENS, len(chances))
        margin = 0.5 / _FIT_TOKENS
        target = torch.special.ndtri(wanted.clamp(margin, 1.0 - margin))
        self.bias = target.clone()
        for _ in range(_FIT_STEPS):
            found = self._frequencies(self._route(logits)[0])
            self.bias += target - torch.special.ndtri(found.clamp(margin, 1.0 - margin))
        self.bias *= self._factor(logits, effective_experts(chances))
        self._tokens = self.sample(seeded_generator("law of biases", len(chances), top_k), LAW_TOKENS)[0]
        self.chances = tuple(self._frequencies(self._tokens).tolist())

    def sample(self, generator: torch.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        step = max(1, _CHUNK_LOGITS // len(self.bias))
        parts = [
            self._route(random_logits(generator, min(step, rows - start), len(self.bias)))
            for start in range(0, rows, step)
        ]
        experts, weights = (torch.cat(column) for column in zip(*parts, strict=True))
        return experts, weights

    def local_slots(self, local: Sequence[float]) -> tuple[float, ...]:
        part = torch.tensor(local, dtype=torch.float64)[self._tokens]
        chances = torch.zeros(len(part), self.top_k + 1, dtype=torch.float64)
        chances[:, 0] = 1.0
        for column in part.T:
            moved = torch.nn.functional.pad(chances[:, :-1], (1, 0))
            chances += (moved - chances) * column.unsqueeze(1)
        return tuple(chances.mean(0).tolist())

    def _factor(self, logits: torch.Tensor, asked: float) -> float:
        """Returns the factor of the biases at which the effective number of experts is `asked`, by bisection."""
        bias, low, high = self.bias, 0.0, _MOST_FACTOR

        def found(factor: float) -> float:
            experts, _ = route(self.method, logits + factor * bias, self.top_k)
            return effective_experts(self._frequencies(experts).tolist())

        if abs(found(1.0) / asked - 1.0) < _NEAR:
            return 1.0
        for _ in range(_FIT_STEPS):
            middle = (low + high) / 2.0
            low, high = (middle, high) if found(middle) > asked else (low, middle)
        return high

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return route(self.method, logits + self.bias, self.top_k)

    def _frequencies(self, experts: torch.Tensor) -> torch.Tensor:
        return torch.bincount(experts.flatten(), minlength=len(self.bias)).double() / len(experts)


@lru_cache(maxsize=32)
def preferences(method: RoutingMethod, chances: tuple[float, ...], top_k: int) -> Preferences:
    """Returns preferences with these chances, which add up to `top_k`."""
    return Biased(method, chances, top_k) if method.grouped else Weighted(chances, top_k)
