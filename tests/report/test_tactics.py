import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.backends.grouped_triton.space import VALUES
from moetune.report.tactics import reasons_counted, tactic_columns, tactic_line
from moetune.spec.tactic import Tactic


def triton(*values):
    return Tactic(dict(zip(VALUES, values, strict=True)))


@pytest.mark.parametrize(
    ("tactic", "line"),
    [
        (triton(16, 64, 128, 1, 4, 3), "16×64×128 group=1 warps=4 stages=3"),
        (Tactic(algorithm="grouped_mm"), "grouped_mm"),
        (Tactic(gemm1=12, gemm2=-1), "gemm1=12 gemm2=-1"),
        (Tactic(tile_n=32, config=5), "tile_n=32 config=5"),
        (Tactic(BLOCK_SIZE_M=16, num_warps=4), "BLOCK_SIZE_M=16 num_warps=4"),
    ],
)
def test_a_tactic_is_one_short_line(tactic, line):
    assert tactic_line(tactic) == line


def test_each_tunable_has_a_column():
    assert tactic_columns([triton(16, 64, 128, 1, 4, 3), triton(64, 32, 64, 16, 8, 2)]) == {
        "M×N×K": ["16×64×128", "64×32×64"],
        "group": ["1", "16"],
        "warps": ["4", "8"],
        "stages": ["3", "2"],
    }


def test_the_columns_do_not_follow_the_order_of_names():
    assert tactic_columns([Tactic(gemm1=1, gemm2=2), Tactic(gemm2=4, gemm1=3)]) == {
        "gemm1": ["1", "3"],
        "gemm2": ["2", "4"],
    }


@pytest.mark.parametrize(
    ("tactics", "cells"),
    [
        ([], []),
        ([Tactic(algorithm="eager")], ["eager"]),
        ([Tactic(gemm1=1, gemm2=2), Tactic(algorithm="eager")], ["gemm1=1 gemm2=2", "eager"]),
    ],
)
def test_one_value_alone_and_tactics_of_different_names_have_one_column(tactics, cells):
    assert tactic_columns(tactics) == {"tactic": cells}


@given(st.lists(st.tuples(*(st.sampled_from(values) for values in VALUES.values())), min_size=2, unique=True))
def test_different_tactics_read_differently(values):
    tactics = [triton(*each) for each in values]
    assert len(set(map(tactic_line, tactics))) == len(tactics)
    assert len(set(zip(*tactic_columns(tactics).values(), strict=True))) == len(tactics)


def test_reasons_that_differ_in_numbers_or_tactics_are_of_one_kind():
    groups = [
        ["needs 245,760 bytes, a block may have 232448", f"runs the same as {triton(16, 32, 64, 1, 4, 2)}"],
        ["needs 300 bytes, a block may have 232448", "hung for 3.5 s", "needs 301 bytes, a block may have 232448"],
        [f"runs the same as {triton(16, 32, 64, 16, 4, 3)}"],
    ]
    assert list(reasons_counted(groups).items()) == [
        ("needs … bytes, a block may have …", [1, 2, 0]),
        ("runs the same as …", [1, 0, 1]),
        ("hung for … s", [0, 1, 0]),
    ]


@given(st.lists(st.lists(st.text("ab 1.,=×", max_size=12))))
def test_every_reason_is_counted_once(groups):
    counted = reasons_counted(groups)
    assert [sum(counts) for counts in zip(*counted.values(), strict=True)] == (
        [len(group) for group in groups] if any(groups) else []
    )
    assert list(map(sum, counted.values())) == sorted(map(sum, counted.values()), reverse=True)
