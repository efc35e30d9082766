"""Every backend is tuned, one that fails costs only itself, and the winners are timed side by side."""

import pytest
from planted import LAYER, PlantedBackend, tactic

from moetune.backends import registry
from moetune.backends.registry import Diagnosis
from moetune.errors import MissError, NoResultError, UnsupportedError, UsageError
from moetune.spec.regime import Regime
from moetune.store.store import Store
from moetune.tuning import final_comparison as final
from moetune.tuning import side_by_side
from moetune.tuning.events import BackendFailed, BackendStarted, BucketChosen, BucketCompared
from moetune.tuning.tune_all import tune_all

REGIME = Regime(ep_size=2, attention_dp=True, ladder="4,8", draws=4)


@pytest.fixture(autouse=True)
def _short_finals(monkeypatch):
    monkeypatch.setattr(final, "SECONDS", 0.05)
    monkeypatch.setattr(side_by_side, "SECONDS", 0.05)


@pytest.fixture
def plant(monkeypatch):
    """Makes these backends all that there are, in this order; those `missing` cannot run."""

    def _plant(*backends, missing=()):
        named = {backend.name: backend for backend in backends}
        monkeypatch.setattr(registry, "backends", lambda: (*named, *missing))
        absent = {name: PlantedBackend({"default": 1.0}, name=name) for name in missing}
        monkeypatch.setattr(registry, "backend", {**named, **absent}.__getitem__)
        monkeypatch.setattr(registry, "diagnosis", lambda name: Diagnosis(name, name in named, "there is no GPU"))
        return named

    return _plant


def _planted(name, best, default=4.0, **planted):
    return PlantedBackend({"default": default, "best": best}, name=name, **planted)


def _all(tmp_path, **options):
    return tune_all(LAYER, REGIME, tmp_path, **{"device": "cpu", "isolate": False, **options})


def test_the_fastest_backend_wins_each_bucket_by_its_own_best_tactic(plant, tmp_path):
    plant(_planted("triton", 1.5), _planted("flashinfer-cutlass", 0.3, default=6.0), missing=("flashinfer-trtllm",))
    events = []
    comparison = _all(tmp_path, on_event=events.append)
    assert [result.backend for result in comparison.families] == ["triton", "flashinfer-cutlass"]
    assert comparison.left_out == {"flashinfer-trtllm": "there is no GPU"}
    assert comparison.families[1].flags["vllm"] == "--moe-backend flashinfer_cutlass"
    assert [bucket.rows for bucket in comparison.buckets] == [4, 8]
    for bucket in comparison.buckets:
        assert (bucket.winner, bucket.runner_up) == ("flashinfer-cutlass", "triton")
        assert bucket.interleaved
        assert bucket.decided
        assert 1 < bucket.ratio_low <= bucket.ratio <= bucket.ratio_high
        assert bucket.times_us["triton"] / bucket.times_us["flashinfer-cutlass"] == pytest.approx(bucket.ratio)
        assert bucket.failed == {}
    for result in comparison.families:
        assert {choice.tactic for choice in result.profile.choices} == {tactic("best")}
        assert Store(tmp_path).read(result.path) == result.profile
    started = [event for event in events if isinstance(event, BackendStarted)]
    assert started == [BackendStarted("triton", 0, 2), BackendStarted("flashinfer-cutlass", 1, 2)]
    assert [event.rows for event in events if isinstance(event, BucketCompared)] == [4, 8]


def test_backends_of_equal_speed_are_too_close_to_call(plant, tmp_path):
    plant(_planted("triton", 2.0), _planted("torch", 2.0))
    assert not any(bucket.decided for bucket in _all(tmp_path).buckets)


def test_the_rounds_side_by_side_decide_the_winner_not_the_profiles(plant, tmp_path, monkeypatch):
    """One backend was tuned while the machine was slow: it is slower by its profile, and faster side by side."""
    backends = plant(_planted("triton", 0.5), _planted("torch", 1.5))
    backends["triton"].milliseconds = {"default": 20.0, "best": 5.0}
    _all(tmp_path)
    backends["triton"].milliseconds = {"default": 20.0, "best": 0.5}
    comparison = _all(tmp_path)
    assert all(result.served for result in comparison.families)
    stored = {result.backend: result.profile.choices[0].time_us for result in comparison.families}
    assert stored["triton"] > stored["torch"]
    assert {bucket.winner for bucket in comparison.buckets if bucket.decided} == {"triton"}
    assert all(bucket.decided for bucket in comparison.buckets)


def test_side_by_side_they_run_on_draws_that_no_tune_has_seen(plant, tmp_path, monkeypatch):
    backends = plant(_planted("triton", 1.0), _planted("torch", 0.5))
    problems = []
    prepare = PlantedBackend.prepare
    monkeypatch.setattr(PlantedBackend, "prepare", lambda self, p: (problems.append(p), prepare(self, p))[1])
    _all(tmp_path)
    of_four = [problem for problem in problems if problem.rows == 4]
    assert len(of_four) == 2 * len(backends)
    seen = {draw.routing.topk_ids.numpy().tobytes() for problem in of_four[:2] for draw in problem.draws}
    last = of_four[-1].draws
    assert len(last) == REGIME.draws
    assert not seen & {draw.routing.topk_ids.numpy().tobytes() for draw in last}


