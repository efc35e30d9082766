"""A tactic is a small frozen mapping that is JSON as it is."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from moetune.errors import UsageError
from moetune.spec.tactic import Tactic
from moetune.store.profile import Rejection

TEXTS = st.text(max_size=8).filter(str.isprintable)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
VALUES = st.dictionaries(TEXTS, INTEGERS | st.booleans() | TEXTS, max_size=6)
ADAPTER = TypeAdapter(Tactic)


@given(VALUES)
def test_json_gives_the_same_tactic_back(values):
    tactic = Tactic(values)
    assert ADAPTER.validate_json(ADAPTER.dump_json(tactic)) == tactic
    assert json.loads(json.dumps(dict(tactic))) == values


@given(VALUES)
def test_order_makes_no_difference(values):
    turned = Tactic(dict(reversed(values.items())))
    assert turned == Tactic(values)
    assert hash(turned) == hash(Tactic(values))


@given(VALUES, VALUES)
def test_equal_tactics_hash_equally(one, other):
    if Tactic(one) == Tactic(other):
        assert hash(Tactic(one)) == hash(Tactic(other))
        assert dict(one) == dict(other)


def test_true_is_not_one():
    assert Tactic(use_tma=True) != Tactic(use_tma=1)
    assert ADAPTER.validate_json('{"use_tma": true}')["use_tma"] is True


def test_a_tactic_cannot_be_changed():
    tactic = Tactic(BLOCK_SIZE_M=64)
    with pytest.raises(AttributeError, match="frozen"):
        tactic._items = {}
    with pytest.raises(TypeError):
        tactic["BLOCK_SIZE_M"] = 32  # type: ignore[index]


def test_a_tactic_is_independent_of_the_mapping_it_came_from():
    values = {"num_warps": 4}
    tactic = Tactic(values)
    values["num_warps"] = 8
    assert tactic["num_warps"] == 4


def test_copies_and_pickles_are_equal():
    tactic = Tactic(algorithm="eager", num_warps=4)
    assert copy.deepcopy(tactic) == tactic
    assert pickle.loads(pickle.dumps(tactic)) == tactic


def test_text_is_short_for_tables():
    assert str(Tactic(algorithm="grouped_mm")) == "grouped_mm"
    assert str(Tactic(M=64, N=128)) == "M=64 N=128"


@pytest.mark.parametrize("value", [1.5, None, [1], {"a": 1}, b"x"])
def test_a_value_that_json_would_change_is_refused(value):
    with pytest.raises(TypeError, match="'tile'"):
        Tactic(tile=value)


@pytest.mark.parametrize("given", [{"tile": 1.5}, {"tile": None}, 3, "eager", [1]])
def test_a_bad_tactic_in_a_model_is_a_one_line_usage_error(given):
    with pytest.raises(UsageError, match="tactic") as error:
        Rejection(tactic=given, reason="slow")
    assert "\n" not in str(error.value)
    assert "function-" not in str(error.value)
