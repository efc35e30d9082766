"""`Router`, the layer's router with random weights, whose experts have the shares of a distribution."""

from __future__ import annotations

from functools import lru_cache

import torch

from moetune.errors import UsageError
from moetune.quoting import quoted
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.preferences import Biased
from moetune.workload.router import route
from moetune.workload.scope import of_scope


class Router:
    """Turns hidden states into logits, ids and weights.

    Its weight's columns are orthonormal, so that normal hidden states have independent standard normal logits, as the
    sampled routings have; with more experts than hidden sizes they have norm 1. Under a skew each expert's logit has a
    bias, which is fitted to the expert's share.

    Args:
        layer: the layer.
        distribution: `random` or a skew.
        seed: of the weights; equal on all ranks.
        device: a torch device.

    Raises:
        UsageError: no router has this distribution.
    """

    def __init__(self, layer: MoELayer, distribution: str, seed: int, device: str) -> None:
        skew = Regime(distribution=distribution, seed=seed)
        if skew.distribution != "random" and (skew.skew is None or skew.replay is not None):
            raise UsageError(
                f"A router's logits cannot have the distribution {quoted(distribution)}.",
                "Give random, ddist:X, zipf:S or powerlaw:A.",
            )
        self._layer = layer
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(layer.hidden_size, layer.num_experts, generator=generator)
        if layer.num_experts <= layer.hidden_size:
            weight = torch.linalg.qr(weight).Q
        self._weight = (weight / weight.norm(dim=0)).to(device)
        self._bias = None
        if skew.skew is not None:
            fitted = Biased(layer.routing, of_scope(layer, skew).chances, layer.top_k)
            self._bias = fitted.bias.float().to(device)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits of hidden states `[T, H]`: float32 `[T, E]`."""
        logits: torch.Tensor = x.float() @ self._weight
        return logits if self._bias is None else logits + self._bias

    def top_k(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids int32 and weights float32, both `[T, k]`."""
        ids, weights = route(self._layer.routing, logits, self._layer.top_k)
        return ids.int(), weights


@lru_cache(maxsize=8)
def router_of(layer: MoELayer, distribution: str, seed: int, device: str) -> Router:
    """Returns the router with these arguments, which is made once. Fitting the biases takes seconds."""
    return Router(layer, distribution, seed, device)
