"""A choice records where its default is from, and a default that no engine runs is warned of."""

from dataclasses import dataclass

import pytest
from planted import LAYER, PlantedBackend, tactic
from runs import REGIME

from moetune.backends.base import Default
from moetune.errors import NoResultError
from moetune.tuning.bucket import Bucket
from moetune.tuning.events import BucketStarted, DefaultDiffers, TuneStarted
from moetune.tuning.tune import tune


@dataclass
class ExplainingBackend(PlantedBackend):
    """Its default has a source, and a warning that is the same from 4 rows on."""

    default_name: str = "default"
    hint: str = ""

    def default(self, layer, regime, rows):
        return tactic(self.default_name)

    def explained_default(self, layer, regime, rows):
        source = "heuristic" if rows < 5 else "shipped file NAME of vllm 0.33.0"
        warning = "" if rows < 4 else "vLLM runs something else."
        return Default(self.default(layer, regime, rows), source, warning, self.hint)


def test_a_choice_has_the_source_of_the_default_at_its_own_rows(tmp_path):
    events = []
    backend = ExplainingBackend({"default": 6.0, "fast": 0.2})
    profile = tune(LAYER, REGIME, backend, tmp_path, device="cpu", isolate=False, on_event=events.append)
    assert [choice.default_source for choice in profile.choices] == ["heuristic", "shipped file NAME of vllm 0.33.0"]
    assert [event for event in events if isinstance(event, DefaultDiffers)] == [
        DefaultDiffers(4, "vLLM runs something else.")
    ]
    assert [type(event) for event in events[:3]] == [TuneStarted, BucketStarted, DefaultDiffers]


def test_a_backend_that_does_not_say_has_no_source(tmp_path):
    backend = PlantedBackend({"default": 6.0, "fast": 0.2})
    profile = tune(LAYER, REGIME, backend, tmp_path, device="cpu", isolate=False)
    assert {choice.default_source for choice in profile.choices} == {""}


def test_a_stored_profile_is_served_whatever_the_default_is_from(tmp_path):
    plain = tune(LAYER, REGIME, PlantedBackend({"default": 6.0, "fast": 0.2}), tmp_path, device="cpu", isolate=False)
    other = ExplainingBackend({"default": 6.0, "fast": 0.2})
    assert tune(LAYER, REGIME, other, tmp_path, device="cpu", frozen=True) == plain


@pytest.mark.parametrize("default", ["default", "huge"])
def test_the_default_is_a_candidate_even_if_the_backend_excludes_it(default):
    backend = ExplainingBackend({"default": 6.0, "fast": 0.2}, default_name=default)
    bucket = Bucket.of(LAYER, REGIME, backend, "cpu", 4)
    assert bucket.candidates.tactics[0] == tactic(default)
    assert (tactic("huge") in bucket.candidates.excluded) is (default != "huge")


@pytest.mark.parametrize("planted", [{"raising": frozenset({"default"})}, {"wrong": frozenset({"default"})}])
@pytest.mark.parametrize("hint", ["", "Give an empty folder."])
def test_the_error_of_a_default_that_fails_has_its_hint(tmp_path, planted, hint):
    backend = ExplainingBackend({"default": 6.0, "fast": 0.2}, hint=hint, **planted)
    with pytest.raises(NoResultError, match="The default tactic default failed at 4 rows") as failed:
        tune(LAYER, REGIME, backend, tmp_path, device="cpu", isolate=False)
    assert failed.value.hint == hint
