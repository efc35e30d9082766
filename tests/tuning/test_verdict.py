"""A tactic wins if it is faster than the default beyond the noise and has no cliff."""

from collections import Counter
from statistics import fmean

import pytest
from planted import LAYER, tactic
from runs import REGIME
from scripted import DEFAULT, DRAWS, GOOD, NEXT, TIED, Scripted, Uneven, final_of

from moetune.backends.base import Problem
from moetune.measure.bench import Bench
from moetune.spec.regime import Regime
from moetune.tuning.final_comparison import OPENING, play
from moetune.tuning.verdict import choice as choice_of
from moetune.tuning.verdict import decide
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize


def test_a_tactic_that_is_slower_in_most_rounds_does_not_win_by_the_default_s_hiccups(plant):
    backend = plant(milliseconds={"default": 1.0, "slower": 1.5})
    final = final_of({tactic("slower"): (15.0,) * 40}, (10.0, 10.0, 10.0, 200.0) * 10)
    regime = Regime(draws=1)
    routing = realize(LAYER, regime, 4)
    problem = Problem(LAYER, regime, 4, regime.shard(LAYER), as_draws([routing] * 5), "cpu")
    assert decide(final, Bench(backend, problem), DRAWS, 8).tactic == tactic("default")


def _decided(default_us, other_us, stressed, failures):
    """The verdict on the default and `other`, their rounds all alike; `stressed` is what the bench answers."""
    final = final_of({tactic("other"): (other_us,) * 20}, (default_us,) * 20)
    bench = Scripted(lambda number: 1.0)
    bench.failures = failures
    answers = dict(zip((tactic("default"), tactic("other")), stressed, strict=True))
    bench.samples = lambda tactics, draws: [answers[one] and answers[one] * len(draws) for one in tactics]
    return decide(final, bench, DRAWS, 8)


def test_the_winner_is_the_least_behind_at_the_row_count_where_it_is_furthest_behind():
    """Of three finalists one is best at each row count and far behind at the other."""
    draws = tuple(range(20))
    one, other, both = tactic("one"), tactic("other"), tactic("both")
    finalists = {
        one: tuple(8.0 if draw % 2 else 4.0 for draw in draws),
        other: tuple(5.0 if draw % 2 else 7.0 for draw in draws),
        both: tuple(6.5 if draw % 2 else 6.0 for draw in draws),
    }
    bench = Scripted(lambda number: 1.0)
    bench.samples = lambda tactics, draws: [(1.0,) * len(draws) for _ in tactics]
    assert decide(final_of(finalists), bench, DRAWS, 8).tactic in (one, other)  # by the mean of all rounds
    assert decide(final_of(finalists, rows=(8, 7)), bench, DRAWS, 8).tactic == both


def test_a_buckets_own_rows_count_half_where_others_are_met():
    """Even draws have the bucket's own rows; `own` is 30 % behind on the others, `met` 40 % on these."""
    own, met = tactic("own"), tactic("met")
    finalists = {own: (5.0, 6.5) * 10, met: (7.0, 5.0) * 10}
    bench = Scripted(lambda number: 1.0)
    bench.samples = lambda tactics, draws: [(1.0,) * len(draws) for _ in tactics]
    assert decide(final_of(finalists), bench, DRAWS, 8).tactic == own
    assert decide(final_of(finalists, rows=(8, 7)), bench, DRAWS, 8).tactic == met
    assert decide(final_of(finalists, rows=(7, 8)), bench, DRAWS, 8).tactic == own


def test_who_left_after_the_opening_never_wins_over_one_that_stayed():
    finalists = {tactic("left"): (1.0,) * 6, tactic("stayed"): (2.0,) * 20}
    bench = Scripted(lambda number: 1.0)
    bench.samples = lambda tactics, draws: [(1.0,) * len(draws) for _ in tactics]
    assert decide(final_of(finalists, rows=(8, 7)), bench, DRAWS, 8).tactic == tactic("stayed")


@pytest.mark.parametrize("default_us", [50.0, 10.4, 8.0])
def test_a_choice_s_times_are_the_means_of_what_counts_and_differ_by_the_gain(default_us):
    bench = Uneven({DEFAULT: (default_us, default_us), **TIED}, spread=0.05)
    final = play(bench, DEFAULT, [GOOD, NEXT], DRAWS, seconds=1e-6)
    verdict = decide(final, bench, DRAWS, 8)
    record = choice_of(final, verdict, bench, [realize(LAYER, REGIME, 4)], rows=4, tried=3, candidates=3)
    everyone = {DEFAULT: final.default_us, **final.finalists}
    assert record.tactic == (DEFAULT if default_us == 8.0 else verdict.tactic)
    assert record.time_us == pytest.approx(fmean(everyone[record.tactic][OPENING if default_us == 50.0 else 0 :]))
    assert record.default_time_us / record.time_us == pytest.approx(record.gain)
    if default_us == 50.0:
        assert record.gain == pytest.approx(fmean(final.default_us) / fmean(everyone[record.tactic][:OPENING]))


def test_a_finalist_that_fails_under_stress_cannot_win_and_keeps_its_own_reason():
    failures = {tactic("other"): "RuntimeError: planted failure"}
    for of_default in ((10.0,), None):
        verdict = _decided(10.0, 5.0, [of_default, None], failures)
        assert verdict.tactic == tactic("default")
        assert verdict.cliffs == {}


class _Stressed:
    """A bench that answers what is planted, one list of samples a call, and counts the calls of each tactic."""

    def __init__(self, **planted):
        self.failures, self.calls, self._planted = {}, Counter(), {tactic(name): them for name, them in planted.items()}

    def samples(self, tactics, draws):
        answers = []
        for played in tactics:
            answers.append(self._planted[played][self.calls[played]])
            self.calls[played] += 1
        assert all(len(answer) == len(draws) for answer in answers)
        return answers


def _stressed(**planted):
    """The verdict where `other` beats the default and `next` is second, and the bench."""
    finalists = {tactic("other"): (5.0,) * 20, tactic("next"): (6.0,) * 20}
    bench = _Stressed(default=[(20.0,), (20.0,) * 5], next=[(7.0,), (7.0,) * 5], **planted)
    return decide(final_of(finalists), bench, DRAWS, 8), bench


def test_where_all_stand_the_stress_they_are_timed_once():
    verdict, bench = _stressed(other=[(8.0,)])
    assert verdict.tactic == tactic("other")
    assert set(bench.calls.values()) == {1}


def test_where_one_seems_to_fall_off_a_cliff_all_are_timed_again_and_the_medians_count():
    verdict, bench = _stressed(other=[(30.0,), (31.0, 32.0, 8.0, 8.0, 33.0)])
    assert verdict.tactic == tactic("next")
    assert verdict.cliffs.keys() == {tactic("other")}
    assert "4.4 times" in verdict.cliffs[tactic("other")]
    assert set(bench.calls.values()) == {2}


def test_a_hiccup_under_stress_is_no_cliff():
    verdict, _ = _stressed(other=[(30.0,), (8.0, 30.0, 8.0, 30.0, 8.0)])
    assert verdict.tactic == tactic("other")
    assert verdict.stress_us == {"2": 8.0}
    assert verdict.cliffs == {}


def test_a_finalist_that_stands_the_stress_under_which_the_default_fails_wins():
    verdict = _decided(10.0, 5.0, [None, (12.0,)], {tactic("default"): "RuntimeError: planted failure"})
    assert verdict.tactic == tactic("other")
    assert verdict.stress_us == {"2": 12.0}
    assert verdict.default_stress_us == {"2": float("inf")}
