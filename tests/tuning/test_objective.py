"""Under several distributions a choice minimizes the mean or the worst of its slowdowns, as brute force finds it."""

import json
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from planted import LAYER, tactic
from planted_skewed import SkewedBackend
from runs import tune_planted
from scripted import DEFAULT, GOOD, NEXT, POOR, final_of

from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.tuning.bucket import Bucket
from moetune.tuning.final_comparison import SETTLED
from moetune.tuning.objective import Objective, Scores
from moetune.tuning.verdict import decide

DISTRIBUTIONS = ("random", "zipf:1", "ddist:2")
MIX = {"random": 0.5, "zipf:1": 0.3, "ddist:2": 0.2}
TACTICS = ("default", "a", "b", "c", "d")
REGIME = Regime(
    ep_size=2, attention_dp=True, dispatch="allgather", ladder="8", draws=6, also=("zipf:1=0.3", "ddist:2=0.2")
)
TABLES = st.fixed_dictionaries(
    {pair: st.integers(8, 40).map(lambda at: at / 10) for pair in product(TACTICS, DISTRIBUTIONS)}
)


def brute_force(table, kind, weights=MIX):
    """The tactics with the smallest objective of those that are slower than the default nowhere, the best first.

    Returns the objective of each, by tactic. `table` has the time of each (tactic, distribution).
    """
    names = list(dict.fromkeys(name for name, _ in table))
    fastest = {of: min(table[name, of] for name in names) for of in weights}
    found = {}
    for name in names:
        slowdowns = {of: table[name, of] / fastest[of] for of in weights}
        mean = sum(weight * slowdowns[of] for of, weight in weights.items())
        if all(table[name, of] <= table["default", of] for of in weights):
            found[name] = mean if kind == "mean" else max(slowdowns.values())
    if len(found) > 1 and any(table[name, of] < table["default", of] for name in found for of in weights):
        del found["default"]
    return dict(sorted(found.items(), key=lambda item: item[1]))


def is_clear(values):
    """Whether the best of some objectives is so by more than the tolerance within which other rules decide."""
    ordered = sorted(values.values())
    return len(ordered) < 2 or ordered[1] - ordered[0] > 2 * SETTLED


def comparisons(table, rows=8):
    names = list(dict.fromkeys(name for name, _ in table))
    return [
        final_of(
            {tactic(name): (table[name, of],) * 20 for name in names if name != "default"},
            (table["default", of],) * 20,
            rows,
        )
        for of in MIX
    ]


@settings(max_examples=150)
@given(TABLES, st.sampled_from(["mean", "worst"]))
def test_the_verdict_is_the_one_of_brute_force(table, kind):
    wanted = brute_force(table, kind)
    assume(is_clear(wanted))
    taken = [_under(samples, distribution) for samples, distribution in zip(comparisons(table), MIX, strict=True)]
    verdict = decide(taken, DEFAULT, objective=Objective(kind, MIX))
    assert verdict.tactic == tactic(next(iter(wanted)))


def _under(samples, distribution):
    from dataclasses import replace

    return replace(samples, distribution=distribution)


def test_mean_and_worst_differ_where_the_best_of_one_distribution_is_terrible_under_another():
    table = {("random", GOOD): 1.0, ("random", NEXT): 1.6, ("random", POOR): 1.45}
    table |= {("zipf:1", GOOD): 3.0, ("zipf:1", NEXT): 1.0, ("zipf:1", POOR): 1.45}
    taken = [
        _under(final_of({one: (table[of, one],) * 20 for one in (GOOD, NEXT, POOR)}, (4.0,) * 20), of)
        for of in ("random", "zipf:1")
    ]

    def chosen(kind, weight):
        return decide(taken, DEFAULT, objective=Objective(kind, {"random": 1 - weight, "zipf:1": weight})).tactic

    assert [chosen("mean", weight) for weight in (0.01, 0.4, 0.9)] == [GOOD, NEXT, NEXT]
    assert chosen("mean", 0.2) == GOOD
    assert {chosen("worst", weight) for weight in (0.01, 0.4, 0.9)} == {POOR}


def test_a_tactic_that_is_slower_than_the_default_under_one_distribution_cannot_win():
    taken = [
        _under(final_of({GOOD: (1.0,) * 20, NEXT: (3.9,) * 20}, (4.0,) * 20), "random"),
        _under(final_of({GOOD: (4.4,) * 20, NEXT: (4.0,) * 20}, (4.0,) * 20), "zipf:1"),
    ]
    verdict = decide(taken, DEFAULT, objective=Objective("mean", {"random": 0.99, "zipf:1": 0.01}))
    assert verdict.tactic == NEXT
    assert verdict.rejected == {GOOD: "slower than the default by 10.0 % at 8 rows under zipf:1"}


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.floats(1, 100), min_size=3, max_size=3), min_size=1))
def test_a_search_s_finalists_have_the_best_by_the_objective_and_the_fastest_under_each_distribution(times):
    objective = Objective("worst", MIX)
    scores = Scores(objective)
    samples = {tactic(name): [us for us in of for _ in range(2)] for name, of in times.items()}
    distributions = [name for name in MIX for _ in range(2)]
    scored = scores.of(samples, distributions)
    assert set(scored) == set(samples)
    finalists = scores.finalists((), scored)
    fastest = [min(of[at] for of in times.values()) for at in range(3)]
    regret = {name: max(us / best for us, best in zip(of, fastest, strict=True)) for name, of in times.items()}
    assert regret[finalists[0]["algorithm"]] == pytest.approx(min(regret.values()))
    for at in range(3):
        assert min(times[each["algorithm"]][at] for each in finalists) == fastest[at]


