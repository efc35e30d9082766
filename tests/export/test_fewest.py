"""Of equally fast tactics, the exported ones are few."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_profiles import profile, tactic

from moetune.errors import UsageError
from moetune.export import fewest as module
from moetune.export.fewest import fewest
from moetune.export.sglang import export as sglang
from moetune.export.vllm import export as vllm
from moetune.spec.tactic import Tactic

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


@settings(max_examples=50)
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


SWAPPED, PLAIN, WIDE = tactic(16, 64, 128, 1, 4, 3), tactic(64, 64, 128, 1, 4, 3), tactic(64, 128, 128, 1, 4, 3)


def tied(*choices):
    """A profile in fp8 on Hopper, measured with swapped operands: for each row count its choice and equals."""
    stored = profile(
        tactics={rows: own for rows, (own, *_) in enumerate(choices, 1)},
        ladder=",".join(map(str, range(1, len(choices) + 1))),
        ep_size=1,
    )
    equal = [tuple(others) for _, *others in choices]
    kept = zip(stored.choices, equal, strict=True)
    return stored.model_copy(
        update={"choices": tuple(one.model_copy(update={"equally_fast": others}) for one, others in kept)}
    )


def exported(stored, version=None):
    (text,) = set(vllm(stored, version).files.values())
    return {rows: Tactic(values) for rows, values in json.loads(text).items() if rows != "triton_version"}


def test_an_equally_fast_tactic_that_the_version_runs_in_another_way_is_not_taken():
    """vLLM before 0.25 swaps no operands, so `SWAPPED` runs in another way there."""
    stored = tied([PLAIN, SWAPPED], [WIDE, SWAPPED])
    assert exported(stored) == {"1": SWAPPED, "2": SWAPPED}
    assert exported(stored, "0.20.2") == {"1": PLAIN, "2": WIDE}
    assert "The file has 2 configurations for 2 row counts." in vllm(stored, "0.20.2").notes


def test_for_a_choice_that_the_version_runs_in_another_way_an_equally_fast_one_stands_in():
    stored = tied([SWAPPED, PLAIN], [SWAPPED, WIDE, PLAIN], [WIDE])
    assert exported(stored) == {"1": SWAPPED, "2": SWAPPED, "3": WIDE}
    assert exported(stored, "0.20.2") == {"1": PLAIN, "2": WIDE, "3": WIDE}
    notes = vllm(stored, "0.20.2").notes
    assert "The file has 2 configurations for 3 row counts." in notes
    assert (
        "For 2 row counts an equally fast tactic stands in, because this version of vLLM runs the choice in another "
        "way than it was measured."
    ) in notes
    assert "stands in" not in " ".join(vllm(stored).notes)


def test_a_choice_without_an_equal_that_holds_is_refused_by_its_rows():
    stored = tied([SWAPPED, PLAIN], [SWAPPED, tactic(32, 64, 128, 1, 4, 3)])
    with pytest.raises(UsageError, match="does not swap the operands of the tactics of 2 rows"):
        vllm(stored, "0.20.2")


EQUALS = st.lists(st.sampled_from([SWAPPED, PLAIN, WIDE]), min_size=1, max_size=3, unique=True)


@settings(max_examples=40)
@given(st.lists(EQUALS, min_size=1, max_size=6))
def test_a_version_is_refused_only_if_some_choice_has_no_equal_that_holds(choices):
    stored = tied(*choices)
    if any(each == [SWAPPED] for each in choices):
        with pytest.raises(UsageError):
            vllm(stored, "0.20.2")
    else:
        for rows, found in exported(stored, "0.20.2").items():
            assert found in choices[int(rows) - 1]
            assert found != SWAPPED
