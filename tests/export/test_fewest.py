"""Of equally fast tactics, the exported ones are few."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_profiles import profile, tactic

from moetune.export import fewest as module
from moetune.export.fewest import fewest
from moetune.export.sglang import export as sglang
from moetune.export.vllm import export as vllm

OPTIONS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), max_size=20)
FEW = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=6)


@given(OPTIONS)
def test_every_position_has_one_of_its_options_and_no_more_are_distinct_than_of_the_first(options):
    chosen = fewest(options)
    assert all(option in each for option, each in zip(chosen, options, strict=True))
    assert len(set(chosen)) <= len({each[0] for each in options})
    assert all(option == each[0] for option, each in zip(chosen, options, strict=True) if len(set(each)) == 1)


@given(OPTIONS)
def test_a_first_option_that_is_chosen_anywhere_is_kept_where_it_is_first(options):
    chosen = fewest(options)
    assert all(option == each[0] for option, each in zip(chosen, options, strict=True) if each[0] in chosen)


@settings(max_examples=50, deadline=None)
@given(FEW)
def test_no_choice_has_fewer_if_the_options_are_few(options):
    assert len(set(fewest(options))) == min(len(set(each)) for each in product(*options))


def test_where_the_greedy_choice_has_one_more_the_least_is_found_up_to_a_size(monkeypatch):
    """`a` serves the most positions, but `b` and `c` together serve all of them."""
    options = [["1", "b", "a"], ["2", "b", "a"], ["3", "c", "a"], ["4", "c", "a"], ["5", "b"], ["6", "c"]]
    assert fewest(options) == ["b", "b", "c", "c", "b", "c"]
    monkeypatch.setattr(module, "EXACT", 0)
    assert fewest(options) == ["a", "a", "a", "a", "5", "6"]


def test_of_equally_few_the_choices_themselves_stay():
    assert fewest([["a", "b"], ["b", "a"], ["b"]]) == ["b", "b", "b"]
    assert fewest([["a", "b"], ["c"]]) == ["a", "c"]
    assert fewest([["a", "b"], ["a", "b"], ["b", "a"]]) == ["a", "a", "a"]
    assert fewest([]) == []


@pytest.mark.parametrize("export", [vllm, sglang])
def test_an_exported_file_has_one_configuration_where_one_is_as_fast_everywhere(export):
    small, large, shared = tactic(16, 32, 64, 1, 4, 3), tactic(64, 128, 64, 1, 4, 3), tactic(32, 64, 64, 1, 4, 3)
    stored = profile("qwen3-30b-a3b", {1: small, 2: large, 4: shared}, ladder="1,2,4", ep_size=1)
    tied = [choice.model_copy(update={"equally_fast": (shared,)}) for choice in stored.choices[:2]]
    fewer = stored.model_copy(update={"choices": (*tied, stored.choices[2])})
    (text,) = set(export(fewer).files.values())
    assert json.loads(text).items() >= {key: dict(shared) for key in "124"}.items()
    assert (
        "The file has 1 configuration for 3 row counts; for 2 of these an equally fast tactic stands in, so that there "
        "are fewer."
    ) in export(fewer).notes
    assert "The file has 3 configurations for 3 row counts." in export(stored).notes


def test_tactics_that_run_as_one_configuration_count_as_one():
    """In fp8, vLLM clamps BLOCK_SIZE_K to 128."""
    deep, flat = tactic(16, 64, 256, 1, 4, 3), tactic(16, 64, 128, 1, 4, 3)
    assert "The file has 1 configuration for 2 row counts." in vllm(profile(tactics={1: deep, 2: flat})).notes
