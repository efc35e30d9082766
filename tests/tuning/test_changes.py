"""What differs between two profiles by their records."""

import math

import pytest
from choices import make_choice
from hypothesis import given
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import ComparedRows, Profile
from moetune.tuning.changes import changes

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
REGIME = Regime(ep_size=4, attention_dp=True, ladder="4,8,16", draws=2)


def profile(*choices, layer=LAYER, regime=REGIME, backend="triton", device="GPU", informative=None, **strict):
    environment = Environment(device=device, strict={"triton": "3.6.0", **strict}, informative=informative or {})
    return Profile(layer=layer, regime=regime, backend=backend, environment=environment, choices=choices)


def compared(rows, gain, low=None, high=None, default=0):
    low, high = low or gain, high or gain
    return ComparedRows(
        rows=rows, time_us=10.0, default_tactic={"tile": default}, gain=gain, gain_low=low, gain_high=high, noise=0.01
    )


def test_a_profile_equals_itself():
    one = profile(make_choice(4), make_choice(8))
    found = changes(one, one, "a.json", "b.json")
    assert found.equal
    assert not found.differing
    assert [bucket.state for bucket in found.buckets] == ["same", "same"]
    assert (found.a.path, found.b.path, found.a.buckets) == ("a.json", "b.json", 2)


def test_the_buckets_of_either_profile_are_listed():
    found = changes(
        profile(make_choice(4), make_choice(8)), profile(make_choice(8, tactic={"tile": 1}), make_choice(16))
    )
    assert [(bucket.rows, bucket.state) for bucket in found.buckets] == [(4, "only_a"), (8, "other"), (16, "only_b")]
    assert found.buckets[0].tactic_b is found.buckets[0].gain_b is found.buckets[2].time_a_us is None
    assert not found.equal


def test_bs_tactic_is_looked_up_in_as_record():
    a = profile(
        make_choice(4, equally_fast=({"tile": 1},), regret_high=0.006),
        make_choice(8, rejected=({"tactic": {"tile": 1}, "reason": "cliff: 3 times"},), regret_high=0.1),
    )
    b = profile(make_choice(4, tactic={"tile": 1}), make_choice(8, tactic={"tile": 1}, equally_fast=({"tile": 8},)))
    first, second = changes(a, b).buckets
    assert (first.equally_fast_in_a, first.equally_fast_in_b, first.regret_high) == (True, False, 0.006)
    assert (second.equally_fast_in_a, second.equally_fast_in_b, second.regret_high) == (False, True, None)
    assert (first.rejected_in_a, second.rejected_in_a) == ("", "cliff: 3 times")


def test_a_row_count_that_both_compared_has_the_quotient_of_the_gains():
    a = profile(make_choice(8, by_rows=(compared(6, 1.2, 1.1, 1.3), compared(8, 1.0))))
    b = profile(make_choice(8, tactic={"tile": 1}, by_rows=(compared(5, 9.0), compared(6, 1.5, 1.4, 1.6))))
    (bucket,) = changes(a, b).buckets
    (rows,) = bucket.by_rows
    assert (rows.rows, rows.gain_a, rows.gain_b) == (6, 1.2, 1.5)
    assert rows.ratio == pytest.approx(0.8)
    assert rows.ratio_low == pytest.approx(0.8 * math.exp(-math.hypot(math.log(1.2 / 1.1), math.log(1.6 / 1.5))))
    assert rows.ratio_high == pytest.approx(0.8 * math.exp(math.hypot(math.log(1.3 / 1.2), math.log(1.5 / 1.4))))


@pytest.mark.parametrize(
    "changed",
    [
        {"backend": "flashinfer-cutlass"},
        {"device": "another GPU"},
        {"regime": Regime(ep_size=8, attention_dp=True, ladder="4,8,16", draws=2)},
    ],
)
def test_times_of_another_load_kernel_or_device_have_no_ratio(changed):
    one = make_choice(8, by_rows=(compared(8, 1.2),))
    other = make_choice(8, tactic={"tile": 1}, by_rows=(compared(8, 1.5),))
    assert changes(profile(one), profile(other)).buckets[0].by_rows[0].ratio
    assert changes(profile(one), profile(other, **changed)).buckets[0].by_rows[0].ratio is None


def test_gains_over_other_defaults_have_no_ratio():
    a = profile(make_choice(8, by_rows=(compared(8, 1.2),)))
    b = profile(make_choice(8, tactic={"tile": 1}, by_rows=(compared(8, 1.5, default=7),)))
    (rows,) = changes(a, b).buckets[0].by_rows
    assert not rows.same_default
    assert rows.ratio is None


def test_versions_and_facts_differ_and_the_answer_is_equal_all_the_same():
    a = profile(make_choice(4), informative={"driver": "1", "os": "x"})
    b = profile(make_choice(4), triton="3.8.0", informative={"driver": "2", "os": "x"})
    found = changes(a, b)
    assert found.equal
    assert found.differing == {"triton": {"a": "3.6.0", "b": "3.8.0"}}
    assert found.informative == {"driver": {"a": "1", "b": "2"}}


def test_another_ladder_leaves_the_load_of_a_bucket_as_it_is():
    found = changes(profile(make_choice(4)), profile(make_choice(4), regime=REGIME.model_copy(update={"draws": 2})))
    assert found.same_load
    longer = Regime(ep_size=4, attention_dp=True, ladder="4,8", draws=2)
    found = changes(profile(make_choice(4)), profile(make_choice(4), regime=longer))
    assert found.same_load
    assert not found.equal
    assert set(found.differing) == {"ladder"}


def test_profiles_of_other_layers_are_an_error_that_names_the_options():
    other = MoELayer(**{**dict(LAYER), "hidden_size": 128, "activation": "gelu"})
    with pytest.raises(UsageError, match=r"--hidden 64 and 128, another activation\."):
        changes(profile(make_choice(4)), profile(make_choice(4), layer=other))


@given(
    st.lists(st.tuples(st.sampled_from((4, 8, 16)), st.integers(0, 2)), max_size=3, unique_by=lambda one: one[0]),
    st.lists(st.tuples(st.sampled_from((4, 8, 16)), st.integers(0, 2)), max_size=3, unique_by=lambda one: one[0]),
)
def test_the_other_way_round_the_answer_is_mirrored(mine, theirs):
    a, b = (profile(*(make_choice(rows, tactic={"tile": t}) for rows, t in sorted(one))) for one in (mine, theirs))
    there, back = changes(a, b), changes(b, a)
    mirror = {"only_a": "only_b", "only_b": "only_a", "same": "same", "other": "other"}
    assert [mirror[bucket.state] for bucket in there.buckets] == [bucket.state for bucket in back.buckets]
    assert there.equal == back.equal == (sorted(mine) == sorted(theirs))
