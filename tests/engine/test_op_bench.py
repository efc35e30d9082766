import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moetune
from moetune.engine import op_bench as benches
from moetune.engine.exchange import Exchange
from moetune.engine.op_bench import CHECKED_ROWS, EngineBench, choose, slowest_samples
from moetune.engine.stored import regime_of_buckets
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.tuning.objective import Objective
from moetune.workload.draws import Draw

DEFAULT, OTHER = Tactic(config=-1), Tactic(config=2)


class Clock:
    eager: dict[int, str] = {}

    def warm_up(self, call, draw):
        call(draw)

    def paired_samples(self, calls, draws):
        return [[call(draw) for draw in draws] for call in calls]


def test_the_slowest_rank_counts_by_sample_and_a_failure_anywhere_is_one_everywhere():
    assert slowest_samples([[(1.0, 5.0), (5.0,)], [(3.0, 4.0), None]]) == [(3.0, 5.0), None]


def test_a_tactic_that_raises_fails_alone():
    def raises(draw):
        raise RuntimeError("planted")

    bench = EngineBench({DEFAULT: lambda draw: 1.0 + draw, OTHER: raises}, Clock(), DEFAULT, 1e-2)
    assert bench.samples((DEFAULT, OTHER), [0, 1]) == [(1.0, 2.0), None]
    assert bench.failures == {OTHER: "RuntimeError: planted"}
    assert not bench.check(OTHER, 0)


class Kernel:
    """An op that writes into its caller's buffer, as trtllm-gen's do: `default` there, or what a tactic makes of it."""

    def __init__(self, rows=64, default=None):
        self.default = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)) if default is None else default
        self.output = torch.full_like(self.default, 7.0)

    def call(self, makes):
        def run(draw):
            made = makes(self.default)
            if made is not None:
                self.output.copy_(made)
            return [self.output]

        return run

    def agrees(self, makes, reason=""):
        bench = EngineBench({DEFAULT: self.call(lambda right: right), OTHER: self.call(makes)}, Clock(), DEFAULT, 2e-2)
        right = bench.check(OTHER, 0)
        assert bench.failures.keys() == (set() if right else {OTHER})
        assert reason in bench.failures.get(OTHER, "")
        return right


@pytest.mark.parametrize(
    ("makes", "agrees"),
    [
        (lambda right: right, True),
        (lambda right: right * 1.01, True),
        (lambda right: right * 1.05, False),
        (lambda right: right.flip(0), False),
        (torch.zeros_like, False),
        (lambda right: right.where(torch.arange(8) > 0, float("nan")), False),
        (lambda right: right.where(torch.arange(64)[:, None] > 0, float("inf")), False),
        (lambda right: None, False),
    ],
    ids=["same", "near", "far", "permuted", "zero", "nan", "a row of inf", "writes nothing"],
)
def test_a_tactic_must_agree_with_the_default(makes, agrees):
    assert Kernel().agrees(makes, "" if agrees else "against the default's, allowed 2e-02") is agrees


def test_rows_past_the_checked_ones_are_looked_at_too():
    rows = 4 * CHECKED_ROWS
    last = torch.arange(rows)[:, None] < rows // 2
    assert not Kernel(rows).agrees(lambda right: right.where(last, 0.0))


@pytest.mark.parametrize("default", [torch.full((4, 8), torch.nan), torch.full((4, 8), 1e-38), torch.zeros(0, 8)])
def test_a_default_that_says_nothing_refuses_nobody(default):
    assert Kernel(default=default).agrees(lambda right: torch.ones_like(right))


def test_what_overflows_in_the_default_is_left_out_of_the_comparison():
    default = torch.ones(4, 8)
    default[0] = torch.inf
    kernel = Kernel(default=default)
    assert kernel.agrees(lambda right: right.where(right.isfinite(), -1.0))
    assert not kernel.agrees(lambda right: 2 * right)


def test_outputs_in_the_tactics_own_order_are_not_compared():
    calls = {DEFAULT: lambda draw: [torch.ones(4, 8)] * 3, OTHER: lambda draw: [torch.zeros(8, 8)] * 3}
    assert EngineBench(calls, Clock(), DEFAULT, 1e-2).check(OTHER, 0)


def test_a_tactic_that_is_wrong_on_another_rank_is_wrong_here(monkeypatch):
    monkeypatch.setattr(benches, "gather", lambda value, ranks: [value, "wrong result there"])
    calls = {tactic: Kernel().call(lambda right: right) for tactic in (DEFAULT, OTHER)}
    bench = EngineBench(calls, Clock(), DEFAULT, 2e-2, Exchange(None, 0, (4, 5)), "8 rows")
    assert not bench.check(OTHER, 0)
    assert bench.failures == {OTHER: "Rank 1 of 2 (rank 5 of the world): wrong result there"}


