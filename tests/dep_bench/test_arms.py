import importlib

import pytest

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.plain_torch.backend import TorchBackend
from moetune.dep_bench.arms import arms_of, pure_ep
from moetune.dep_bench.process_group import Ranks
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

LAYER = preset("qwen3-30b-a3b")
DEP = Regime(ep_size=4, layout="pool", ladder="hybrid", draws=3, seed=5, distribution="zipf:1")


class StubProfile:
    def __init__(self, regime):
        self.regime = regime

    def tactic(self, rows):
        return Tactic(algorithm=self.regime.dispatch, rows=rows)


def test_the_pure_ep_profile_is_of_the_same_layer_without_attention_dp():
    plain = pure_ep(LAYER, DEP)
    assert (plain.dispatch, plain.layout, plain.attention_dp, plain.distribution) == ("none", None, False, "random")
    kept = ("ep_size", "ladder", "draws", "seed", "tune_max_num_tokens")
    assert [getattr(plain, name) for name in kept] == [getattr(DEP, name) for name in kept]


def test_the_engines_divided_ladder_is_not_divided_without_attention_dp():
    packed = Regime(ep_size=4, layout="packed", ladder="pow2/4")
    assert str(pure_ep(LAYER, packed).ladder) == "pow2"


def test_both_profiles_are_tuned_and_asked_for_the_rows_that_arrive():
    arms, missing = arms_of(TorchBackend(), LAYER, DEP, Ranks(), StubProfile)
    assert [arm.name for arm in arms] == ["default", "pure_ep", "dispatcher"]
    assert missing == {"engine": "no engine tunes the kernels of torch"}
    assert [dict(arm.tactic_of(24)) for arm in arms[1:]] == [
        {"algorithm": "none", "rows": 24},
        {"algorithm": "alltoall", "rows": 24},
    ]
    assert arms[0].tactic_of(24) == Tactic(algorithm="eager")


def test_tritons_default_is_the_heuristic_and_the_engines_is_its_tuned_file(tmp_path, monkeypatch):
    backend = TritonBackend()
    shipped = Tactic(BLOCK_SIZE_M=16)
    monkeypatch.setattr(TritonBackend, "default", lambda self, layer, regime, rows: shipped)
    arms, missing = arms_of(backend, LAYER, DEP, Ranks(), StubProfile)
    assert [arm.name for arm in arms] == ["default", "engine", "pure_ep", "dispatcher"]
    assert not missing
    assert arms[1].tactic_of(64) is shipped
    assert arms[0].tactic_of(64)["BLOCK_SIZE_N"] == 64
    assert arms[1].source == "heuristic"


def test_flashinfers_choice_is_looked_up_as_flashinfer_does(monkeypatch):
    from moetune.backends.flashinfer_cutlass.backend import DEFAULT_TACTIC, FlashInferCutlassBackend

    module = importlib.import_module("moetune.dep_bench.arms")
    chosen = {rows: Tactic(gemm1=rows, gemm2=0) for rows in (8, 1024, 8192)}
    monkeypatch.setattr(module, "flashinfer_choices", lambda *given: chosen)
    arms, _ = arms_of(FlashInferCutlassBackend(), LAYER, DEP, Ranks(), StubProfile)
    engine = next(arm for arm in arms if arm.name == "engine")
    assert [engine.tactic_of(rows)["gemm1"] for rows in (5, 8, 1000, 9000)] == [8, 8, 1024, 8192]
    assert engine.tactic_of(100) == DEFAULT_TACTIC  # FlashInfer has no entry for the bucket 128


def test_an_error_of_the_tune_is_raised():
    def fails(regime):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        arms_of(TorchBackend(), LAYER, DEP, Ranks(), fails)
