"""The result of `moetune dep-bench`. Does not import torch."""

from __future__ import annotations

from typing import Final, Literal

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

SCHEMA_VERSION: Final = 1
ArmName = Literal["default", "engine", "pure_ep", "dispatcher"]
"""No tuner; the engine's own tuner; moetune's profile without attention DP; moetune's profile for this dispatcher."""


class PartTime(FrozenModel):
    """The time of one part of the block with the arm `dispatcher`, in µs.

    A rank that is early waits in the next collective, so the fastest rank's time is nearest to the collective's own.

    Attributes:
        part: `router`, `top-k`, `quantize`, `counts`, `pack`, `dispatch`, `unpack`, `experts` or `combine`.
        fastest_us, slowest_us: the means of the fastest and of the slowest rank's times.
    """

    part: str
    fastest_us: float
    slowest_us: float


class ArmTime(FrozenModel):
    """One arm at one batch size.

    Attributes:
        arm: the tuner.
        tactics: the tactics that ran, each once; the row counts of ranks and batches can differ.
        time_us: the mean time of the block on the slowest rank, in µs.
        tokens_per_s: tokens per second and GPU.
        gain, gain_low, gain_high: this arm's time over that of the arm `dispatcher`, with 95 % bounds (paired
            bootstrap); 1 where both ran the same tactics.
        dummy_us: the mean time of the experts' kernel on the sampled routings that moetune tunes with, or None.
        experts_us: the mean time of the experts' kernel in the block, over all ranks.
        error: the largest relative error of the block's output against the reference of one process.
    """

    arm: ArmName
    tactics: tuple[Tactic, ...]
    time_us: float
    tokens_per_s: float
    gain: float
    gain_low: float
    gain_high: float
    dummy_us: float | None
    experts_us: float
    error: float


class Point(FrozenModel):
    """One batch size under one routing.

    Attributes:
        tokens: the tokens of each rank.
        routing: the distribution of the router's choices.
        rows_low, rows_high: the fewest and the most rows that entered a rank's kernel.
        arms: the arms, in the order of `ArmName`.
        parts: the parts of the block.
        noise: the A/A noise of the arm `dispatcher`, relative.
        plan_bytes: what `moetune plan --wire` expects a rank to receive in the dispatch; 0 without a wire.
        received_bytes: what a rank received, as a mean over ranks and batches.
        fidelity: the kernel's time in the block over its time on sampled routings, of the arm `dispatcher`, or None.
        fidelity_by_rank: the same of each rank.
        dummy_agrees: whether the fastest arm by `dummy_us` is the fastest by `experts_us` too, within the noise; or
            None.
        eager: why the block was timed without a CUDA graph, launch overhead included; empty if it was not, and on the
            CPU.
    """

    tokens: int
    routing: str
    rows_low: int
    rows_high: int
    arms: tuple[ArmTime, ...]
    parts: tuple[PartTime, ...]
    noise: float
    plan_bytes: int
    received_bytes: int
    fidelity: float | None
    fidelity_by_rank: tuple[float, ...]
    dummy_agrees: bool | None
    eager: str

    def arm(self, name: ArmName) -> ArmTime | None:
        """Returns one arm, or None if it is missing."""
        return next((arm for arm in self.arms if arm.arm == name), None)


class DepBench(FrozenModel):
    """The document of `moetune dep-bench --json`.

    Attributes:
        layer, regime, backend, environment: what was measured.
        ranks: the number of processes. If it is 1, one rank of `regime.ep_size` was measured without the wire.
        wire, wire_routing: the formats in which tokens travelled, as `moetune plan --wire` names them.
        sources: where the tactics of each arm are from.
        missing: why an arm is missing.
        points: what was measured, by routing and batch size.
        left_out: the batch sizes and routings for which the time did not suffice.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    layer: MoELayer
    regime: Regime
    backend: str
    environment: Environment
    ranks: int
    wire: str
    wire_routing: str
    sources: dict[ArmName, str]
    missing: dict[ArmName, str]
    points: tuple[Point, ...]
    left_out: tuple[tuple[int, str], ...] = ()
