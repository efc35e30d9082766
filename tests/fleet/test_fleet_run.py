"""A fleet's run on planted clusters: every bucket once in the store, whatever workers are lost."""

import tempfile
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_cluster import (
    BACKEND,
    CROSSOVER,
    H100,
    H200,
    PlantedCluster,
    Told,
    planted_choice,
    questions_of,
    stored,
)

from moetune.errors import NotSavedError, StoreError
from moetune.fleet.fleet import Fleet
from moetune.fleet.run import run
from moetune.fleet.schedule import TRIES
from moetune.spec.ladder import Ladder
from moetune.store.store import Store
from moetune.tuning.events import BucketChosen, BucketFailed, NotSaved, Served

TWELVE = ["4,8"] * 12


def answered(cluster, folder, *ladders):
    """Runs questions with these ladders, and returns them with what was reported."""
    fleet, told = Fleet(cluster, [BACKEND]), Told()
    questions = questions_of(fleet, folder, *ladders)
    run(questions, fleet, *told.listeners)
    assert sorted(told.answers) == sorted(questions)
    return questions, told


def test_twelve_questions_on_three_workers_of_which_one_is_lost_are_all_answered_once(tmp_path):
    turn = count()
    cluster = PlantedCluster([H100] * 3, lost_after={2: 4}, pick=lambda busy: busy[next(turn) % len(busy)])
    questions, told = answered(cluster, tmp_path, *TWELVE)
    assert [(told.answers[n].tuned, told.answers[n].failed) for n in questions] == [(2, "")] * 12
    assert max(Counter(cluster.delivered).values()) == 1
    assert len(cluster.delivered) == 24
    for number, question in questions.items():
        assert stored(question).choices == (planted_choice(4), planted_choice(8))
        assert told.answers[number].profile == stored(question)
        assert Path(told.answers[number].path).exists()
        counts = [(e.index, e.count) for n, e in told.events if n == number and isinstance(e, BucketChosen)]
        assert counts == [(0, 2), (1, 2)]
    (note,) = told.notes
    assert note.startswith("worker 2 is lost: its machine has gone. 1 bucket")
    assert {worker for worker, _ in cluster.orders} == {1, 2, 3}
    assert not list(tmp_path.rglob("*.journal.jsonl"))


