import dataclasses
import inspect
import logging

import pytest
import torch
from flashinfer.autotuner import AutoTuner, autotune
from stand_ins import FAST, MIDDLING, SLOW, TIMES_US, Trtllm, real_runner

import moetune
from moetune.engine import answer
from moetune.engine.tuner_call import TunerCall
from moetune.errors import UsageError
from moetune.spec.enums import DISTRIBUTION_VARIABLE
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.store import Store

BUCKETS = {1, 2, 4, 8}
GIVEN = {"ep_size": 4, "attention_dp": True, "draws": 4, "ladder": "hybrid", "tune_max_num_tokens": 8}
"""The fixture's regime."""


def fresh_process(monkeypatch):
    monkeypatch.setattr(AutoTuner, "_instance", None)
    return AutoTuner.get()


def test_the_second_start_measures_nothing(trtllm, layer, regime, monkeypatch):
    with moetune.warmup(layer, regime) as first:
        assert trtllm() == tuple(FAST)
    assert {rows for _, rows in first.tuned} == BUCKETS
    fresh_process(monkeypatch)
    again = Trtllm(layer, regime)
    with moetune.warmup(layer, regime) as second:
        assert again() == tuple(FAST)
    assert not again.runner.seen
    assert {rows for _, rows in second.served} == BUCKETS
    assert not second.tuned | second.missed


def test_a_second_layer_of_the_model_tunes_nothing_again(trtllm, layer, regime):
    with moetune.warmup(layer, regime) as seen:
        trtllm()
        runs = len(trtllm.runner.seen)
        trtllm()
        trtllm(3)
    assert len(trtllm.runner.seen) == runs
    assert len(seen.tuned) == len(BUCKETS)


class Built:
    """Counts the keys and the profiles that FlashInfer's tuner builds."""

    def __init__(self, monkeypatch):
        self.keys = self.profiles = 0
        key, profiles = AutoTuner._get_cache_key, AutoTuner._generate_optimization_profiles

        def counted_key(cls, *call):
            self.keys += 1
            return key(*call)

        def counted_profiles(tuner, *call):
            self.profiles += 1
            return profiles(tuner, *call)

        monkeypatch.setattr(AutoTuner, "_get_cache_key", classmethod(counted_key))
        monkeypatch.setattr(AutoTuner, "_generate_optimization_profiles", counted_profiles)

    def by(self, op):
        before = (self.keys, self.profiles)
        op()
        return self.keys - before[0], self.profiles - before[1]


def test_a_repeated_call_builds_no_more_keys_than_flashinfer_alone(trtllm, layer, regime, monkeypatch):
    built = Built(monkeypatch)
    with autotune(True):
        trtllm()
        alone = built.by(trtllm)
    fresh_process(monkeypatch)
    with moetune.warmup(layer, regime) as seen:
        first = built.by(trtllm)
        assert built.by(trtllm) == alone
    assert first[0] > alone[0]
    assert {rows for _, rows in seen.tuned} == BUCKETS


def test_a_repeated_call_places_again_what_flashinfer_no_longer_holds(trtllm, layer, regime):
    with moetune.warmup(layer, regime):
        trtllm()
        runs = len(trtllm.runner.seen)
        AutoTuner.get().clear_cache()
        assert trtllm() == tuple(FAST)
    assert len(trtllm.runner.seen) == runs


def test_what_flashinfer_tuned_for_another_load_is_replaced(trtllm, layer, regime):
    with autotune(True):
        assert trtllm() == FAST
    trtllm.times_us |= {str(FAST): 120.0, str(SLOW): 60.0}
    trtllm.runner.seen.clear()
    with moetune.warmup(layer, regime):
        assert trtllm() == tuple(SLOW)
    assert trtllm.runner.seen


