"""Tests sizes as text."""

from __future__ import annotations

import pytest

from inferctl.core.errors import UsageError
from inferctl.core.sizes import parse_size, size

PARSED = {"6GB": 6 * 10**9, "6 gb": 6 * 10**9, "1.5g": 1_500_000_000, "2GiB": 2**31, "800": 800, "10 MB": 10**7}
FORMATTED = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 4_130_000_000: "4.13 GB", 52_100_000: "52.1 MB"}


def test_sizes_are_parsed_and_formatted() -> None:
    assert {text: parse_size(text) for text in PARSED} == PARSED
    assert {number: size(number) for number in FORMATTED} == FORMATTED
    for text in ("", "six", "6XB", "-1GB", "6GB!"):
        with pytest.raises(UsageError):
            parse_size(text)
