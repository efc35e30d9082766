"""A point of a dep-bench with planted times."""

from moetune.dep_bench.result import ArmTime, DepBench, PartTime, Point
from moetune.inputs.presets import layer as preset
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

SOURCES = {"default": "no tuner", "engine": "FlashInfer's autotune", "pure_ep": "moetune", "dispatcher": "moetune"}


def arm(name, time_us, gain=1.0, low=1.0, high=1.0):
    return ArmTime(
        arm=name, tactics=(Tactic(gemm1=1, gemm2=2),), time_us=time_us, tokens_per_s=128e6 / time_us, gain=gain,
        gain_low=low, gain_high=high, dummy_us=300.0, experts_us=310.0, error=0.003,
    )  # fmt: skip


def point(**changed):
    arms = (
        arm("default", 640.0, 1.6, 1.55, 1.65), arm("engine", 420.0, 1.05, 1.04, 1.06),
        arm("pure_ep", 392.0, 0.98, 0.97, 0.99), arm("dispatcher", 400.0),
    )  # fmt: skip
    parts = [PartTime(part=name, fastest_us=us, slowest_us=2 * us) for name, us in (("dispatch", 50), ("experts", 155))]
    fields = {
        "tokens": 128, "routing": "random", "rows_low": 250, "rows_high": 256, "arms": arms, "parts": tuple(parts),
        "noise": 0.0012, "plan_bytes": 2_000_000, "received_bytes": 2_500_000, "fidelity": 1.012,
        "fidelity_by_rank": (1.01, 1.014), "dummy_agrees": True, "eager": "",
    }  # fmt: skip
    return Point(**{**fields, **changed})


def document(*points, **changed):
    fields = {
        "layer": preset("qwen3-30b-a3b"), "regime": Regime(ep_size=2, dispatch="allgather"), "backend": "planted",
        "environment": Environment(device="planted", strict={}), "ranks": 2, "wire": "bf16", "wire_routing": "logits",
        "sources": SOURCES, "missing": {}, "points": points,
    }  # fmt: skip
    return DepBench(**{**fields, **changed})
