"""The default and the finalists are timed in interleaved rounds until one is the fastest."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import tactic
from scripted import (
    DEFAULT,
    GOOD,
    NEXT,
    POOR,
    TIED,
    TO_THE_END,
    Drifting,
    Scripted,
    Uneven,
    Unsteady,
    compare,
)

from moetune.errors import NoResultError
from moetune.stats import paired_ratio
from moetune.tuning import final_comparison as final_module
from moetune.tuning.final_comparison import OPENING, SAMPLES, _num_rounds
from moetune.tuning.verdict import decide


def test_rounds_in_which_the_default_disagrees_with_itself_are_dropped_for_all_alike():
    bench = Scripted(lambda number: 5.0 if number % 3 == 0 else 1.0)
    final = compare(bench, tactic("default"), [tactic("other")])
    assert set(final.finalists[tactic("other")]) == {9.0}
    assert set(final.default_us) == {10.0}
    assert len(final.default_us) == len(final.finalists[tactic("other")]) >= 20
    assert final.noise == 0


def test_where_nearly_every_round_is_disturbed_all_count_and_the_noise_says_so():
    bench = Scripted(lambda number: 1.0 if number % 100 == 0 else 5.0)
    final = compare(bench, tactic("default"), [tactic("other")])
    assert len(final.draws) == len(final.default_us) == bench.rounds > 2 * SAMPLES[1]
    assert final.noise > 1


def test_a_finalist_that_fails_when_sampling_is_prolonged_costs_only_itself():
    bench = Scripted(lambda number: 5.0 if 6 < number < 120 else 1.0, fails=(tactic("other"), 100))
    final = compare(bench, tactic("default"), [tactic("steady"), tactic("other")])
    assert bench.rounds > 120
    assert final.finalists.keys() == {tactic("steady")}
    assert len(final.finalists[tactic("steady")]) == len(final.default_us)


def test_sampling_that_is_not_settled_takes_the_most_rounds_and_each_draw_as_often():
    bench = Uneven({DEFAULT: (10.0, 10.0), **TIED})
    final = compare(bench, DEFAULT, [GOOD, NEXT], seconds=1e-6)
    assert final.draws == TO_THE_END
    for tied in TIED:
        assert final.finalists[tied] == tuple(bench.once_us(tied, draw) for draw in final.draws)


def test_tactics_that_cannot_be_the_fastest_are_dropped():
    bench = Uneven({DEFAULT: (11.0, 11.0), POOR: (10.2, 10.2), **TIED})
    final = compare(bench, DEFAULT, [GOOD, NEXT, POOR], seconds=1e-6)
    assert len(final.default_us) == len(final.finalists[POOR]) == SAMPLES[0]
    assert bench.rounds[POOR] == SAMPLES[0]
    assert len(final.finalists[GOOD]) == len(final.finalists[NEXT]) == SAMPLES[1]
    assert decide([final], final.default).tactic in TIED


@pytest.mark.parametrize("good_us", [9.0, 10.0, 10.03], ids=["ahead", "tied", "not worth it"])
def test_settled_sampling_ends(good_us):
    bench = Uneven({DEFAULT: (10.0, 10.0), GOOD: (good_us, good_us)}, spread=1e-3)
    final = compare(bench, DEFAULT, [GOOD], seconds=1e-6)
    assert len(final.draws) == SAMPLES[0]


def test_a_default_that_is_much_slower_is_dropped_too():
    final = compare(Uneven({DEFAULT: (50.0, 50.0), **TIED}), DEFAULT, [GOOD, NEXT], seconds=1e-6)
    assert len(final.default_us) == OPENING
    assert final.draws == TO_THE_END


@pytest.mark.parametrize(("default_us", "best"), [(50.0, NEXT), (10.4, GOOD)])
def test_the_opening_counts_for_the_remaining_tactics_only_if_the_default_remains(default_us, best):
    bench = Unsteady({DEFAULT: (default_us, default_us), GOOD: (9.9, 9.9), NEXT: (9.8, 9.8)}, spread=1e-3)
    final = compare(bench, DEFAULT, [NEXT, GOOD], most_s=0.0)
    assert final.opening == (OPENING if default_us == 50.0 else 0)
    assert len(final.finalists[GOOD]) == len(final.finalists[NEXT]) == SAMPLES[0]
    assert sum(final.finalists[GOOD]) < sum(final.finalists[NEXT])
    assert decide([final], final.default).tactic == best


@pytest.mark.parametrize(("default_us", "call"), [(9.5, 2), (9.5, 3), (50.0, 3), (50.0, 4)])
@pytest.mark.parametrize("failing", TIED)
def test_a_tactic_that_fails_while_sampling_is_prolonged_costs_only_itself(default_us, call, failing):
    bench = Uneven({DEFAULT: (default_us, default_us), **TIED}, fails=(failing, call))
    final = compare(bench, DEFAULT, [GOOD, NEXT], seconds=1e-6)
    assert bench.failures.keys() == {failing}
    assert final.finalists.keys() == TIED.keys() - {failing}
    assert all(len(series) == len(final.draws) for series in final.finalists.values())
    assert decide([final], final.default).tactic != failing


def test_a_default_that_fails_while_sampling_is_prolonged_leaves_no_result():
    bench = Uneven({DEFAULT: (9.0, 10.0), GOOD: (10.0, 9.0)}, fails=(DEFAULT, 3))
    with pytest.raises(NoResultError, match="planted"):
        compare(bench, DEFAULT, [GOOD], seconds=1e-6)


@given(st.lists(st.floats(8, 12), min_size=2, max_size=7), st.floats(0, 0.1), st.floats(0, 0.01))
@settings(max_examples=50)
def test_the_winner_is_by_the_samples_at_most_as_much_slower_as_is_settled(us, spread, seconds):
    tactics = [tactic(f"number {number}") for number in range(len(us))]
    bench = Uneven({one: (its_us, its_us) for one, its_us in zip(tactics, us, strict=True)}, spread)
    final = compare(bench, tactics[0], tactics[1:], seconds=seconds)
    everyone = {final.default: final.default_us, **final.finalists}
    assert SAMPLES[0] <= len(final.draws) <= SAMPLES[1]
    assert all(
        series == tuple(bench.once_us(t, d) for d in final.draws[: len(series)]) for t, series in everyone.items()
    )
    stayed = [series for series in everyone.values() if len(series) == len(final.draws)]
    leader = min(stayed, key=sum)
    if len(final.draws) < SAMPLES[1]:
        assert all(paired_ratio(series, leader).low >= 1 - final_module.SETTLED for series in stayed)
    for series in everyone.values():
        if len(series) < len(final.draws):
            assert min(sum(other[: len(series)]) for other in stayed) < sum(series)


def test_a_few_disturbed_rounds_do_not_prolong_a_final():
    bench = Scripted(lambda number: 5.0 if number % 10 == 0 else 1.0)
    final = compare(bench, DEFAULT, [GOOD], seconds=3e-3)
    assert SAMPLES[1] <= bench.rounds <= SAMPLES[1] + OPENING
    assert set(final.default_us) == {10.0}
    assert len(final.draws) == len(final.default_us) < SAMPLES[1]


@pytest.mark.parametrize(("round_us", "budget_us", "rounds"), [(10.0, 0.0, 20), (10.0, 1e6, 96), (2e4, 1e6, 50)])
def test_a_final_has_as_many_rounds_as_its_time_allows(round_us, budget_us, rounds):
    assert _num_rounds(round_us, budget_us) == rounds


@pytest.mark.parametrize(("most_s", "rounds"), [(None, SAMPLES[1]), (2.1e-3, 70), (0.0, SAMPLES[0])])
@pytest.mark.parametrize("default_us", [10.0, 50.0])
def test_sampling_is_prolonged_for_so_long_at_most(most_s, rounds, default_us):
    """A round takes 30 µs: two that are tied, and one of them again; or the default with them, which is as fast."""
    bench = Uneven({DEFAULT: (default_us, default_us), GOOD: (9.0, 11.0), NEXT: (11.0, 9.0)})
    in_a_round = 3 if default_us == 50.0 else 4
    final = compare(bench, DEFAULT, [GOOD, NEXT], seconds=1e-6, most_s=most_s and most_s * in_a_round / 3)
    assert len(final.draws) == rounds


def test_a_final_has_no_more_time_before_it_is_prolonged_than_in_all():
    bench = Uneven({DEFAULT: (50.0, 50.0), **TIED})
    assert len(compare(bench, DEFAULT, [GOOD, NEXT], seconds=1.0, most_s=0.0).draws) == SAMPLES[0]


def test_a_default_that_is_much_slower_is_timed_in_the_opening_only_and_so_are_slow_finalists():
    bench = Drifting({DEFAULT: 50.0, GOOD: 10.0, NEXT: 10.2, POOR: 12.0})
    final = compare(bench, DEFAULT, [NEXT, GOOD, POOR])
    assert len(final.default_us) == len(final.finalists[POOR]) == OPENING
    assert len(final.finalists[GOOD]) == len(final.finalists[NEXT]) == SAMPLES[1]
    assert bench.timed[DEFAULT] == bench.timed[POOR] == OPENING
    verdict = decide([final], final.default)
    assert verdict.tactic == GOOD
    assert verdict.gains[0].value == pytest.approx(5.0, rel=0.01)
    assert 0 < final.noise < 0.01


def test_the_noise_of_such_a_final_is_that_of_its_leader():
    quiet = compare(Drifting({DEFAULT: 50.0, GOOD: 10.0}), DEFAULT, [GOOD])
    torn = compare(Drifting({DEFAULT: 50.0, GOOD: 10.0}, apart=1.1), DEFAULT, [GOOD])
    assert quiet.noise < 0.01
    assert torn.noise == pytest.approx(0.1, abs=0.01)


def test_a_default_that_is_nearly_as_fast_is_timed_twice():
    bench = Drifting({DEFAULT: 10.0, GOOD: 9.0}, apart=1.1)
    final = compare(bench, DEFAULT, [GOOD])
    assert final.noise == pytest.approx(0.1, abs=0.01)
    assert bench.timed[DEFAULT] == 2 * len(final.draws) - 1  # who it is is known after the first round
    assert bench.timed[GOOD] == len(final.draws) + 1


@pytest.mark.parametrize("hiccup", [DEFAULT, GOOD, NEXT, None])
def test_a_tactic_that_only_a_hiccup_made_slower_is_not_dropped(hiccup):
    bench = Drifting({DEFAULT: 10.0, GOOD: 9.0, NEXT: 9.1, POOR: 12.0}, hiccup=hiccup)
    final = compare(bench, DEFAULT, [GOOD, NEXT, POOR])
    assert len(final.default_us) == len(final.finalists[GOOD]) == len(final.finalists[NEXT]) >= SAMPLES[1] - 2
    assert len(final.finalists[POOR]) <= OPENING or hiccup == GOOD
    assert decide([final], final.default).tactic == (NEXT if hiccup == GOOD else GOOD)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_leader_that_fails_at_any_time_leaves_the_final_to_the_others(call):
    bench = Drifting({DEFAULT: 50.0, GOOD: 10.0, NEXT: 10.2}, fails=(GOOD, call))
    final = compare(bench, DEFAULT, [GOOD, NEXT])
    assert final.finalists.keys() == {NEXT}
    assert decide([final], final.default).tactic == NEXT


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("others", [(), (POOR,)])
def test_if_all_remaining_tactics_fail_the_dropped_ones_are_timed_anew(call, others):
    """`GOOD` alone remains after the opening, and fails in some call."""
    bench = Uneven({DEFAULT: (50.0, 50.0), GOOD: (9.0, 10.0), POOR: (12.0, 12.0)}, fails=(GOOD, call))
    final = compare(bench, DEFAULT, [GOOD, *others], seconds=1e-6)
    assert bench.failures.keys() == {GOOD}
    assert final.finalists.keys() == set(others)
    assert all(len(series) == len(final.draws) >= SAMPLES[0] for series in final.finalists.values())
    assert decide([final], final.default).tactic == (others or (DEFAULT,))[0]


@pytest.mark.parametrize(("default_us", "call"), [(50.0, 1), (50.0, 2), (10.0, 1), (10.0, 2), (10.0, 3)])
def test_a_default_that_fails_leaves_no_result(default_us, call):
    bench = Drifting({DEFAULT: default_us, GOOD: 10.0}, fails=(DEFAULT, call))
    with pytest.raises(NoResultError, match="planted"):
        compare(bench, DEFAULT, [GOOD])


@given(st.lists(st.floats(1, 100), min_size=2, max_size=7), st.floats(0, 1))
@settings(max_examples=50)
def test_the_fastest_beyond_the_noise_wins_however_slow_the_default_is(us, seconds):
    tactics = [tactic(f"number {number}") for number in range(len(us))]
    bench = Drifting(dict(zip(tactics, us, strict=True)))
    final = compare(bench, tactics[0], tactics[1:], seconds=seconds)
    winner = decide([final], final.default).tactic
    assert bench.us[winner] <= 1.005 * min(us) or (winner == tactics[0] and us[0] < 1.01 * min(us))
    assert len(final.default_us) >= OPENING
