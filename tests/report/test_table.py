from shown import made_choice, made_profile, printed, rows_of

from moetune.report.profile import profile_table


def test_numbers_of_a_column_end_below_each_other():
    lines = printed(profile_table(made_profile(made_choice(8, 60.0), made_choice(64, 1234.0)))).splitlines()[3:]
    assert len({line.index(number) + len(number) for line, number in zip(lines, ("60.0", "1,234"), strict=True)}) == 1


def test_times_are_in_ms_where_all_are_long():
    text = printed(profile_table(made_profile(made_choice(8, 2_500.0), made_choice(64, 150_000.0))))
    assert rows_of(text)[:2] == ["time default", "rows tactic (ms) (ms) gain 95 % bounds"]
    assert rows_of(text)[3:] == ["8 eager 2.50 2.50 kept –", "64 eager 150 150 kept –"]
