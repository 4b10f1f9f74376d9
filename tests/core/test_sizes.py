"""Tests sizes as text."""

from __future__ import annotations

import pytest

from inferctl.core.errors import UsageError
from inferctl.core.sizes import parse_size, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GB", 6_000_000_000),
        ("6 gb", 6_000_000_000),
        ("1.5g", 1_500_000_000),
        ("2GiB", 2**31),
        ("800", 800),
        ("10 MB", 10_000_000),
    ],
)
def test_sizes_are_parsed(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "six", "6XB", "-1GB", "6GB!"])
def test_an_invalid_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_sizes_are_formatted() -> None:
    assert [size(n) for n in (0, 999, 1000, 4_130_000_000, 52_100_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "4.13 GB",
        "52.1 MB",
    ]
