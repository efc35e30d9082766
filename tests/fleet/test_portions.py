"""How questions are split, so that every worker gets some buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_cluster import regime

from moetune.fleet.portions import PORTIONS_PER_WORKER, first_portions, portion_size


@given(st.integers(1, 10_000), st.integers(2, 1_000))
def test_there_are_enough_portions_for_all_workers_and_not_many_more(buckets, workers):
    size = portion_size(buckets, workers)
    portions = -(-buckets // size)
    assert portions <= PORTIONS_PER_WORKER * workers
    assert size == 1 or portions > PORTIONS_PER_WORKER * workers / 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_that_is_alone_gets_whole_questions(workers):
    assert portion_size(14, workers) == 14


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=40, unique=True).map(sorted), st.integers(1, 40))
def test_portions_are_neighbors_and_have_each_bucket_once(missing, size):
    portions = first_portions(3, regime(",".join(map(str, missing))), missing, size)
    assert [rows for portion in portions for rows in portion.rows] == missing
    assert all(0 < len(portion.rows) <= size for portion in portions)
    lengths = [len(portion.rows) for portion in portions]
    assert max(lengths) - min(lengths) <= 1
    assert {(portion.number, portion.adds, portion.tries) for portion in portions} == {(3, False, 0)}


def test_what_the_adaptive_ladder_adds_comes_last_unless_one_worker_gets_all():
    adaptive = regime("adaptive")
    buckets = adaptive.buckets
    (whole,) = first_portions(1, adaptive, buckets, len(buckets))
    assert (whole.rows, whole.adds) == (buckets, True)
    searched = [rows for rows in buckets if adaptive.ladder.is_searched(rows)]
    assert 0 < len(searched) < len(buckets)
    split = first_portions(1, adaptive, buckets, 4)
    assert [rows for portion in split for rows in portion.rows] == searched
    assert not any(portion.adds for portion in split)
    between = [rows for rows in buckets if rows not in searched]
    (last,) = first_portions(1, adaptive, between, 1)
    assert (list(last.rows), last.adds) == (between, True)
