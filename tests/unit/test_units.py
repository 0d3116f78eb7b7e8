"""Figures as people read them; how sizes are parsed is in tests/unit/memory/test_budget.py."""

import pytest

from foreroute.units import format_speed, megabytes, number, percent, span


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0.00"), (1.234, "1.23"), (9.996, "10.0"), (12.34, "12.3"), (99.96, "100"), (12345.6, "12,346"),
     (-12.34, "-12.3")],
)  # fmt: skip
def test_three_digits_that_count(value: float | None, shown: str) -> None:
    assert number(value) == shown
    assert number(value, "ms") == ("–" if value is None else f"{shown} ms")


def test_a_range_of_one_number_is_that_number() -> None:
    assert span(1.001, 1.002, "s") == "1.00 s"
    assert span(1, 20, "s") == "1.00 to 20.0 s"


def test_shares() -> None:
    assert [percent(share) for share in (None, 0.0523, 0.2971, 1)] == ["–", "5.23 %", "29.7 %", "100 %"]
    assert [percent(share, 1, "") for share in (None, 0.0523, 1)] == ["–", "5.2", "100.0"]


def test_bytes_read() -> None:
    assert [megabytes(nbytes) for nbytes in (0, 1234, 10**6, 12_345_678)] == ["0.000", "0.001", "1.00", "12.3"]
    assert [format_speed(speed) for speed in (350e6, 999e6, 2e9)] == ["350 MB/s", "999 MB/s", "2.00 GB/s"]
