"""Profiles of FlashInfer's backends, each bucket with a tactic of its own."""

from __future__ import annotations

from typing import Any

from choices import make_choice

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile

LAYER = MoELayer(name="qwen3-30b-a3b", num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
DEVICE = {"flashinfer-cutlass": ("NVIDIA H200", "9.0")}


def environment(backend: str, flashinfer: str = "0.7.2.post1") -> Environment:
    device, capability = DEVICE.get(backend, ("NVIDIA B200", "10.0"))
    strict = {"compute_capability": capability, "cuda": "13.0", "torch": "2.13.0", "flashinfer": flashinfer}
    return Environment(device=device, strict=strict)


def tactic(backend: str, index: int) -> dict[str, int]:
    if backend == "flashinfer-cutlass":
        return {"gemm1": index, "gemm2": 45 + index}
    return {"tile_n": 8 << index % 4, "config": index}


def profile(
    backend: str, regime: Regime, layer: MoELayer = LAYER, flashinfer: str = "0.7.2.post1", **changed: Any
) -> Profile:
    untuned = dict.fromkeys(tactic(backend, 0), -1)
    choices = tuple(
        make_choice(rows, tactic=tactic(backend, index), default_tactic=untuned, rejected=())
        for index, rows in enumerate(regime.buckets)
    )
    given = {
        "layer": layer,
        "regime": regime,
        "backend": backend,
        "environment": environment(backend, flashinfer),
        "choices": choices,
    }
    return Profile(**{**given, **changed})
