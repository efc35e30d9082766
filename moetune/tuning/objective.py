"""What a choice minimizes if a regime has several distributions: the mean of its slowdowns or the worst one.

The slowdown of a tactic under a distribution is its time over that of the fastest tactic under that distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Self

from moetune.spec.enums import Objective as Kind
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

BEST = 2
"""How many of the best tactics by the objective are finalists in any case."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Turns values of several distributions into one. With one distribution it is that one's value.

    Attributes:
        kind: `mean` is the weighted mean, `worst` the largest value.
        weights: the weight of each distribution; they add up to 1. The name of a single one is empty.
    """

    kind: Kind = "mean"
    weights: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})

    @classmethod
    def of(cls, regime: Regime) -> Self:
        """Returns the objective of a regime."""
        if not regime.also:
            return cls()
        return cls(regime.objective or "mean", {each.distribution: each.weight for each in regime.distributions})

    @property
    def is_several(self) -> bool:
        """Whether there are several distributions."""
        return len(self.weights) > 1

    def value(self, by_distribution: Mapping[str, float]) -> float:
        """Returns the value to minimize, given that of each distribution."""
        if self.kind == "worst":
            return max(by_distribution.values())
        return sum(self.weights[name] * value for name, value in by_distribution.items())

    def worst_rows(self, values: Iterable[tuple[str, float]]) -> float:
        """Returns the value to minimize, given (distribution, value) at each row count.

        Under each distribution the largest value of all row counts counts.
        """
        largest: dict[str, float] = {}
        for name, value in values:
            largest[name] = max(value, largest.get(name, value))
        return self.value(largest)

    def shares(self, distributions: Sequence[str]) -> list[float] | None:
        """Returns the weight of each of some comparisons, given their distributions; they add up to 1.

        Those of one distribution share its weight. None stands for equal weights, those of a single distribution.
        """
        if not self.is_several:
            return None
        return [self.weights[name] / distributions.count(name) for name in distributions]


SINGLE = Objective()
"""The objective under one distribution."""


class Scores:
    """Turns the samples of a search into one time in µs for each tactic, which the search minimizes.

    Under one distribution this is the mean time. Under several it is the objective's value of the slowdowns, times the
    weighted mean of the fastest times. What is fastest is only known at the end of a search, so the fastest tactics of
    the first batch stand for it, and `finalists` ranks all tactics anew.

    Args:
        objective: the objective.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._means: dict[Tactic, dict[str, float]] = {}
        self._fastest: dict[str, float] = {}

    def of(self, samples: Mapping[Tactic, Sequence[float]], distributions: Sequence[str]) -> dict[Tactic, float]:
        """Returns the time of each tactic of a batch.

        Args:
            samples: their samples in µs; none is empty.
            distributions: the distribution of each sample.
        """
        if not self._objective.is_several:
            return {tactic: sum(series) / len(series) for tactic, series in samples.items()}
        means = {tactic: _means(series, distributions) for tactic, series in samples.items()}
        self._means |= means
        if means and not self._fastest:
            self._fastest = _fastest(means.values())
        scale = sum(self._objective.weights[name] * time_us for name, time_us in self._fastest.items())
        return {tactic: scale * self._value(of_tactic, self._fastest) for tactic, of_tactic in means.items()}

    def main_us(self, times: Mapping[Tactic, float]) -> Mapping[Tactic, float]:
        """Returns the mean times in µs under the main distribution of the tactics with these times."""
        main = next(iter(self._objective.weights))
        return {tactic: self._means[tactic][main] if tactic in self._means else time for tactic, time in times.items()}

    def finalists(self, found: Sequence[Tactic], measured: Collection[Tactic]) -> tuple[Tactic, ...]:
        """Returns the finalists: those that the search found, and under several distributions some more.

        These are the best by the objective, and the fastest under each distribution: slowdowns refer to it.

        Args:
            found: what the search returned.
            measured: the tactics that ran and computed right results.
        """
        means = {tactic: of_tactic for tactic, of_tactic in self._means.items() if tactic in measured}
        if not means:
            return tuple(found)
        fastest = _fastest(means.values())
        best = sorted(means, key=lambda tactic: self._value(means[tactic], fastest))[:BEST]
        leaders = (min(means, key=lambda tactic: means[tactic][name]) for name in fastest)
        return tuple(dict.fromkeys((*found, *best, *leaders)))

    def _value(self, means: Mapping[str, float], fastest: Mapping[str, float]) -> float:
        return self._objective.value({name: time_us / fastest[name] for name, time_us in means.items()})


def _means(series: Sequence[float], distributions: Sequence[str]) -> dict[str, float]:
    """Returns the mean time under each distribution."""
    return {
        name: fmean(time_us for time_us, other in zip(series, distributions, strict=True) if other == name)
        for name in dict.fromkeys(distributions)
    }


def _fastest(means: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the least of the mean times under each distribution."""
    fastest: dict[str, float] = {}
    for of_tactic in means:
        for name, time_us in of_tactic.items():
            fastest[name] = min(time_us, fastest.get(name, time_us))
    return fastest
