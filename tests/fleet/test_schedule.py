"""Which worker gets which portion, and what is tried again elsewhere."""

import pytest

from moetune.fleet.portions import Portion
from moetune.fleet.schedule import TRIES, Schedule


@pytest.fixture
def schedule():
    made = Schedule()
    made.add([Portion(1, (4,)), Portion(1, (8,)), Portion(2, (4, 8))])
    return made


def test_free_workers_get_portions_in_order(schedule):
    schedule.join(1, [1, 2])
    schedule.join(2, [1, 2])
    assert [(worker, portion.rows) for worker, portion in schedule.assign()] == [(1, (4,)), (2, (8,))]
    assert list(schedule.assign()) == []
    schedule.ended(2)
    assert [(worker, portion.number) for worker, portion in schedule.assign()] == [(2, 2)]
    schedule.ended(1)
    schedule.ended(2)
    assert schedule.is_done


def test_a_worker_gets_only_questions_that_it_can_answer(schedule):
    schedule.join(1, [2])
    assert [portion.number for _, portion in schedule.assign()] == [2]
    schedule.ended(1)
    assert list(schedule.assign()) == []
    assert not schedule.is_done
    assert schedule.is_idle


def test_what_failed_is_tried_first_and_by_a_worker_that_has_not_failed_with_it(schedule):
    for worker in (1, 2):
        schedule.join(worker, [1, 2])
    list(schedule.assign())
    assert schedule.failed(1, [4])
    ((worker, portion),) = schedule.assign()
    assert (worker, portion.rows) == (1, (4, 8)), "worker 1 has failed with the portion that waits first"
    schedule.ended(2)
    ((worker, portion),) = schedule.assign()
    assert (worker, portion.rows, portion.tries) == (2, (4,), 1)
    assert not schedule.failed(2, [4]), "no worker is left that has not tried it"


def test_without_another_worker_a_failure_is_final(schedule):
    schedule.join(1, [1, 2])
    list(schedule.assign())
    assert not schedule.failed(1, [4])


def test_what_a_lost_worker_had_waits_for_another_one_at_most_so_often(schedule):
    for worker in range(1, TRIES + 1):
        schedule.join(worker, [1, 2])
        ((given_to, portion),) = schedule.assign()
        assert (given_to, portion.rows) == (worker, (4,))
        assert schedule.lost(worker, [4]) == (worker < TRIES)
    assert schedule.is_idle


def test_a_worker_that_was_left_with_its_own_failure_tries_it_again(schedule):
    schedule.join(1, [1, 2])
    schedule.join(2, [1, 2])
    list(schedule.assign())
    assert schedule.failed(1, [4])
    schedule.leave(2)
    ((worker, portion),) = schedule.assign()
    assert (worker, portion.rows, portion.tried_by) == (1, (4,), {1})


def test_waiting_portions_of_a_question_or_of_all_are_dropped(schedule):
    assert [portion.rows for portion in schedule.drop(1)] == [(4,), (8,)]
    assert [portion.number for portion in schedule.drop()] == [2]
    assert schedule.is_done
