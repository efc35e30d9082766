import pytest

from moetune.report.format import count, duration, human_bytes, human_flops, human_time, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.12"), (0.125, "0.13"), (1.236, "1.24"), (12.34, "12.3"), (123.4, "123"), (99_999.6, "100,000")],
)
def test_significant_keeps_about_three_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8192, "8,192"),
        (8192.0, "8,192"),
        (12.34, "12.3"),
        (1023.6, "1,024"),
        (0.5, "0.50"),
        (0.0312, "0.031"),
        (0.125, "0.13"),
        (0.0625, "0.063"),
    ],
)
def test_a_count_is_whole_where_it_can_be(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (human_bytes(0), "0 B"),
        (human_bytes(999), "999 B"),
        (human_bytes(15360), "15.4 kB"),
        (human_bytes(117_440_512), "117 MB"),
        (human_bytes(999_999), "1.00 MB"),
        (human_flops(5_772_436_045_824), "5.77 TFLOP"),
        (human_time(51.23), "51.2 µs"),
        (human_time(4210.0), "4.21 ms"),
        (human_time(1.2e6), "1.20 s"),
    ],
)
def test_a_unit_is_the_largest_that_leaves_a_whole_digit(shown, text):
    assert shown == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (8.4, "8 s"), (89, "89 s"), (170, "3 min"), (6000, "1 h 40 min")]
)
def test_a_wait_is_rounded(seconds, text):
    assert duration(seconds) == text