def test_a_wrong_one_leaves_its_place_in_the_final_to_the_next(monkeypatch):
    monkeypatch.setattr(benches, "SECONDS", 1e-3)
    kernel, layer = Kernel(), moetune.layer("qwen3-30b-a3b")
    ranked = [Tactic(config=number) for number in range(1, 6)]
    makes = {DEFAULT: lambda right: right, ranked[0]: lambda right: -right}
    calls = {tactic: kernel.call(makes.get(tactic, makes[DEFAULT])) for tactic in (DEFAULT, *ranked)}
    times_us = {tactic: 10.0 * (number + 1) for number, tactic in enumerate(ranked)}
    timed = []

    class Planted(Clock):
        def paired_samples(self, given, draws):
            tactics = [next(tactic for tactic in calls if calls[tactic] is call) for call in given]
            timed.extend(tactics)
            return [[times_us.get(tactic, 100.0)] * len(draws) for tactic in tactics]

    routing = moetune.realize(layer, Regime(ep_size=8), 64)
    draws = (Draw(routing, 64, "final"), Draw(routing, 64, "stress", 2))
    bench = EngineBench(calls, Planted(), DEFAULT, 2e-2)
    choice = choose(bench, (DEFAULT, *ranked), draws, 64, 6)
    assert choice.tactic == ranked[1]
    assert set(timed) == {DEFAULT, *ranked[1:4]}
    (rejection,) = choice.rejected
    assert rejection.tactic == ranked[0]
    assert "relative error 2.0e+00" in rejection.reason


@pytest.mark.parametrize(("kind", "winner"), [("mean", 0), ("worst", 1)])
def test_an_op_is_compared_under_each_distribution(kind, winner):
    """The first tactic is the fastest under `random` and 2.2 times as slow as the fastest under `zipf:1`."""
    kernel, layer = Kernel(), moetune.layer("qwen3-30b-a3b")
    tactics = [Tactic(config=number) for number in range(1, 4)]
    calls = {tactic: kernel.call(lambda right: right) for tactic in (DEFAULT, *tactics)}
    times_us = {
        "random": dict(zip((DEFAULT, *tactics), (100.0, 10.0, 15.0, 19.0), strict=True)),
        "zipf:1": dict(zip((DEFAULT, *tactics), (100.0, 44.0, 30.0, 20.0), strict=True)),
    }
    routing = moetune.realize(layer, Regime(ep_size=8), 64)
    kinds = ("random", "random", "zipf:1", "zipf:1")
    draws = [Draw(routing, 64, "final", distribution=name) for name in kinds]
    draws.append(Draw(routing, 64, "stress", 2, "random"))

    class Planted(Clock):
        def paired_samples(self, given, numbers):
            chosen = [next(tactic for tactic in calls if calls[tactic] is call) for call in given]
            return [[times_us[draws[number].distribution][tactic] for number in numbers] for tactic in chosen]

    bench = EngineBench(calls, Planted(), DEFAULT, 2e-2)
    objective = Objective(kind, {"random": 0.9, "zipf:1": 0.1})
    choice = choose(bench, (DEFAULT, *tactics), draws, 64, 4, objective)
    assert choice.tactic == tactics[winner]
    assert [(each.rows, each.distribution) for each in choice.by_rows] == [(64, "random"), (64, "zipf:1")]


@pytest.mark.parametrize(
    ("ladder", "maximum", "buckets", "expected"),
    [
        ("hybrid", 8192, (1, 256, 8192), ("hybrid", 8192)),
        ("pow2", 8192, (1, 256, 768), ("hybrid", 8192)),
        ("adaptive", 8192, (1, 24, 4096), ("vllm", 8192)),
        ("adaptive", 8192, (1, 28, 4096), ("1,28,4096", 4096)),
        ("adaptive", 8192, (1, 2048, 8192), ("hybrid", 8192)),
        ("adaptive", 5000, (1, 2048, 8192), ("hybrid", 8192)),
        ("pow2", 8192, (1, 2, 300), ("hybrid", 300)),
        ("pow2", 8192, (3, 100, 1000), ("3,100,1000", 1000)),
    ],
)
def test_the_engines_buckets_make_the_ladder(ladder, maximum, buckets, expected):
    regime = regime_of_buckets(Regime(ladder=ladder, tune_max_num_tokens=maximum), buckets)
    assert (str(regime.ladder), regime.tune_max_num_tokens) == expected


@given(st.sets(st.integers(1, 20000), min_size=1, max_size=8), st.sampled_from(["none", "allgather", "alltoall"]))
def test_every_bucket_of_the_engine_is_one_of_the_regime(buckets, dispatch):
    regime = Regime(ep_size=2, dispatch=dispatch)
    found = regime_of_buckets(regime, sorted(buckets))
    assert buckets <= set(found.buckets)
    assert regime.differing(found).keys() <= {"ladder", "tune_max_num_tokens"}
