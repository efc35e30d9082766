"""Each engine's buckets and look-up rule."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.spec.ladder import ADAPTIVE_STEP, VLLM_BUCKETS, Ladder
from moetune.spec.regime import Regime

MAXIMA = st.integers(1, 20_000)


def test_tensorrt_llm_tunes_powers_of_two_to_8192():
    assert Ladder().buckets(8192) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    assert Ladder().buckets(100) == (1, 2, 4, 8, 16, 32, 64)


def test_tensorrt_llm_adds_a_larger_maximum_and_no_other_bucket_above_8192():
    assert Ladder().buckets(20_000)[-2:] == (8192, 20_000)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 2), (300, 256), (8191, 4096), (9000, 8192), (10**6, 8192)])
def test_tensorrt_llm_rounds_down_and_stays_at_the_last_bucket(rows, bucket):
    assert Ladder().lookup(rows, 8192) == bucket


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [(8191, 4096), (8192, 8192), (8193, 20_000), (15_000, 20_000), (20_000, 20_000), (10**6, 20_000)],
)
def test_tensorrt_llm_takes_a_larger_maximum_for_all_rows_past_8192(rows, bucket):
    assert Ladder().lookup(rows, 20_000) == bucket
    assert Ladder.parse("pow2/8").lookup(8 * rows + 7, 20_000) == bucket


@given(rows=st.integers(1, 300_000), maximum=st.integers(1, 40_000), ep_size=st.sampled_from([1, 2, 8, 72]))
def test_pow2_is_tensorrt_llms_rule(rows, maximum, ep_size):
    """`round_rule` of its trtllm-gen MoE runners, its buckets cut at a maximum below 8192 as everywhere here."""
    deflated = rows // ep_size
    if deflated > 8192 and maximum > 8192:
        expected = maximum
    else:
        expected = min(1 << (max(1, deflated).bit_length() - 1), 8192, 1 << (maximum.bit_length() - 1))
    assert Ladder.parse(f"pow2/{ep_size}").lookup(rows, maximum) == expected


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (7, 1), (16, 2), (2400, 256), (65536, 8192), (10**6, 8192)])
def test_tensorrt_llm_divides_the_pool_by_ep_first(rows, bucket):
    assert Ladder.parse("pow2/8").lookup(rows, 8192) == bucket


@pytest.mark.parametrize(("maximum", "count"), [(8192, 21), (65536, 24), (10_000, 22)])
def test_flashinfer_has_as_many_hybrid_buckets_as_documented(maximum, count):
    assert len(Ladder.parse("hybrid").buckets(maximum)) == count


def test_hybrid_is_the_installed_flashinfers_rule():
    utils = pytest.importorskip("flashinfer.fused_moe.utils")
    ladder = Ladder.parse("hybrid")
    for maximum in (1, 2, 3, 100, 255, 256, 257, 300, 2000, 2048, 2049, 4000, 4097, 8192, 10_000, 65_536):
        assert ladder.buckets(maximum) == tuple(sorted(set(utils.get_hybrid_num_tokens_buckets(maximum)))), maximum
        for rows in (*range(1, 520), *range(520, 12_000, 97), 65_535, 65_536, 100_000):
            assert ladder.lookup(rows, maximum) == utils.map_to_hybrid_bucket(rows, maximum), (rows, maximum)


def test_flashinfer_misses_between_64_and_a_maximum_of_100():
    ladder = Ladder.parse("hybrid")
    assert [rows for rows in range(1, 200) if ladder.lookup(rows, 100) not in ladder.buckets(100)] == list(
        range(65, 100)
    )


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (3, 2), (6, 4), (12, 8), (13, 16), (20, 16), (21, 24), (1280, 1024), (10**6, 4096)]
)
def test_vllm_takes_the_nearest_bucket_and_the_smaller_of_two_equally_near(rows, bucket):
    assert Ladder.parse("vllm").lookup(rows, 8192) == bucket


def test_vllm_tunes_its_own_list():
    assert Ladder.parse("vllm").buckets(8192) == VLLM_BUCKETS
    assert Ladder.parse("vllm").buckets(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96)


def test_adaptive_begins_with_vllms_list_and_no_two_buckets_are_far_apart():
    ladder = Ladder.parse("adaptive")
    buckets = ladder.buckets(8192)
    assert set(VLLM_BUCKETS) < set(buckets)
    assert all(ladder.is_searched(bucket) == (bucket in VLLM_BUCKETS) for bucket in buckets)
    for lower, upper in pairwise(buckets):
        assert upper <= max(1.5 * lower, lower + 2)


@given(st.integers(1, 8192))
def test_a_bucket_of_adaptive_serves_rows_within_half_a_step(bucket):
    served = Ladder.parse("adaptive").served(bucket, 8192)
    assert bucket in served
    assert served[-1] <= ADAPTIVE_STEP**0.5 * bucket
    assert served[0] >= bucket / ADAPTIVE_STEP**0.5


def test_a_list_rounds_up_and_stays_at_its_last_bucket():
    ladder = Ladder.parse("1,10,100")
    assert [ladder.lookup(rows, 100) for rows in (1, 2, 10, 11, 100, 101)] == [1, 10, 10, 100, 100, 100]


@given(
    spelled=st.sampled_from(["pow2", "vllm", "adaptive", "1,2,4", "1", "3,70,900", "pow2/8", "vllm/3"]),
    maximum=MAXIMA,
    rows=st.integers(1, 100_000),
)
def test_a_lookup_ends_at_a_bucket(spelled, maximum, rows):
    ladder = Ladder.parse(spelled)
    buckets = ladder.buckets(maximum)
    if buckets:
        assert ladder.lookup(rows, maximum) in buckets
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] <= maximum


@given(spelled=st.sampled_from(["pow2", "vllm", "adaptive", "1,2,4", "hybrid"]), maximum=MAXIMA)
def test_a_bucket_looks_itself_up(spelled, maximum):
    ladder = Ladder.parse(spelled)
    for bucket in ladder.buckets(maximum):
        assert ladder.lookup(bucket, maximum) == bucket


@given(spelled=st.sampled_from(["pow2", "vllm", "1,2,4", "3,70,900", "hybrid", "pow2/8"]), maximum=MAXIMA)
def test_served_are_the_rows_in_the_kernel_that_look_a_bucket_up(spelled, maximum):
    ladder = Ladder.parse(spelled)
    for bucket in ladder.buckets(maximum):
        served = ladder.served(bucket, maximum)
        edges = {*served[:1], *served[-1:], *({bucket} if served else ())}
        assert {ladder.lookup(rows * ladder.divisor, maximum) for rows in edges} <= {bucket}
        for rows in (served.start - 1, served.stop):
            outside = ladder.rounding == "nearest" and bucket == ladder.buckets(maximum)[-1] and rows == served.stop
            if served and 1 <= rows <= maximum and not outside:
                assert ladder.lookup(rows * ladder.divisor, maximum) != bucket


@pytest.mark.parametrize(
    ("spelled", "bucket", "first", "last"),
    [
        ("hybrid", 512, 257, 512),
        ("pow2", 512, 512, 1023),
        ("vllm", 24, 21, 28),
        ("vllm", 4096, 3585, 4607),  # all larger ones look it up too
        ("3,70,900", 70, 4, 70),
        ("pow2/8", 512, 512, 1023),
    ],
)
def test_served_rows_of_each_rule(spelled, bucket, first, last):
    assert Ladder.parse(spelled).served(bucket, 8192) == range(first, last + 1)


def test_below_a_maximum_that_is_no_power_of_two_flashinfer_looks_above_it():
    hybrid = Ladder.parse("hybrid")
    assert hybrid.served(100, 100) == range(100, 101)
    assert hybrid.served(64, 100) == range(33, 65)
    assert hybrid.served(5000, 5000) == range(4097, 5001)


@pytest.mark.parametrize("spelled", ["pow2", "hybrid", "vllm", "adaptive", "1,2,4", "pow2/8", "1,5/2"])
def test_a_spelling_round_trips(spelled):
    assert str(Ladder.parse(spelled)) == spelled
    assert Ladder.parse(str(Ladder.parse(spelled))) == Ladder.parse(spelled)


def test_case_and_spaces_are_no_difference():
    assert Ladder.parse(" POW2 ") == Ladder()
    assert Ladder.parse("1, 2 ,4") == Ladder.parse([1, 2, 4])


@pytest.mark.parametrize(
    "spelled",
    ["", "pow3", "4,2", "1,1", "0,1", "-1,2", "1,,2", "1.5", "pow2/", "pow2/0", "pow2/x", [], [2, 1], [1.5], "1;2"],
)
def test_a_bad_ladder_is_a_one_line_usage_error(spelled):
    with pytest.raises(UsageError) as error:
        Ladder.parse(spelled)
    assert "\n" not in str(error.value)
    assert "ladder" in str(error.value).lower()


@given(divisor=st.integers(1, 64), maximum=MAXIMA)
def test_the_coarser_ladder_has_some_of_the_buckets_and_the_same_rule(divisor, maximum):
    ladder = Ladder(name="adaptive", divisor=divisor)
    coarser = ladder.coarser
    assert coarser == Ladder(name="vllm", divisor=divisor)
    assert set(coarser.buckets(maximum)) <= set(ladder.buckets(maximum))
    assert coarser.rounding == ladder.rounding
    assert coarser.coarser is None


@pytest.mark.parametrize("spelled", ["pow2", "hybrid", "vllm", "1,2,4"])
def test_no_other_ladder_has_a_coarser_one(spelled):
    assert Ladder.parse(spelled).coarser is None
    assert Regime(ladder=spelled).coarser is None
