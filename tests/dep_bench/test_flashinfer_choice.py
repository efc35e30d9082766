import importlib

from moetune.dep_bench.flashinfer_choice import LADDER, flashinfer_choices
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

LAYER = MoELayer(num_experts=8, top_k=2, hidden_size=32, intermediate_size=16)


class Preparing:
    def __init__(self):
        self.problems = []

    def prepare(self, problem):
        self.problems.append(problem)
        return problem


def test_flashinfer_is_asked_for_each_of_its_buckets_in_the_shape_of_the_deployment(monkeypatch):
    module = importlib.import_module("moetune.dep_bench.flashinfer_choice")
    tuned = []
    monkeypatch.setattr(module, "own_autotune", lambda runner: tuned.append(runner.rows))
    monkeypatch.setattr(module, "own_pick", lambda runner: Tactic(gemm1=runner.rows, gemm2=0))
    for layout, top_k in (("pool", 2), ("slot", 1)):
        backend = Preparing()
        regime = Regime(ep_size=4, layout=layout, ladder="hybrid", tune_max_num_tokens=256)
        chosen = flashinfer_choices(backend, LAYER, regime, "cpu")
        assert list(chosen) == list(LADDER.buckets(256)) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
        assert all(tactic["gemm1"] == rows for rows, tactic in chosen.items())
        assert {(problem.row_top_k, problem.shard.num_local) for problem in backend.problems} == {(top_k, 2)}
        assert {problem.regime.tune_max_num_tokens for problem in backend.problems} == {256}
    assert tuned == [256, 256]


def test_shards_may_be_uneven(monkeypatch):
    module = importlib.import_module("moetune.dep_bench.flashinfer_choice")
    monkeypatch.setattr(module, "own_autotune", lambda runner: 0.0)
    monkeypatch.setattr(module, "own_pick", lambda runner: Tactic(gemm1=runner.shard.num_local, gemm2=0))
    regime = Regime(ep_size=3, layout="pool", ladder="hybrid", tune_max_num_tokens=4, uneven_shards=True)
    assert {tactic["gemm1"] for tactic in flashinfer_choices(Preparing(), LAYER, regime, "cpu").values()} == {3}
