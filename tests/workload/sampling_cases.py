"""Layers, regimes and hypothesis strategies that the workload tests share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.workload.routing import realize

DEEPSEEK_ROUTING = RoutingMethod(scoring="sigmoid", bias=True, num_groups=8, top_k_groups=4, scaling=2.5)
VIEWS: dict[str, dict[str, str]] = {
    "none": {"dispatch": "none"},
    "allgather": {"dispatch": "allgather"},
    "packed": {"dispatch": "alltoall", "layout": "packed"},
    "deduplicated": {"dispatch": "alltoall", "layout": "deduplicated"},
    "slot": {"dispatch": "alltoall", "layout": "slot"},
    "pool": {"dispatch": "alltoall", "layout": "pool"},
}


def moe(num_experts: int, top_k: int, routing: RoutingMethod | None = None) -> MoELayer:
    return MoELayer(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=7168,
        intermediate_size=2048,
        routing=routing or RoutingMethod(),
    )


def deepseek_r1() -> MoELayer:
    return moe(256, 8, DEEPSEEK_ROUTING)


def regime_of(view: str, ep_size: int, distribution: str = "random", **fields: Any) -> Regime:
    if view == "pool":
        fields.setdefault("ladder", [ep_size])
    return Regime(ep_size=ep_size, distribution=distribution, **VIEWS[view], **fields)


def digest_of_ids() -> str:
    """A digest of the ids of every view and distribution, with and without groups."""
    digest = hashlib.sha256()
    for layer in (moe(64, 4), moe(32, 4, DEEPSEEK_ROUTING)):
        for view in VIEWS:
            for distribution in ("balanced", "random"):
                ids = realize(layer, regime_of(view, 8, distribution), 96, rank=1, draw=2).topk_ids
                digest.update(repr(ids.tolist()).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class SamplingCase:
    layer: MoELayer
    regime: Regime
    rows: int
    rank: int

    @property
    def arguments(self) -> tuple[MoELayer, Regime, int, int]:
        return self.layer, self.regime, self.rows, self.rank


@st.composite
def sampling_cases(
    draw: st.DrawFn,
    views: tuple[str, ...] = tuple(VIEWS),
    distributions: tuple[str, ...] = ("balanced", "random"),
    redundant: bool = False,
) -> SamplingCase:
    """M 1 … 4096 (mostly small), E 4 … 512, k 1 … 16, ep 1 … 64 dividing the slots, routers with and without groups."""
    num_experts = draw(st.sampled_from([4, 5, 6, 8, 12, 16, 24, 60, 64, 128, 160, 256, 384, 512]) | st.integers(4, 512))
    redundant_experts = draw(st.integers(1, 2 * num_experts)) if redundant else 0
    slots = num_experts + redundant_experts
    ep_size = draw(st.sampled_from([ep for ep in range(1, min(64, slots) + 1) if slots % ep == 0]))
    group_counts = [n for n in (1, 2, 3, 4, 8) if num_experts % n == 0 and num_experts > n]
    num_groups = draw(st.sampled_from(group_counts))
    top_k_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, min(16, num_experts // num_groups * top_k_groups)))
    routing = RoutingMethod(
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        group_score=draw(st.sampled_from(["top2", "max"])),
    )
    view = draw(st.sampled_from(views))
    rows = draw(
        st.one_of(st.integers(1, 8), st.integers(1, 64), st.integers(1, 64), st.sampled_from([257, 1024, 4096]))
    )
    if view == "pool":
        rows = max(1, rows // ep_size) * ep_size
    regime = regime_of(
        view,
        ep_size,
        draw(st.sampled_from(distributions)),
        seed=draw(st.integers(0, 1)),
        redundant_experts=redundant_experts,
    )
    return SamplingCase(moe(num_experts, top_k, routing), regime, rows, draw(st.integers(0, ep_size - 1)))