@settings(max_examples=60)
@given(st.data())
def test_whoever_is_lost_and_whoever_reports_next_each_bucket_is_stored_once_or_its_question_failed(data):
    workers = data.draw(st.integers(1, 4))
    environments = data.draw(st.lists(st.sampled_from([H100, H200]), min_size=workers, max_size=workers))
    cluster = PlantedCluster(
        environments,
        lost_after=data.draw(st.dictionaries(st.integers(1, 8), st.integers(0, 9), max_size=6)),
        failing=data.draw(st.dictionaries(st.integers(1, 4), st.lists(st.sampled_from([1, 2, 4]), max_size=2))),
        replaced=data.draw(st.integers(0, 4)),
        pick=lambda busy: data.draw(st.sampled_from(busy)),
    )
    ladders = data.draw(st.lists(st.sampled_from(["1", "1,2,4", "1,2,4,8,16,32,64,128"]), min_size=1, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        questions, told = answered(cluster, Path(folder), *ladders)
        assert max(Counter(cluster.delivered).values(), default=1) == 1
        for number, question in questions.items():
            answer = told.answers[number]
            rows = {rows for digest, rows in cluster.delivered if digest == _digest(question)}
            assert answer.tuned == len(rows)
            if not answer.failed:
                assert rows == set(question.regime.buckets)
            if rows:
                assert {choice.rows for choice in stored(question).choices} == rows
    tries = Counter((order.regime.digest, order.environment, order.rows) for _, order in cluster.orders)
    assert max(tries.values()) <= TRIES


def _digest(question):
    return question.regime.digest + question.environment.digest


def test_the_buckets_of_one_question_are_spread_over_all_workers(tmp_path):
    cluster = PlantedCluster([H100] * 4)
    _, told = answered(cluster, tmp_path, "1,2,4,8,16,32,64,128")
    assert {worker for worker, _ in cluster.orders} == {1, 2, 3, 4}
    assert [order.rows for _, order in cluster.orders] == [(1,), (2,), (4,), (8,), (16,), (32,), (64,), (128,)]
    assert told.starts[0] == (1, "worker 1, 1 bucket from 1 rows")
    assert cluster.orders[-1][1].known.choices, "later searches begin with what is known by then"


def test_each_environment_has_its_own_profile(tmp_path):
    cluster = PlantedCluster([H100, H200, H200])
    questions, _ = answered(cluster, tmp_path, "4,8")
    assert len(questions) == 2
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("planted-*.json")} == {"H100", "H200"}


def test_what_is_stored_is_not_measured_again(tmp_path):
    questions, _ = answered(PlantedCluster([H100]), tmp_path, "4,8")
    store = Store(tmp_path, packaged=tmp_path / "none")
    (question,) = questions.values()
    Path(store.path(question.layer, question.regime, "planted", H100)).unlink()
    store.save(question.profile(planted_choice(4)))
    cluster = PlantedCluster([H100] * 2)
    _, told = answered(cluster, tmp_path, "4,8", "4,8")
    assert [order.rows for _, order in cluster.orders if order.regime == question.regime] == [(8,)]
    again = PlantedCluster([H100])
    _, told = answered(again, tmp_path, "4,8", "4,8")
    assert not again.orders
    assert [type(event) for _, event in told.events] == [Served, Served]
    assert [answer.tuned for answer in told.answers.values()] == [0, 0]


def test_the_adaptive_ladder_is_split_and_completed(tmp_path):
    cluster = PlantedCluster([H100] * 3)
    questions, told = answered(cluster, tmp_path, "adaptive", "adaptive")
    for question in questions.values():
        rows = {choice.rows for choice in stored(question).choices}
        assert set(question.regime.buckets) < rows, "buckets are added where the choices differ"
        assert not any(rows in question.regime.buckets for rows in rows - set(question.regime.buckets))
        assert min(abs(rows - CROSSOVER) for rows in rows) <= 0.2 * CROSSOVER
    last = [order for _, order in cluster.orders if order.adds]
    assert len(last) == 2
    searched = {rows for rows in questions[1].regime.buckets if Ladder(name="adaptive").is_searched(rows)}
    assert all(searched <= {choice.rows for choice in order.known.choices} for order in last)
    assert not any(answer.failed for answer in told.answers.values())


def test_a_bucket_that_fails_is_tried_elsewhere(tmp_path):
    cluster = PlantedCluster([H100] * 2, failing={1: [4]})
    questions, told = answered(cluster, tmp_path, "4,8")
    assert stored(questions[1]).choices == (planted_choice(4), planted_choice(8))
    assert told.answers[1].failed == ""
    assert any(isinstance(event, BucketFailed) for _, event in told.events)
    assert told.notes == [
        "worker 1 failed: The default failed at 4 rows. 1 bucket of question 1 will be tried elsewhere."
    ]


def test_a_bucket_that_fails_everywhere_costs_only_its_question(tmp_path):
    cluster = PlantedCluster([H100] * 2, failing={1: [4], 2: [4]})
    questions, told = answered(cluster, tmp_path, "4,8", "8,16")
    assert told.answers[1].failed == "The default failed at 4 rows."
    assert stored(questions[1]).choices == (planted_choice(8),)
    assert (told.answers[2].failed, told.answers[2].tuned) == ("", 2)


def test_without_a_worker_the_questions_fail_and_what_was_measured_is_saved(tmp_path):
    cluster = PlantedCluster([H100], lost_after={1: 1})
    questions, told = answered(cluster, tmp_path, "4,8", "16")
    assert "No worker is left that can tune it at 8 rows." in told.answers[1].failed
    assert "at 16 rows" in told.answers[2].failed
    assert stored(questions[1]).choices == (planted_choice(4),)


def test_workers_that_are_lost_with_one_portion_again_and_again_end_it(tmp_path):
    cluster = PlantedCluster([H100], lost_after=dict.fromkeys(range(1, TRIES + 1), 0), replaced=9)
    _, told = answered(cluster, tmp_path, "4", "8")
    assert f"were lost {TRIES} times" in told.answers[1].failed
    assert told.answers[2].failed == ""
    assert "worker 2 joins." in told.notes


def test_a_worker_that_joins_with_another_moetune_is_not_used(tmp_path):
    cluster = PlantedCluster([H100] * 2, lost_after={1: 0}, replaced=1, versions={3: "0.0.1"})
    answered(cluster, tmp_path, *TWELVE)
    assert {worker for worker, _ in cluster.orders} == {1, 2}


def test_an_interrupt_leaves_what_was_measured(tmp_path):
    cluster = PlantedCluster([H100] * 2)
    fleet, told = Fleet(cluster, [BACKEND]), Told()
    questions = questions_of(fleet, tmp_path, *TWELVE)
    receive = cluster.receive

    def interrupted():
        if len(cluster.delivered) == 5:
            raise KeyboardInterrupt
        return receive()

    cluster.receive = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(questions, fleet, *told.listeners)
    kept = list(tmp_path.rglob("planted-*.json"))
    assert sum(path.read_text().count('"measured_at"') for path in kept) == 5
    cluster.receive = receive
    resumed = PlantedCluster([H100] * 2)
    answered(resumed, tmp_path, *TWELVE)
    assert len(resumed.delivered) == 24 - 5


def test_a_store_that_cannot_be_written_fails_its_question_before_anything_is_measured(tmp_path, monkeypatch):
    def refuse(*_):
        raise StoreError("The disk is full.", "Free some.")

    monkeypatch.setattr(Store, "ensure_writable", refuse)
    cluster = PlantedCluster([H100] * 2)
    _, told = answered(cluster, tmp_path, "4,8", "8")
    assert not cluster.orders
    assert [answer.failed for answer in told.answers.values()] == ["The disk is full. Free some."] * 2


def test_choices_that_cannot_be_saved_are_saved_later(tmp_path, monkeypatch):
    real, refused = Store.save, []

    def save(self, profile, **options):
        if len(refused) < 2:
            refused.append(profile)
            raise StoreError("The disk is full.", "Free some.")
        return real(self, profile, **options)

    monkeypatch.setattr(Store, "save", save)
    questions, told = answered(PlantedCluster([H100]), tmp_path, "4,8,16")
    assert told.answers[1].failed == ""
    assert len(stored(questions[1]).choices) == 3
    assert sum(isinstance(event, NotSaved) for _, event in told.events) == 2


def test_choices_that_can_never_be_saved_are_a_failure_of_their_question(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise StoreError("The disk is full.", "Free some.")

    monkeypatch.setattr(Store, "save", refuse)
    _, told = answered(PlantedCluster([H100]), tmp_path, "4,8")
    assert told.answers[1].failed.startswith("What was measured is not saved, at 4, 8 rows.")


def test_an_interrupt_names_what_is_not_saved(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise StoreError("The disk is full.", "Free some.")

    monkeypatch.setattr(Store, "save", refuse)
    cluster = PlantedCluster([H100])
    fleet, told = Fleet(cluster, [BACKEND]), Told()
    receive = cluster.receive

    def interrupted():
        if cluster.delivered:
            raise KeyboardInterrupt
        return receive()

    cluster.receive = interrupted
    with pytest.raises(NotSavedError):
        run(questions_of(fleet, tmp_path, "4,8"), fleet, *told.listeners)


def test_a_profile_that_is_damaged_meanwhile_is_moved_aside_and_written_anew(tmp_path):
    cluster = PlantedCluster([H100])
    fleet, told = Fleet(cluster, [BACKEND]), Told()
    questions = questions_of(fleet, tmp_path, "4,8,16")
    receive = cluster.receive

    def damaging():
        if len(cluster.delivered) == 1:
            (path,) = tmp_path.rglob("planted-*.json")
            path.write_text("{")
        return receive()

    cluster.receive = damaging
    run(questions, fleet, *told.listeners)
    assert [choice.rows for choice in stored(questions[1]).choices] == [4, 8, 16]
    (note,) = told.notes
    assert ".damaged-1" in note
    assert told.answers[1].profile == stored(questions[1])