def test_a_backend_that_fails_midway_costs_only_itself_and_keeps_what_it_had(plant, tmp_path):
    backends = plant(_planted("triton", 0.5), _planted("torch", 1.5))
    whole = backends["triton"].prepare

    def prepare(problem):
        if problem.rows == 8:
            raise RuntimeError("planted: the second bucket")
        return whole(problem)

    backends["triton"].prepare = prepare
    events = []
    comparison = _all(tmp_path, on_event=events.append)
    broken, torch = comparison.families
    assert "planted: the second bucket" in broken.failed
    assert [choice.rows for choice in broken.profile.choices] == [4]
    assert torch.failed == ""
    assert [(bucket.rows, bucket.winner, bucket.runner_up) for bucket in comparison.buckets] == [
        (4, "triton", "torch"),
        (8, "torch", None),
    ]
    assert [event for event in events if isinstance(event, BackendFailed)] == [BackendFailed("triton", broken.failed)]


def test_a_backend_that_fails_only_side_by_side_leaves_the_bucket_to_the_others(plant, tmp_path):
    backends = plant(_planted("triton", 0.5), _planted("torch", 1.5), _planted("flashinfer-cutlass", 3.0))
    _all(tmp_path)
    backends["triton"].raising = frozenset({"best"})
    for bucket in _all(tmp_path).buckets:
        assert (bucket.winner, bucket.runner_up) == ("torch", "flashinfer-cutlass")
        assert "planted failure" in bucket.failed["triton"]
    backends["torch"].raising = frozenset({"best"})
    for bucket in _all(tmp_path).buckets:
        assert (bucket.winner, bucket.runner_up, bucket.decided) == ("flashinfer-cutlass", None, False)
        assert bucket.failed.keys() == {"triton", "torch"}


def test_where_every_backend_fails_there_is_no_result_and_the_error_names_all_reasons(plant, tmp_path):
    plant(*(_planted(name, 1.0, raising=frozenset({"default"})) for name in ("triton", "torch")))
    with pytest.raises(NoResultError, match=r"No backend has a result: triton: .*; torch: ") as raised:
        _all(tmp_path)
    assert raised.value.exit_code == 1


def test_a_single_backend_is_compared_with_nothing_and_raises_its_own_errors(plant, tmp_path):
    backend = plant(_planted("torch", 0.5))["torch"]
    comparison = _all(tmp_path)
    assert [(b.winner, b.runner_up, b.interleaved) for b in comparison.buckets] == [("torch", None, False)] * 2
    assert backend.prepared == [4, 8]
    backend.raising = frozenset({"default"})
    with pytest.raises(NoResultError, match="default tactic"):
        _all(tmp_path, again=True)


def test_frozen_measures_nothing_and_says_that_times_are_of_different_tunes(plant, tmp_path):
    backends = plant(_planted("triton", 0.5), _planted("torch", 1.5))
    with pytest.raises(MissError) as missed:
        _all(tmp_path, frozen=True)
    assert missed.value.exit_code == 3
    _all(tmp_path)
    for backend in backends.values():
        backend.prepared.clear()
    comparison = _all(tmp_path, frozen=True)
    assert [(b.winner, b.interleaved, b.decided, b.ratio_low) for b in comparison.buckets] == [
        ("triton", False, False, None)
    ] * 2
    assert all(bucket.ratio > 1 for bucket in comparison.buckets)
    assert [backend.prepared for backend in backends.values()] == [[], []]


def test_a_rival_is_timed_by_its_only_tactic_and_can_win(plant, tmp_path):
    rival = PlantedBackend({"default": 0.3}, name="flashinfer-fp8-block")
    rival.rival = True
    plant(_planted("triton", 1.5), rival)
    comparison = _all(tmp_path)
    triton, timed = comparison.families
    assert {bucket.winner for bucket in comparison.buckets if bucket.decided} == {"flashinfer-fp8-block"}
    assert timed.flags == {"vllm": "--moe-backend flashinfer_cutlass"}
    assert [(choice.tactic, choice.gain, choice.tried) for choice in timed.profile.choices] == [
        (tactic("default"), 1.0, 1)
    ] * 2
    assert all(choice.gain > 1 for choice in triton.profile.choices)


def test_rivals_alone_are_no_tune(plant, tmp_path):
    rival = PlantedBackend({"default": 0.3}, name="flashinfer-fp8-block")
    rival.rival = True
    plant(rival, missing=("triton",))
    with pytest.raises(UnsupportedError, match="triton: there is no GPU"):
        _all(tmp_path)


def test_a_budget_is_shared_and_the_first_buckets_are_measured_however_small_it_is(plant, tmp_path):
    plant(_planted("triton", 0.5), _planted("torch", 1.5))
    events = []
    comparison = _all(tmp_path, time_budget_s=0.01, on_event=events.append)
    assert [result.backend for result in comparison.families if result.profile.choices] == ["triton", "torch"]
    assert comparison.buckets[0].rows == 4
    assert sum(isinstance(event, BucketChosen) for event in events) < 4
    with pytest.raises(UsageError, match="time budget must be positive"):
        _all(tmp_path, time_budget_s=0)


def test_without_an_able_backend_the_error_names_each_ones_reason(plant, tmp_path):
    plant(missing=("triton",))
    with pytest.raises(UnsupportedError, match="triton: there is no GPU"):
        _all(tmp_path)


@pytest.mark.slow
def test_in_a_worker_a_backend_that_kills_the_process_side_by_side_costs_only_itself(plant, tmp_path):
    backends = plant(_planted("triton", 0.5), _planted("torch", 1.5), _planted("flashinfer-cutlass", 3.0))
    regime = Regime(ep_size=2, attention_dp=True, ladder="4", draws=1)
    tune_all(LAYER, regime, tmp_path, device="cpu", isolate=False)
    backends["triton"].killing = frozenset({"best"})
    (bucket,) = tune_all(LAYER, regime, tmp_path, device="cpu").buckets
    assert (bucket.winner, bucket.runner_up) == ("torch", "flashinfer-cutlass")
    assert "SIGKILL" in bucket.failed["triton"]