def test_the_store_holds_the_choice_with_its_times(trtllm, layer, regime, tmp_path):
    with moetune.warmup(layer, regime, store=tmp_path):
        trtllm()
    ((_, profile),) = Store(tmp_path).profiles()
    assert profile.backend == "flashinfer-trtllm-routed"
    assert profile.regime == regime
    assert [choice.rows for choice in profile.choices] == sorted(BUCKETS)
    choice = profile.choices[-1]
    assert choice.tactic == Tactic(tile_n=16, config=1)
    assert (choice.time_us, choice.default_time_us, choice.gain) == (50.0, 100.0, 2.0)
    assert choice.default_tactic == Tactic(tile_n=-1, config=-1)


def test_ops_that_differ_in_more_than_the_rows_are_kept_apart(trtllm, layer, regime, monkeypatch):
    with moetune.warmup(layer, regime):
        trtllm()
    fresh_process(monkeypatch)
    other = Trtllm(layer, regime, op="flashinfer::trtllm_bf16_moe")
    with moetune.warmup(layer, regime) as seen:
        other()
    assert {rows for _, rows in seen.tuned} == BUCKETS


def test_flashinfers_own_file_carries_the_answers(trtllm, layer, regime, monkeypatch, tmp_path):
    path = tmp_path / "configs.json"
    with moetune.warmup(layer, regime):
        trtllm()
    AutoTuner.get().save_configs(str(path))
    loaded = fresh_process(monkeypatch)
    assert loaded.load_configs(str(path))
    again = Trtllm(layer, regime)
    for rows in (1, 2, 3, 8):
        assert again(rows) == tuple(FAST)
    with autotune(True):
        again()
    assert not again.runner.seen, "it hits in tuning mode too"


def test_flashinfers_managed_store_carries_the_answers(tuner, layer, regime, tmp_path):
    autotune_cache = pytest.importorskip("flashinfer.autotune_cache", reason="from 0.7.0; vLLM tunes into it")
    op = Trtllm(layer, regime, times_us={**TIMES_US, str(FAST): 98.0, str(MIDDLING): 99.0})
    with moetune.warmup(layer, regime), autotune_cache.autotune_v2(cache_root=tmp_path):
        assert op() == -1, "within the margin"
    autotune_cache.autotune_v2_reload()
    assert op(3) == -1, "not the winner of FlashInfer's sweep"


def test_the_answer_stays_under_the_replays_that_an_engine_asks_for(tuner, layer, regime):
    if "cuda_graph_profile_replays" not in inspect.signature(autotune).parameters:
        pytest.skip("from FlashInfer 0.7.0")
    op = Trtllm(layer, regime, times_us={**TIMES_US, str(FAST): 98.0, str(MIDDLING): 99.0})
    config = op.config
    op.config = lambda inputs: dataclasses.replace(config(inputs), use_cuda_graph=True)
    with moetune.warmup(layer, regime), autotune(True, cuda_graph_profile_replays=3):
        assert op() == -1, "within the margin"


def test_an_engine_that_skips_its_sweep_is_served_from_the_store(trtllm, layer, regime, monkeypatch):
    with moetune.warmup(layer, regime):
        trtllm()
    fresh_process(monkeypatch)
    again, unknown = Trtllm(layer, regime), Trtllm(layer, regime, op="flashinfer::trtllm_bf16_moe")
    with moetune.warmup(layer, regime) as seen:
        AutoTuner.get().is_tuning_mode = False
        assert again() == tuple(FAST)
        assert unknown() == -1
    assert not again.runner.seen + unknown.runner.seen
    assert {rows for _, rows in seen.served} == BUCKETS


def test_an_error_before_the_sweep_does_not_keep_the_sweep_from_being_tuned(trtllm, layer, regime, monkeypatch, caplog):
    answers = answer._answers

    def fails_outside_tuning_mode(session, call, op, regime):
        if not call.tuner.is_tuning_mode:
            raise OSError("planted")
        return answers(session, call, op, regime)

    monkeypatch.setattr(answer, "_answers", fails_outside_tuning_mode)
    with moetune.warmup(layer, regime) as seen:
        AutoTuner.get().is_tuning_mode = False
        assert trtllm() == trtllm() == -1
        AutoTuner.get().is_tuning_mode = True
        assert trtllm() == tuple(FAST)
    assert caplog.text.count("OSError: planted") == 1
    assert {rows for _, rows in seen.tuned} == BUCKETS


