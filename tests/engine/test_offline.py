"""A profile of `moetune tune` answers an engine's call, if it is the call that was tuned."""

import pytest
from stand_ins import real_runner

import moetune
from moetune.backends import registry
from moetune.measure.probe import environment
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

BUCKETS = {1, 2, 4, 8}
ROUTED = "flashinfer-trtllm-routed"
TACTIC = Tactic(tile_n=16, config=1)


def saved(store, layer, regime, backend=ROUTED, tactic=TACTIC, **options):
    """What `moetune tune` on this machine would have left for these experts."""
    choices = tuple(
        Choice(
            rows=rows, tactic=tactic, time_us=50.0, default_tactic=Tactic(tile_n=-1, config=-1), default_time_us=100.0,
            gain=2.0, gain_low=1.9, gain_high=2.1, noise=0.01, tried=2, candidates=2, load=(rows,), max_load=rows,
            measured_at="2026-01-01T00:00:00Z",
        )
        for rows in regime.buckets
    )  # fmt: skip
    strict = options.pop("strict", {})
    measured = environment(registry.backend(backend, **options), "cpu")
    measured = measured.model_copy(update={"strict": {**measured.strict, **strict}})
    profile = Profile(layer=layer, regime=regime, backend=backend, environment=measured, choices=choices)
    return Store(store).save(profile)


def warmed_up(tuner, layer, regime, store):
    op, stand_in = real_runner(layer, regime)
    with moetune.warmup(layer, regime, store=store) as seen:
        answer = op()
    return seen, answer, stand_in


@pytest.mark.parametrize("options", [{}, {"packed": False}, {"quantized": True}, {"hidden_dtype": "float16"}])
def test_what_was_tuned_offline_is_served_without_measuring(tuner, layer, regime, tmp_path, options):
    saved(tmp_path, layer, regime, **options)
    seen, answer, runner = warmed_up(tuner, layer, regime, tmp_path)
    assert answer == (16, 1)
    assert seen.served == {(ROUTED, rows) for rows in BUCKETS}
    assert not runner.seen


def test_what_was_tuned_with_the_ladder_of_vllms_dispatchers_is_served(tuner, layer, regime, tmp_path):
    fields = {name: getattr(regime, name) for name in type(regime).model_fields}
    adaptive = type(regime)(**{**fields, "ladder": "adaptive"})
    assert len(saved(tmp_path, layer, adaptive).choices) > len(BUCKETS)
    seen, answer, runner = warmed_up(tuner, layer, adaptive, tmp_path)
    assert answer == (16, 1)
    assert seen.served == {(ROUTED, rows) for rows in BUCKETS}
    assert not runner.seen


def test_the_default_is_served_as_flashinfers_own(tuner, layer, regime, tmp_path):
    saved(tmp_path, layer, regime, tactic=Tactic(tile_n=-1, config=-1))
    seen, answer, runner = warmed_up(tuner, layer, regime, tmp_path)
    assert (answer, len(seen.served), runner.seen) == (-1, len(BUCKETS), [])


@pytest.mark.parametrize(
    "other",
    [
        {"backend": "flashinfer-trtllm"},
        {"strict": {"threads": "99"}},
        {"strict": {"flashinfer": "0.7.2"}},
        {"layer": {"hidden_size": 64}},
        {"layer": {"precision": "fp8_block"}},
        {"regime": {"ladder": "pow2", "tune_max_num_tokens": 8}},
        {"regime": {"seed": 1}},
    ],
    ids=str,
)
def test_another_question_is_measured(tuner, layer, regime, tmp_path, other):
    changed = {name: other[name] for name in ("backend", "strict") if name in other}
    fields = {name: getattr(regime, name) for name in type(regime).model_fields}
    asked = type(regime)(**{**fields, **other.get("regime", {})})
    saved(tmp_path, type(layer)(**{**dict(layer), **other.get("layer", {})}), asked, **changed)
    seen, _, runner = warmed_up(tuner, layer, regime, tmp_path)
    assert len(seen.tuned) == len(BUCKETS)
    assert runner.seen


def test_a_profile_of_another_torch_is_served(tuner, layer, regime, tmp_path):
    saved(tmp_path, layer, regime, strict={"torch": "1.0"})
    seen, _, runner = warmed_up(tuner, layer, regime, tmp_path)
    assert (len(seen.served), runner.seen) == (len(BUCKETS), [])


def test_experts_that_lie_otherwise_are_measured(tuner, layer, regime, tmp_path):
    saved(tmp_path, layer, regime)
    op, _ = real_runner(layer, regime)
    op.runner.use_shuffled_weight = False
    with moetune.warmup(layer, regime, store=tmp_path) as seen:
        op()
    assert len(seen.tuned) == len(BUCKETS)


def test_buckets_that_were_not_tuned_offline_are_measured(tuner, layer, regime, tmp_path):
    profile = saved(tmp_path / "whole", layer, regime)
    Store(tmp_path / "part").save(profile.model_copy(update={"choices": profile.choices[:2]}))
    seen, _, _ = warmed_up(tuner, layer, regime, tmp_path / "part")
    assert {rows for _, rows in seen.served} == {1, 2}
    assert {rows for _, rows in seen.tuned} == {4, 8}


def test_the_engines_own_answer_comes_first(tuner, layer, regime, tmp_path):
    _, first, _ = warmed_up(tuner, layer, regime, tmp_path)
    saved(tmp_path, layer, regime, tactic=Tactic(tile_n=-1, config=-1))
    _, again, runner = warmed_up(tuner, layer, regime, tmp_path)
    assert again == first != -1
    assert not runner.seen
