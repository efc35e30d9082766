"""Computes the shares of experts under a skewed distribution. Does not import torch.

A share is the part of all slots that an expert gets. The effective number of experts is 1 / Σ share², the inverse
Simpson index that FlashInfer uses (`_expected_effective_experts` in flashinfer/fused_moe/da_tuner.py, 0.7.2.post1): it
is E if loads are equal, and 1 if one expert has all slots.

The ids of a row are distinct, so of n experts none can have a share above 1 / min(k, n). A skew that asks for more is
capped there, and the rest is given to the other experts until the effective number is again the asked one. If even
that is impossible, the shares are the most uneven ones.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from moetune.spec.distribution import Skew

UNIFORM_FLOOR = 0.1
"""The part of all slots that `ddist` spreads evenly (`_UNIFORM_FLOOR` of FlashInfer's `RoutingRealizationFactory`)."""
POWERLAW_TOKENS = 8192
"""aiconfigurator's power law depends on the tokens of a step. moetune takes this number for all buckets, so that the
popularity of experts is the same in all of them."""
TOLERANCE = 0.05
"""The relative difference between the asked and the achieved effective number beyond which a skew is missed."""
_EXACT = 1e-9


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of n experts of which each row selects `per_row`.

    Attributes:
        values: the share of each expert; they add up to 1.
        asked_effective: the effective number of experts that the distribution asks for.
        asked_max_over_mean: the asked load of the busiest expert over the mean load; None for `ddist`, which asks for
            the effective number alone.
        least_effective: the smallest effective number that is possible.
    """

    values: tuple[float, ...]
    asked_effective: float
    asked_max_over_mean: float | None
    least_effective: float

    @property
    def missed(self) -> bool:
        """Whether the achieved effective number differs from the asked one by more than `TOLERANCE`."""
        return abs(effective_experts(self.values) / self.asked_effective - 1.0) > TOLERANCE


def effective_experts(loads: Sequence[float]) -> float:
    """Returns the effective number of experts, (Σ load)² / Σ load²; 0 if there is no load."""
    squares = math.fsum(load * load for load in loads)
    return math.fsum(loads) ** 2 / squares if squares else 0.0


def max_over_mean(loads: Sequence[float]) -> float:
    """Returns the load of the busiest expert over the mean load; 0 if there is no load."""
    total = math.fsum(loads)
    return max(loads) * len(loads) / total if total else 0.0


@lru_cache(maxsize=256)
def shares(skew: Skew, num_experts: int, top_k: int, seed: int) -> Shares:
    """Returns the shares of `num_experts` experts, of which each row selects min(k, n).

    - `ddist:x` asks for n / x effective experts (at least 1). The sorted shares have the form of a symmetric Dirichlet
      distribution with a uniform part of 10 %. Its α comes from FlashInfer's bisection. FlashInfer takes one sample;
      moetune takes the quantiles of the gamma distribution, so shares do not depend on a random generator.
    - `zipf:s` asks for shares in proportion to rank^−s.
    - `powerlaw:a` has shares in proportion to the quantiles of a density x^−a between 1 and 0.8·8192, as
      `sample_power_law` in aiconfigurator's collector/helper.py samples them.

    The form is then raised to the power at which the effective number is the asked one: 1 for `zipf` and `powerlaw` if
    no share is capped. `seed` decides which expert has which share.
    """
    per_row = min(top_k, num_experts)
    floor = UNIFORM_FLOOR if skew.kind == "ddist" else 0.0
    form = _FORMS[skew.kind](skew.parameter, num_experts)
    if skew.kind == "ddist":
        target, peak = max(num_experts / skew.parameter, 1.0), None
    else:
        plain = _capped(form, 1.0, 1.0)
        target, peak = effective_experts(plain), max_over_mean(plain)
    cap = (1.0 / per_row - floor / num_experts) / (1.0 - floor)
    values = [(1.0 - floor) * part + floor / num_experts for part in _fitted(form, floor, cap, target)]
    least = [(1.0 - floor) * part + floor / num_experts for part in _steepest(num_experts, cap)]
    return Shares(
        tuple(values[place] for place in _places(num_experts, seed)),
        target,
        peak,
        effective_experts(least) if per_row < num_experts else float(num_experts),
    )


@lru_cache(maxsize=16)
def counted_shares(slots: tuple[int, ...], top_k: int) -> Shares:
    """Returns the shares of experts with these numbers of slots, which are what is asked and what is achieved."""
    total = sum(slots)
    values = tuple(of_expert / total for of_expert in slots)
    return Shares(values, effective_experts(values), max_over_mean(values), float(top_k))


def expected_effective_experts(num_experts: int, alpha: float) -> float:
    """Returns 1 / E[Σ share²] of a symmetric Dirichlet distribution with the uniform part, by FlashInfer's formula."""
    concentration = (alpha + 1.0) / (num_experts * alpha + 1.0)
    uniform = (2.0 * UNIFORM_FLOOR - UNIFORM_FLOOR**2) / num_experts
    return 1.0 / ((1.0 - UNIFORM_FLOOR) ** 2 * concentration + uniform)


def symmetric_alpha(num_experts: int, effective: float) -> float:
    """Returns the α at which `expected_effective_experts` is `effective`: FlashInfer's bisection of 80 steps."""
    low, high = 1e-6, 1e6
    for _ in range(80):
        middle = (low + high) / 2.0
        if expected_effective_experts(num_experts, middle) < effective:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def largest_parameter(skew: Skew, num_experts: int, least_effective: float) -> float | None:
    """Returns the largest parameter of this kind that is not missed; None for `powerlaw`, where it is not unique."""
    reachable = least_effective / (1.0 + TOLERANCE)
    if skew.kind == "ddist":
        return num_experts / reachable
    if skew.kind == "powerlaw":
        return None
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2.0
        asked = effective_experts(_capped(_zipf(middle, num_experts), 1.0, 1.0))
        low, high = (middle, high) if asked > reachable else (low, middle)
    return low


def capped(loads: Sequence[float], cap: float) -> list[float]:
    """Returns shares in proportion to `loads`, of which none is above `cap`, as `_capped` does for sorted ones."""
    order = sorted(range(len(loads)), key=lambda i: -loads[i])
    values = _capped([math.log(max(loads[i], 1e-300)) for i in order], 1.0, cap)
    found = dict(zip(order, values, strict=True))
    return [found[i] for i in range(len(loads))]


def _places(num_experts: int, seed: int) -> list[int]:
    """Returns for each expert its place in the order from the busiest to the idlest, a permutation by `seed`.

    A sort by random numbers, because Python keeps `random.random` reproducible, and `random.shuffle` not.
    """
    digest = hashlib.sha256(repr(("popularity", num_experts, seed)).encode()).digest()
    generator = random.Random(int.from_bytes(digest[:8], "little"))
    keys = [generator.random() for _ in range(num_experts)]
    order = sorted(range(num_experts), key=keys.__getitem__)
    places = [0] * num_experts
    for place, expert in enumerate(order):
        places[expert] = place
    return places


def _fitted(form: Sequence[float], floor: float, cap: float, target: float) -> list[float]:
    """Returns the form as shares of at most `cap`, raised to the power at which the effective number is `target`.

    Args:
        form: logarithms of the shares, descending, up to a constant.
        floor: the uniform part that is added to the result.
        cap: the largest share before it is added.
        target: the effective number with the uniform part.
    """
    size = len(form)
    # (1 − f)²·Σ q² + (2f − f²)/n is the sum of the squared shares with the uniform part f.
    wanted = (1.0 / target - (2.0 * floor - floor**2) / size) / (1.0 - floor) ** 2
    if wanted <= (1.0 + _EXACT) / size or form[0] == form[-1] or cap * size <= 1.0 + _EXACT:
        return [1.0 / size] * size

    def squares(power: float) -> float:
        return math.fsum(share * share for share in _capped(form, power, cap))

    if abs(squares(1.0) / wanted - 1.0) < _EXACT:
        return _capped(form, 1.0, cap)
    low, high = 0.0, 1.0
    while squares(high) < wanted:
        low, high = high, 2.0 * high
        if high > 2.0**40:
            return _steepest(size, cap)
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if squares(middle) < wanted else (low, middle)
    return _capped(form, high, cap)


def _capped(form: Sequence[float], power: float, cap: float) -> list[float]:
    """Returns shares in proportion to exp(power · form), of which none is above `cap`.

    What the first experts have above the cap goes to the others in proportion to their shares.
    """
    size = len(form)
    tails = [1.0] * size  # tails[m]: the sum of the entries from m on, relative to entry m
    for m in range(size - 2, -1, -1):
        tails[m] = 1.0 + math.exp(power * (form[m + 1] - form[m])) * tails[m + 1]
    full = next((m for m in range(size) if 1.0 - m * cap <= cap * tails[m]), size - 1)
    left = max(1.0 - full * cap, 0.0) / tails[full]
    return [cap] * full + [left * math.exp(power * (entry - form[full])) for entry in form[full:]]


def _steepest(size: int, cap: float) -> list[float]:
    """Returns the most uneven shares of at most `cap`."""
    full = min(int(1.0 / cap + _EXACT), size)
    rest = [max(1.0 - full * cap, 0.0), *([0.0] * size)]
    return ([cap] * full + rest)[:size]


def _ddist(factor: float, num_experts: int) -> list[float]:
    alpha = symmetric_alpha(num_experts, max(num_experts / factor, 1.0))
    return [_log_gamma_quantile(alpha, 1.0 - (i + 0.5) / num_experts) for i in range(num_experts)]


def _zipf(exponent: float, num_experts: int) -> list[float]:
    return [-exponent * math.log(rank) for rank in range(1, num_experts + 1)]


def _powerlaw(exponent: float, num_experts: int) -> list[float]:
    last, rest = math.log(0.8 * POWERLAW_TOKENS), 1.0 - exponent
    chances = [1.0 - (i + 0.5) / num_experts for i in range(num_experts)]
    if abs(rest) < _EXACT:
        return [chance * last for chance in chances]
    return [math.log1p(math.expm1(rest * last) * chance) / rest for chance in chances]


_FORMS: dict[str, Callable[[float, int], list[float]]] = {"ddist": _ddist, "zipf": _zipf, "powerlaw": _powerlaw}


def _log_gamma_quantile(alpha: float, chance: float) -> float:
    """Returns the logarithm of the quantile of the gamma distribution of shape `alpha`.

    From α = 20 on it is the approximation of Wilson and Hilferty (1931). Below, Newton's method solves log P = log
    chance for the logarithm t of the quantile, with the series P = e^(αt − x) / Γ(α + 1) · Σ xⁿ / ((α + 1)…(α + n)).
    log P is concave in t, and the start is not above the solution, so the method converges from below.
    """
    if alpha >= 20.0:
        normal = NormalDist().inv_cdf(chance)
        return math.log(alpha) + 3.0 * math.log(max(1.0 - 1.0 / (9.0 * alpha) + normal / (3.0 * alpha**0.5), 1e-3))
    constant = math.lgamma(alpha + 1.0)
    t = (math.log(chance) + constant) / alpha
    for _ in range(100):
        x = math.exp(t)
        term = series = 1.0
        n = 0
        while term > 1e-16 * series:
            n += 1
            term *= x / (alpha + n)
            series += term
        step = (math.log(chance) - (alpha * t - x - constant + math.log(series))) * series / alpha
        t += step
        if abs(step) < 1e-12 * max(1.0, abs(t)):
            break
    return t