def test_ranks_that_do_not_all_have_the_answer_measure_together(trtllm, layer, regime, monkeypatch):
    with moetune.warmup(layer, regime):
        trtllm()
    fresh_process(monkeypatch)
    other_rank = [{1: Tactic(tile_n=16, config=1), 2: Tactic(tile_n=8, config=0)}]
    monkeypatch.setattr(answer, "gather", lambda value, group: [value, *other_rank])
    again = Trtllm(layer, regime)
    with moetune.warmup(layer, regime) as seen:
        again()
    assert {rows for _, rows in seen.served} == {1}
    assert {rows for _, rows in seen.tuned} == {2, 4, 8}


def test_a_cliff_keeps_a_tactic_from_winning(trtllm, layer, regime, monkeypatch):
    forward = type(trtllm.runner).forward
    busiest = {rows: max(max(moetune.realize(layer, regime, rows, 1, d).load) for d in range(5)) for rows in BUCKETS}

    def slow_when_one_expert_is_busy(self, inputs, tactic=-1, **kwargs):
        out = forward(self, inputs, tactic, **kwargs)
        if list(tactic if tactic != -1 else ()) == FAST and max(trtllm.load(inputs)) > busiest[inputs[0].shape[0]]:
            self.last_us_cache[0] = 2000.0
        return out

    monkeypatch.setattr(type(trtllm.runner), "forward", slow_when_one_expert_is_busy)
    with moetune.warmup(layer, regime):
        assert trtllm() != tuple(FAST)


def test_a_tactic_that_disagrees_with_flashinfers_default_cannot_win(trtllm, layer, regime, monkeypatch, tmp_path):
    forward = type(trtllm.runner).forward

    def written(self, inputs, tactic=-1, **kwargs):
        wrong = tactic != -1 and list(tactic) == FAST
        inputs[0].copy_(inputs[4][:, :1].expand_as(inputs[0]) * (-1.0 if wrong else 1.0))
        return [forward(self, inputs, tactic, **kwargs)]

    monkeypatch.setattr(type(trtllm.runner), "forward", written)
    with moetune.warmup(layer, regime, store=tmp_path):
        assert trtllm() == tuple(MIDDLING)
    ((_, profile),) = Store(tmp_path).profiles()
    for choice in profile.choices:
        (rejection,) = choice.rejected
        assert rejection.tactic == Tactic(tile_n=FAST[0], config=FAST[1])
        assert "wrong result: relative error 2.0e+00 against the default's" in rejection.reason


def test_a_tactic_without_memory_costs_itself_and_not_the_sweep(trtllm, layer, regime, monkeypatch):
    """FlashInfer would end its sweep at the first tactic that has no memory."""
    forward = type(trtllm.runner).forward

    def lacks_memory(self, inputs, tactic=-1, **kwargs):
        if tactic != -1 and list(tactic) == SLOW:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, tactic, **kwargs)

    monkeypatch.setattr(type(trtllm.runner), "forward", lacks_memory)
    with moetune.warmup(layer, regime) as seen:
        assert trtllm() == tuple(FAST)
    assert {rows for _, rows in seen.tuned} == BUCKETS


def test_one_line_says_what_became_of_the_buckets(trtllm, layer, regime, caplog):
    with caplog.at_level(logging.INFO, "moetune"), moetune.warmup(layer, regime):
        trtllm()
    lines = [record.message for record in caplog.records if record.name == "moetune"]
    assert lines == [
        "moetune: tiny under ep4-tp1-dp-alltoall-packed-random: "
        "buckets of flashinfer-trtllm-routed: 0 served, 4 tuned, 0 missed"
    ]


