from __future__ import annotations

import pytest

from moetune.quoting import MOST_QUOTED, enumerated, printable, quoted


def test_a_short_value_is_quoted_whole_and_a_long_one_is_cut():
    assert quoted("a\x1bb") == r"'a\x1bb'"
    assert quoted("x" * 10_000) == f"'{'x' * (MOST_QUOTED - 1)}…"


def test_what_has_no_repr_is_quoted_by_its_type():
    loop: list[object] = []
    for _ in range(5000):
        loop = [loop]
    assert quoted(1 << 100_000) == "a int that is too long to print"
    assert quoted(loop) == "a list that is too long to print"


def test_a_long_list_ends_with_the_number_of_the_others():
    assert enumerated(range(3)) == "0, 1, 2"
    assert enumerated(range(100)) == "0, 1, 2, 3, 4, 5, 6, 7 and 92 more"
    assert len(enumerated(["x" * 10_000] * 100)) < 2000


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("12.5 µs × 3 …", "12.5 µs × 3 …"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),
        ("over\rwritten", r"over\rwritten"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(given, shown):
    assert printable(given) == shown
