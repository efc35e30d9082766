import pytest
from shown import made_choice, made_profile, printed, rows_of

from moetune.report.profile import profile_table
from moetune.report.table import FittedTable, add_numbers, new_table


def test_numbers_of_a_column_end_below_each_other():
    lines = printed(profile_table(made_profile(made_choice(8, 60.0), made_choice(64, 1234.0)))).splitlines()[3:]
    assert len({line.index(number) + len(number) for line, number in zip(lines, ("60.0", "1,234"), strict=True)}) == 1


def test_times_are_in_ms_where_all_are_long():
    text = printed(profile_table(made_profile(made_choice(8, 2_500.0), made_choice(64, 150_000.0))))
    assert rows_of(text)[:2] == ["time default", "rows tactic (ms) (ms) gain 95 % bounds"]
    assert rows_of(text)[3:] == ["8 eager 2.50 2.50 kept –", "64 eager 150 150 kept –"]


def fitted():
    table = new_table()
    add_numbers(table, "rows", "bytes\nin", "time")
    table.add_row("1", "30.2 kB", "9.9 us")
    return FittedTable(table, ("bytes\nin", "time"))


@pytest.mark.parametrize(
    ("width", "titles", "left_out"),
    [(40, "rows in time", ""), (21, "rows in time", ""), (20, "rows time", "bytes in"), (11, "rows", "bytes in, time")],
)
def test_columns_are_left_out_only_where_not_all_are_whole(width, titles, left_out):
    lines = rows_of(printed(fitted(), width=width))
    at = next(number for number, line in enumerate(lines) if line.startswith("rows"))
    assert lines[at] == titles
    assert ("30.2 kB" in lines[at + 2]) == ("in" in titles)
    assert " ".join(lines[at + 3 :]) == (
        f"left out at this width: {left_out}; a pipe and --json have all" * bool(left_out)
    )
