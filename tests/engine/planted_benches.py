"""The benches of one rank that take planted times. Nothing runs."""

from contextlib import contextmanager


class PlantedBench:
    """`BenchLike` with a time in µs for each tactic, which `us` returns. `fails`: why a tactic fails."""

    def __init__(self, us, fails, asked):
        self.us, self.fails, self.asked = us, fails, asked
        self.failures, self.eager = {}, {}

    def samples(self, tactics, draws, limit_us=0.0):
        self.asked.append(("samples", len(tactics)))
        self.failures.update({tactic: self.fails[tactic] for tactic in tactics if tactic in self.fails})
        return [None if tactic in self.failures else (self.us(tactic),) * len(draws) for tactic in tactics]

    def check(self, tactic, draw):
        self.asked.append(("check", 1))
        return tactic not in self.failures


class PlantedBenches:
    """Opens planted benches. `refuses`: what preparing a problem raises."""

    def __init__(self, us, fails=None, refuses=None):
        self.us, self.fails, self.refuses = us, fails or {}, refuses
        self.asked, self.problems = [], []

    @contextmanager
    def open_benches(self, backend, device, isolate, child=None):
        yield self.bench_of

    def bench_of(self, problem):
        if self.refuses:
            raise self.refuses
        self.problems.append((problem.rows, problem.device))
        return PlantedBench(self.us, self.fails, self.asked)