def test_the_score_of_one_distribution_is_the_mean_time():
    scores = Scores(Objective())
    assert scores.of({GOOD: [1.0, 2.0, 6.0]}, ["", "", ""]) == {GOOD: 3.0}
    assert scores.finalists((NEXT, GOOD), {GOOD: 3.0}) == (NEXT, GOOD)


@pytest.fixture
def plant_table(monkeypatch):
    from moetune.backends import registry

    def _plant(table):
        backend = SkewedBackend.of(table)
        monkeypatch.setattr(registry, "backend", lambda name: backend)
        return backend

    return _plant


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(TABLES, st.sampled_from(["mean", "worst"]))
def test_a_tune_chooses_as_brute_force_does(plant_table, tmp_path_factory, table, kind):
    wanted = brute_force(table, kind)
    assume(is_clear(wanted))
    plant_table(table)
    regime = Regime(**{**dict(REGIME), "objective": kind})
    (choice,) = tune_planted(regime, store=tmp_path_factory.mktemp("store")).choices
    assert choice.tactic == tactic(next(iter(wanted)))
    name = choice.tactic["algorithm"]
    for each in choice.by_rows:
        fastest = min(table[other, each.distribution] for other in TACTICS)
        assert each.slowdown == pytest.approx(table[name, each.distribution] / fastest, rel=0.01)
        assert each.gain == pytest.approx(
            table["default", each.distribution] / table[name, each.distribution], rel=0.01
        )


def test_a_profile_of_several_distributions_names_the_one_of_each_time(plant_table, tmp_path):
    table = {pair: 1.0 + 0.1 * at for at, pair in enumerate(product(("fast", "default"), DISTRIBUTIONS))}
    plant_table(table)
    profile = tune_planted(REGIME, store=tmp_path)
    (choice,) = profile.choices
    assert [(each.rows, each.distribution) for each in choice.by_rows] == [(8, name) for name in DISTRIBUTIONS_IN_ORDER]
    assert choice.time_us == pytest.approx(1000, rel=0.01)  # that of the main distribution
    stored = json.loads(profile.model_dump_json())
    assert stored["regime"]["also"] == ["ddist:2=0.2", "zipf:1=0.3"]
    assert stored["regime"]["objective"] == "mean"
    assert Profile.model_validate(stored) == profile
    assert "slowdown" in stored["choices"][0]["by_rows"][0]


DISTRIBUTIONS_IN_ORDER = ("random", "ddist:2", "zipf:1")


def test_every_distribution_is_among_any_draws_in_a_row_of_a_search(plant):
    backend = plant(milliseconds={"default": 1.0})
    bucket = Bucket.of(LAYER, REGIME, backend, "cpu", 8)
    draws = [bucket.problem.draws[number] for number in bucket.problem.numbers("search")]
    assert bucket.rounds_of_all == 3
    for start in range(len(draws) - 2):
        assert {draw.distribution for draw in draws[start : start + 3]} == set(DISTRIBUTIONS)
    assert {draw.distribution for draw in bucket.problem.draws if draw.kind == "stress"} == {"random"}
    for count in bucket.row_counts:
        kinds = {(bucket.problem.draws[at].kind, bucket.problem.draws[at].distribution) for at in count.draws}
        assert kinds == {("final", count.distribution)}


def test_a_tune_that_was_interrupted_searches_the_bucket_anew_and_keeps_the_others(plant_table, tmp_path, monkeypatch):
    table = {(name, of): 2.0 - at * 0.1 for at, name in enumerate(("default", "fast")) for of in DISTRIBUTIONS}
    plant_table(table)
    regime = Regime(**{**dict(REGIME), "ladder": "4,8", "tune_max_num_tokens": 8})
    from moetune.tuning.bucket_tuner import BucketTuner

    choose = BucketTuner.choose

    def interrupted(self, *given):
        if self._bucket.rows == 8:
            raise KeyboardInterrupt
        return choose(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(BucketTuner, "choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune_planted(regime, store=tmp_path)
    profile = tune_planted(regime, store=tmp_path)
    assert [(choice.rows, choice.tactic) for choice in profile.choices] == [(4, tactic("fast")), (8, tactic("fast"))]


@pytest.mark.parametrize("kind", ["mean", "worst"])
def test_weights_are_those_of_the_regime(kind):
    regime = Regime(also=("zipf:1=0.3", "ddist:2=0.2"), objective=kind)
    objective = Objective.of(regime)
    assert objective.kind == kind
    assert {name: Fraction(str(weight)) for name, weight in objective.weights.items()} == {
        "random": Fraction(1, 2),
        "zipf:1": Fraction(3, 10),
        "ddist:2": Fraction(1, 5),
    }
