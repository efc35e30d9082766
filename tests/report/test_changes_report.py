import pytest
from choices import make_choice
from shown import FAST, SLOW, cut, made_profile, printed, rows_of

from moetune.report.changes import bottom_line, changes_report
from moetune.spec.regime import Regime
from moetune.store.profile import ComparedRows
from moetune.tuning.changes import TimedRows, changes

AS_FAST = {"equally_fast": (SLOW,), "regret_high": 0.006}


def compared(gain):
    return (
        ComparedRows(
            rows=8, time_us=10.0, default_tactic={"tile": 0}, gain=gain, gain_low=gain, gain_high=gain, noise=0.01
        ),
    )


def with_times(found, *faster):
    """The changes as `--measure` returns them; B takes 0.9 times as long as A in each bucket."""
    timed = {
        "time_a_us": 10.0, "time_b_us": 9.0, "ratio": 0.9, "ratio_low": 0.88, "ratio_high": 0.91, "noise": 0.01,
    }  # fmt: skip
    buckets = tuple(
        bucket.model_copy(update={"timed": (TimedRows(rows=bucket.rows, faster=one, **timed),)})
        for bucket, one in zip(found.buckets, faster, strict=True)
    )
    return found.model_copy(update={"buckets": buckets, "measured_on": "Example GPU"})


def pair(of_a, of_b, **options):
    """Both profiles have two buckets; A has `FAST` in each, B `SLOW`."""
    a = made_profile(*(make_choice(rows, tactic=FAST, **of_a) for rows in (8, 64)))
    return changes(a, made_profile(*(make_choice(rows, tactic=SLOW, **of_b) for rows in (8, 64)), **options))


def test_a_profile_and_itself_are_equal():
    one = made_profile(make_choice(8), make_choice(64))
    assert bottom_line(changes(one, one)) == "equal: the same tactic in all 2 buckets"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            pair(AS_FAST, {}),
            "2 of 2 buckets have another tactic; 2 of these are equally fast in A; there B's may be faster by at most "
            "0.6 % (95 % bound, A's records)",
        ),
        (
            pair({"by_rows": compared(1.1)}, {"by_rows": compared(1.0)}),
            "2 of 2 buckets have another tactic; by their gains over the default B takes 1.1 times as long as A",
        ),
        (
            pair({}, {}),
            "2 of 2 buckets have another tactic; the records do not say what that costs: --measure times both",
        ),
        (
            pair({}, {}, regime=Regime(ep_size=8, attention_dp=True, ladder="8,64,4096", draws=2)),
            "2 of 2 buckets have another tactic; the loads differ, so their times are not compared",
        ),
        (
            with_times(pair({}, {}), "b", None),
            "2 of 2 buckets have another tactic; B is faster in 1, A in 0, too close to call in 1; B takes 0.900 times "
            "as long as A (geometric mean)",
        ),
        (
            changes(made_profile(make_choice(8)), made_profile(make_choice(8), make_choice(64))),
            "the same tactic in the one bucket that both have; 1 bucket only in B",
        ),
        (changes(made_profile(make_choice(8)), made_profile()), "no bucket has a choice in both profiles"),
    ],
)
def test_the_last_line_says_what_the_difference_costs(found, line):
    assert bottom_line(found) == line


def test_fields_are_written_as_options():
    a = made_profile(make_choice(8), regime=Regime(ep_size=4, ladder="8"), backend="triton", triton="3.6.0")
    b = made_profile(make_choice(8), regime=Regime(ep_size=4, attention_dp=True, ladder="8"), remote="zero")
    lines = rows_of(printed(*changes_report(changes(a, b))))
    assert "differs: --no-dp in A, --dp in B" in lines
    assert "differs: --dispatch none in A, --dispatch alltoall in B" in lines
    assert "differs: no layout in A, --layout packed in B" in lines
    assert "differs: --backend triton in A, --backend torch in B" in lines
    assert "differs: no --remote in A, --remote zero in B" in lines
    assert "measured with: triton 3.6.0 in A, none in B" in lines


def test_both_tactics_of_a_bucket_are_shown_with_their_times():
    lines = rows_of(printed(*changes_report(pair(AS_FAST, {"gain": 1.5}))))
    assert "8 A 128×32×64 group=16 warps=8 stages=3 18.0 18.0 1.25× 1.50×" in lines
    assert "B 16×64×128 group=1 warps=4 stages=4" in lines
    assert "B's is equally fast in A" in lines


def test_ratios_of_the_records_and_measured_ones_have_a_table_each():
    found = pair({"by_rows": compared(1.2)}, {"by_rows": compared(1.5)})
    lines = rows_of(printed(*changes_report(found)))
    assert "8 8 1.20× 1.20–1.20 1.50× 1.50–1.50 0.800× 0.800–0.800" in lines
    lines = rows_of(printed(*changes_report(with_times(found, "b", None))))
    assert "8 8 10.0 9.00 0.900× 0.880–0.910 B" in lines
    assert "64 64 10.0 9.00 0.900× 0.880–0.910 too close to call" in lines


def test_a_reason_against_bs_tactic_and_a_failure_are_said():
    found = pair({"rejected": ({"tactic": SLOW, "reason": "cliff"},)}, {})
    text = printed(*changes_report(found))
    assert "8 rows: B's tactic could not win in A: cliff" in text
    failed = tuple(bucket.model_copy(update={"failed": {"b": "it crashed"}}) for bucket in found.buckets)
    text = printed(*changes_report(found.model_copy(update={"buckets": failed})))
    assert "64 rows: B's tactic failed: it crashed" in text


def test_it_fits_in_80_columns():
    found = pair({"by_rows": compared(1.2), **AS_FAST}, {"by_rows": compared(1.5)})
    assert not cut(changes_report(found))
    assert not cut(changes_report(with_times(found, "b", None)))
