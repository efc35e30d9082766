"""Equal questions of several jobs are one; a plan of them says what is stored and what the rest costs."""

from datetime import UTC, datetime, timedelta

import pytest
from choices import make_choice
from hypothesis import given
from hypothesis import strategies as st
from planted import LAYER, PlantedBackend
from runs import REGIME, tune_planted

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.store.store import Store
from moetune.tuning.batch import BatchJob, joined_questions, planned
from moetune.tuning.batch_cost import NEWEST, recorded_s, wall_s
from moetune.tuning.question import Question

BACKEND = PlantedBackend({"default": 1.0, "fast": 0.5})
OTHER = Regime(ep_size=4, attention_dp=True, ladder="4", draws=1)


def question(folder, layer=LAYER, regime=REGIME, backend=BACKEND):
    return Question.of(layer, regime, backend, Store(folder, packaged=folder / "none"), "cpu")


def dated(*seconds, backend="planted", device="GPU", day=1):
    """A profile whose choices were made at these seconds of a day."""
    began = datetime(2026, 1, day, tzinfo=UTC)
    choices = [
        make_choice(rows, measured_at=(began + timedelta(seconds=after)).isoformat())
        for rows, after in zip((4, 8, 16, 32), seconds, strict=False)
    ]
    regime = Regime(ep_size=2, attention_dp=True, ladder="4,8,16,32", draws=4)
    return Profile(
        layer=LAYER, regime=regime, backend=backend, environment=Environment(device=device, strict={}), choices=choices
    )


def test_questions_that_differ_in_a_layers_name_only_are_one(tmp_path):
    same = MoELayer(**{**dict(LAYER), "name": "another name"})
    wider = MoELayer(**{**dict(LAYER), "hidden_size": 8})
    other = PlantedBackend({"default": 1.0}, name="other")
    questions, of_jobs = joined_questions(
        [
            [question(tmp_path), question(tmp_path, regime=OTHER)],
            [question(tmp_path, regime=OTHER), question(tmp_path, same)],
            [],
            [question(tmp_path, wider), question(tmp_path, backend=other)],
        ]
    )
    assert of_jobs == [(1, 2), (2, 1), (), (3, 4)]
    assert [(each.layer.hidden_size, each.regime.ep_size, each.backend.name) for each in questions] == [
        (4, 2, "planted"), (4, 4, "planted"), (8, 2, "planted"), (4, 2, "other"),
    ]  # fmt: skip


def test_a_plan_says_what_is_stored_and_what_is_missing(tmp_path, plant):
    plant(milliseconds={"default": 1.0, "fast": 0.5})
    tune_planted(store=tmp_path)
    asked = [question(tmp_path), question(tmp_path, regime=OTHER)]
    found = planned(asked, [BatchJob(number=1, words=("a",), questions=(1, 2))], "jobs.yaml", ("cpu",))
    first, second = found.questions
    assert (first.stored_buckets, first.missing_buckets, first.estimated_s) == (2, 0, 0.0)
    assert first.path.startswith(str(tmp_path))
    assert first.gain == pytest.approx(2, rel=0.05)
    assert (second.stored_buckets, second.missing_buckets, second.path, second.gain) == (0, 1, "", None)
    assert second.estimated_s is not None
    assert found.estimated_s == second.estimated_s
    assert found.dry_run
    assert not found.failures


def test_a_plan_of_nothing_costs_nothing():
    found = planned([], [BatchJob(number=1, words=(), failed="it is no job")], "jobs.yaml", ("cpu",))
    assert (found.estimated_s, found.estimated_wall_s, found.failures) == (0, 0, 1)


def test_a_job_fails_with_any_of_its_questions(tmp_path):
    asked = [question(tmp_path), question(tmp_path, regime=OTHER)]
    jobs = [BatchJob(number=n, words=(), questions=numbers) for n, numbers in enumerate([(1,), (1, 2), (2,)], 1)]
    found = planned(asked, jobs, "jobs.yaml", ("cpu",))
    failed = found.questions[1].model_copy(update={"state": "failed", "failed": "out of memory"})
    assert found.model_copy(update={"questions": (found.questions[0], failed)}).failures == 2


def test_a_bucket_takes_as_long_as_recorded_on_the_device_or_else_anywhere():
    profiles = [dated(0, 3, 6), dated(0, 5, device="slow"), dated(0, 50, backend="other")]
    assert recorded_s(profiles, "planted", "GPU") == 3
    assert recorded_s(profiles, "planted", "slow") == 5
    assert recorded_s(profiles, "planted", "new") == pytest.approx(11 / 3)
    assert recorded_s(profiles, "unknown", "GPU") is None
    assert recorded_s([dated(7)], "planted", "GPU") is None


def test_only_the_newest_profiles_count():
    older = [dated(0, 60, day=1) for _ in range(5)]
    assert recorded_s([*older, *(dated(0, 4, day=2) for _ in range(NEWEST))], "planted", "GPU") == 4


def test_a_pause_between_two_runs_is_not_counted():
    assert recorded_s([dated(0, 2, 4000, 4004)], "planted", "GPU") == 3


@given(st.lists(st.floats(0, 1000), max_size=20), st.integers(1, 9))
def test_several_devices_share_the_work(costs, devices):
    wall = wall_s(costs, devices)
    longest = max(costs, default=0.0)
    least = max(sum(costs) / devices, longest)
    assert least - 1e-6 <= wall <= sum(costs) / devices + longest + 1e-6
    assert wall_s(costs, 1) == pytest.approx(sum(costs))