def test_a_store_that_cannot_be_written_does_not_stop_the_engine(trtllm, layer, regime, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with moetune.warmup(layer, regime, store=tmp_path / "file"):
        trtllm()
    assert "moetune" in caplog.text


def test_a_regime_that_does_not_fit_is_refused_before_anything_runs(layer, regime):
    with pytest.raises(UsageError, match="rank must be"), moetune.warmup(layer, regime, rank=4):
        pass
    with pytest.raises(UsageError, match="does not divide"), moetune.warmup(layer, moetune.Regime(ep_size=3)):
        pass


def test_a_strategy_that_does_not_exist_is_refused_with_those_that_do(layer, regime):
    refused = pytest.raises(UsageError, match=r"strategy=vote is not a strategy. Use one of independent, .*, parallel")
    with refused, moetune.warmup(layer, regime, strategy="vote"):
        pass


def balanced_by(monkeypatch, spelled="Balanced"):
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, spelled)


def test_tensorrt_llms_variable_gives_the_default_distribution(trtllm, layer, regime, monkeypatch):
    balanced_by(monkeypatch)
    with moetune.warmup(layer, regime, rank=1) as seen:
        trtllm()
    assert seen.regime == Regime(**{**GIVEN, "distribution": "balanced"})
    for _, inputs in trtllm.runner.seen[: 3 * len(BUCKETS)]:
        load = trtllm.load(inputs)
        assert load == moetune.realize(layer, seen.regime, trtllm.runner.rows(inputs), rank=1).load.tolist()
        assert max(load) - min(load) <= 1


def test_tensorrt_llms_variable_means_to_a_warmup_what_it_means_to_the_command_line(layer, monkeypatch):
    from moetune.cli.options import request_of

    balanced_by(monkeypatch)
    asked = request_of("qwen3-30b-a3b", ep=4, dp=True, ladder="hybrid")
    with moetune.warmup(asked.layer, Regime(ep_size=4, attention_dp=True, ladder="hybrid")) as seen:
        assert seen.regime.digest == asked.regime.digest
        assert (seen.regime.distribution, seen.regime.draws) == ("balanced", 1)


def test_a_distribution_that_was_given_wins_over_tensorrt_llms_variable(layer, monkeypatch):
    balanced_by(monkeypatch)
    with moetune.warmup(layer, Regime(ep_size=4, distribution="random")) as seen:
        assert seen.regime.distribution == "random"


def test_a_wrong_value_of_tensorrt_llms_variable_is_an_error_that_lists_the_values(layer, regime, monkeypatch):
    balanced_by(monkeypatch, "uniform")
    with pytest.raises(UsageError) as error, moetune.warmup(layer, regime):
        pass
    for said in (DISTRIBUTION_VARIABLE, "uniform", "balanced", "random"):
        assert said in str(error.value)


def test_flashinfers_real_runner_is_recognized(tuner, layer, regime):
    op, stand_in = real_runner(layer, regime)
    with moetune.warmup(layer, regime) as seen:
        op()
    assert {rows for _, rows in seen.tuned} == BUCKETS
    for _, inputs in stand_in.seen[: 2 * len(BUCKETS)]:
        rows = stand_in.rows(inputs)
        assert op.load(inputs) == moetune.realize(layer, regime, rows, rank=1).load.tolist()
        assert inputs[3].shape == (rows,), "the widened placeholder"


@pytest.mark.parametrize("missing", ["identity", "keys"])
def test_the_engine_goes_on_without_flashinfers_keys_and_the_log_says_so_once(
    trtllm, layer, regime, monkeypatch, caplog, missing
):
    def unknown(call):
        raise AttributeError(f"planted {missing}")

    monkeypatch.setattr(TunerCall, missing, property(unknown))
    monkeypatch.setattr(answer, "engine_group", lambda: "a group, so that the defaults have to be placed")
    with moetune.warmup(layer, regime, strategy="independent") as seen:
        assert [tuple(trtllm()) for _ in range(2)] == [tuple(FAST)] * 2
    assert not seen.tuned
    assert caplog.text.count(f"is left to FlashInfer: AttributeError: planted {missing}") == 1
