"""A bucket whose final comparison is too noisy is compared again later; if it stays so, the default is stored."""

import random
from dataclasses import dataclass, field, replace

import planted_time
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import PlantedRunner, tactic
from runs import REGIME, tune_planted
from scripted import DEFAULT, GOOD, NEXT, final_of

from moetune.spec.regime import Regime
from moetune.tuning.events import BucketChosen, NoisyBucket
from moetune.tuning.run import NOISY_TRIES
from moetune.tuning.verdict import NOISY, decide

ONE = Regime(ep_size=2, attention_dp=True, ladder="4", draws=4)
PLANTED = {"default": 4.0, "fast": 1.0}


@dataclass
class Listener:
    """Notes events. Final comparisons are noisy until `quiet(event)`."""

    quiet: object = lambda event: False
    events: list = field(default_factory=list)
    noisy: bool = True

    def __call__(self, event):
        self.events.append(event)
        self.noisy = self.noisy and not self.quiet(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def left(self):
        return [(event.rows, event.tries) for event in self.of(NoisyBucket)]


@pytest.fixture
def listen(monkeypatch):
    """Returns a listener; while it is noisy, each run on a draw of a final comparison takes 1 ms to 1000 s more."""
    chance, run = random.Random(0), PlantedRunner.run

    def start(quiet=lambda event: False):
        listener = Listener(quiet)

        def run_noisily(runner, tactic, draw=0):
            if listener.noisy and runner.problem.draws[draw].kind == "final":
                planted_time.spend(10 ** chance.uniform(0, 6))
            return run(runner, tactic, draw)

        monkeypatch.setattr(PlantedRunner, "run", run_noisily)
        return listener

    return start


def test_a_noisy_bucket_is_compared_again_after_the_others(plant, listen):
    plant(milliseconds={**PLANTED, "broken": 0.5}, raising=frozenset({"broken"}))
    listener = listen(lambda event: isinstance(event, NoisyBucket))
    profile = tune_planted(REGIME, on_event=listener)
    assert listener.left == [(4, NOISY_TRIES)]
    assert listener.of(NoisyBucket)[0].noise > NOISY
    assert [event.choice.rows for event in listener.of(BucketChosen)] == [8, 4]
    for choice in profile.choices:
        assert choice.tactic == tactic("fast")
        assert choice.noise < NOISY
        assert [rejection.tactic for rejection in choice.rejected] == [tactic("broken")]


@pytest.mark.parametrize(("quiet_after", "winner"), [(1, "fast"), (0, "default")])
def test_after_two_more_noisy_tries_the_default_stays_and_the_record_says_why(plant, listen, quiet_after, winner):
    plant(milliseconds=PLANTED)
    listener = listen(lambda event: isinstance(event, NoisyBucket) and event.tries == quiet_after)
    profile = tune_planted(ONE, on_event=listener)
    assert listener.left == [(4, tries) for tries in range(NOISY_TRIES, quiet_after - 1, -1)]
    (choice,) = profile.choices
    assert choice.tactic == tactic(winner)
    assert (choice.noise > NOISY) == (winner == "default")
    reasons = [rejection.reason for rejection in choice.rejected if "not decided: A/A noise of" in rejection.reason]
    assert bool(reasons) == (winner == "default")
    assert tune_planted(ONE) == profile


def test_no_bucket_is_compared_again_once_the_time_budget_has_ended(plant, listen, planted_budget):
    backend = plant(milliseconds=PLANTED)
    listener = listen()
    (choice,) = tune_planted(ONE, on_event=listener, time_budget_s=1e-3).choices
    assert listener.left == [(4, NOISY_TRIES), (4, 0)]
    assert backend.prepared == [4]
    assert choice.tactic == tactic("default")


@given(
    noise=st.lists(st.floats(0, 3), min_size=1, max_size=3).filter(lambda each: max(each) > NOISY),
    good_us=st.floats(1, 20),
    next_us=st.floats(1, 20),
)
def test_whatever_the_times_are_a_noisy_comparison_keeps_the_default(noise, good_us, next_us):
    finalists = {GOOD: (good_us,) * 20, NEXT: (next_us,) * 20}
    comparisons = [replace(final_of(finalists, rows=rows), noise=of_rows) for rows, of_rows in enumerate(noise, 8)]
    verdict = decide(comparisons, DEFAULT)
    assert verdict.tactic == DEFAULT
    assert verdict.rejected.keys() == finalists.keys()
    rows = 8 + noise.index(max(noise))
    assert all(f"{100 * max(noise):.1f} % at {rows} rows, allowed 10 %" in why for why in verdict.rejected.values())
