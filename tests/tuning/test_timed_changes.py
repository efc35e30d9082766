"""Both tactics of a bucket are timed in turns, here with planted times."""

import pytest
from choices import make_choice
from planted import LAYER, PlantedBackend, tactic

from moetune.errors import UnsupportedError, UsageError
from moetune.measure.probe import environment
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.tuning import timed_changes
from moetune.tuning.changes import changes
from moetune.tuning.timed_changes import require_measurable, timed
from moetune.workload.draws import compared_rows

REGIME = Regime(ep_size=2, attention_dp=True, ladder="pow2", tune_max_num_tokens=8, draws=2)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(timed_changes, "SECONDS", 0.05)


def profile(backend, regime=REGIME, here=None, **tactics):
    """The buckets `r4="fast"` … by the names of their tactics."""
    choices = [make_choice(int(rows[1:]), tactic=tactic(name)) for rows, name in tactics.items()]
    here = here or environment(backend, "cpu")
    return Profile(layer=LAYER, regime=regime, backend="planted", environment=here, choices=choices)


def measured(backend, a, b, **options):
    return timed(changes(a, b), a, backend, "cpu", isolate=False, **options)


def test_the_faster_one_of_each_bucket_is_named_with_its_bounds_at_every_row_count():
    backend = PlantedBackend({"default": 1.0, "fast": 0.5, "slow": 0.8})
    a = profile(backend, r2="fast", r4="fast", r8="slow")
    b = profile(backend, r2="fast", r4="slow", r8="fast")
    seen = []
    found = measured(backend, a, b, on_bucket=lambda *one: seen.append(one))
    same, worse, better = found.buckets
    assert seen == [(4, 0, 2), (8, 1, 2)]
    assert not same.timed
    for bucket, faster, ratio in ((worse, "a", 1.6), (better, "b", 0.625)):
        assert [each.rows for each in bucket.timed] == sorted(compared_rows(LAYER, REGIME, bucket.rows))
        for each in bucket.timed:
            assert each.faster == faster
            assert each.ratio_low <= each.ratio <= each.ratio_high
            assert each.ratio == pytest.approx(ratio, rel=0.01)
    assert found.measured_on == a.environment.device


def test_equally_fast_tactics_are_too_close_to_call():
    backend = PlantedBackend({"default": 1.0, "one": 0.5, "other": 0.5})
    found = measured(backend, profile(backend, r4="one"), profile(backend, r4="other"))
    assert {each.faster for each in found.buckets[0].timed} == {None}


@pytest.mark.parametrize(("failing", "name"), [("one", "a"), ("other", "b")])
def test_a_tactic_that_fails_is_named(failing, name):
    backend = PlantedBackend({"default": 1.0, "one": 0.5, "other": 0.6}, raising=frozenset({failing}))
    found = measured(backend, profile(backend, r4="one"), profile(backend, r4="other"))
    assert set(found.buckets[0].failed) == {name}
    assert "planted failure" in found.buckets[0].failed[name]


def test_a_wrong_tactic_is_never_called_faster():
    backend = PlantedBackend({"default": 1.0, "right": 0.5, "wrong": 0.1}, wrong=frozenset({"wrong"}))
    found = measured(backend, profile(backend, r4="right"), profile(backend, r4="wrong"))
    assert set(found.buckets[0].failed) == {"b"}
    assert not found.buckets[0].timed


def test_another_load_or_device_is_not_measured():
    backend = PlantedBackend({"default": 1.0})
    one = profile(backend, r4="default")
    other = profile(backend, regime=Regime(ep_size=4, attention_dp=True, ladder="pow2"), r4="default")
    with pytest.raises(UsageError, match="deployments"):
        require_measurable(changes(one, other), one, other, backend, "cpu")
    elsewhere = profile(backend, here=Environment(device="another", strict=one.environment.strict), r4="default")
    with pytest.raises(UsageError, match="differ in their device"):
        require_measurable(changes(one, elsewhere), one, elsewhere, backend, "cpu")
    with pytest.raises(UnsupportedError, match="profile A was measured with device another"):
        require_measurable(changes(elsewhere, elsewhere), elsewhere, elsewhere, backend, "cpu")
    require_measurable(changes(one, one), one, one, backend, "cpu")
