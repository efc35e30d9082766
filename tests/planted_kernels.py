"""A backend of real GPU kernels, some of which do what kernels must not do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from moetune.backends.base import Backend, Candidates, Problem
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=4096, intermediate_size=4, precision="bf16")
FAR = 1 << 44
SLOW, FAST = 4000, 4
"""How often the tactics `default` and `fast` write their result."""


@triton.jit
def fill(out_ptr, size, value, times, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(times):
        tl.store(out_ptr + offsets, value, mask=offsets < size)
        tl.debug_barrier()


@triton.jit
def write_far_away(out_ptr, distance):
    tl.store(out_ptr + distance, 1.0)


@triton.jit
def spin(flag_ptr):
    while tl.load(flag_ptr, volatile=True) == 0:
        pass


@triton.jit
def never_compiles(out_ptr):
    tl.static_assert(False, "planted")
    tl.store(out_ptr, 1.0)


def tactic(name: str, from_run: int = 1) -> Tactic:
    """Does what its name says from its n-th run in a process on: 1 is the first run, 2 the capture of a graph."""
    return Tactic(name=name, from_run=from_run)


@dataclass
class KernelBackend(Backend):
    """Its tactics are those of `tactics`, `default` among them."""

    tactics: tuple[Tactic, ...]
    name: str = "kernels"

    def unavailable(self) -> None:
        return None

    def unsupported(self, layer: MoELayer, regime: Regime) -> None:
        return None

    def environment(self) -> dict[str, str]:
        return {}

    def candidates(self, layer: MoELayer, regime: Regime, rows: int, device: str) -> Candidates:
        return Candidates(self.tactics)

    def default(self, layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        return tactic("default")

    def tolerance(self, layer: MoELayer) -> float:
        return 1e-2

    def prepare(self, problem: Problem) -> KernelRunner:
        return KernelRunner(problem)


@dataclass
class KernelRunner:
    problem: Problem
    runs: Counter[Tactic] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        shape = (self.problem.rows, self.problem.layer.hidden_size)
        self.out = torch.zeros(shape, dtype=torch.bfloat16, device=self.problem.device)
        self.flag = torch.zeros(1, dtype=torch.int32, device=self.problem.device)
        self._fill(1)  # Triton builds its launcher here, so that no time-out of a first run has to allow for it

    def run(self, tactic: Tactic, draw: int = 0) -> torch.Tensor:
        self.runs[tactic] += 1
        if self.runs[tactic] >= tactic["from_run"]:
            match tactic["name"]:
                case "illegal access":
                    write_far_away[(1,)](self.out, FAR)
                case "spins":
                    spin[(1,)](self.flag)
                case "allocates 200 GB":
                    torch.empty(200 << 30, dtype=torch.int8, device=self.out.device).zero_()
                case "does not compile":
                    never_compiles[(1,)](self.out)
                case "zeros":
                    return self.out.zero_()
        return self._fill(SLOW if tactic["name"] == "default" else FAST)

    def reference(self, draw: int = 0) -> torch.Tensor:
        return torch.ones_like(self.out, dtype=torch.float32)

    def _fill(self, times: int) -> torch.Tensor:
        fill[(triton.cdiv(self.out.numel(), 1024),)](self.out, self.out.numel(), 1.0, times, BLOCK=1024)
        return self.out
