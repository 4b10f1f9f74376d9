"""Tests the size forecast: exact sums and unknown parts; and sizes as text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inferctl.core.errors import UsageError
from inferctl.core.sizes import parse_size, size
from inferctl.facts import catalog
from inferctl.image.size_forecast import (
    BYTECODE_BYTES,
    SERVER_WHEELS_BYTES,
    ImagePart,
    SizeForecast,
    forecast,
)

BASE = replace(catalog.base("cuda12.8"), compressed_bytes=250_000_000)
STACK = replace(catalog.stack("torch2.10-cu128"), compressed_bytes=4_130_000_000)

UNKNOWN = ImagePart("weights", None, "the hub does not respond")


def cuda(**changes: object) -> SizeForecast:
    usual = {"locks": ("torch", "server"), "weights": None, "server": 400_000}
    return forecast(BASE, STACK, **{**usual, **changes})  # type: ignore[arg-type]


def test_the_parts_are_sorted_by_size_and_add_up() -> None:
    found = cuda(weights=ImagePart("weights", 90_000_000, "the model folder"))
    assert [part.name for part in found.parts] == [
        "torch closure",
        "base image",
        "weights",
        "server dependencies",
        "server",
    ]
    added = BYTECODE_BYTES["torch"] + BYTECODE_BYTES["server"]
    assert found.total == 4_130_000_000 + 250_000_000 + 90_000_000 + SERVER_WHEELS_BYTES + added + 400_000
    assert found.complete
    assert all(part.source for part in found.parts)


def test_a_base_with_torch_has_no_torch_closure() -> None:
    assert "torch closure" not in [part.name for part in cuda(locks=("server",)).parts]


def test_vllm_is_a_part_of_its_own() -> None:
    entry = catalog.base("vllm-cuda13.0")
    stack = catalog.stack(entry.stack)
    found = forecast(entry, stack, locks=("torch", "vllm", "server"), weights=None, server=0)
    (part,) = [part for part in found.parts if part.name == "vLLM closure"]
    assert stack.vllm_bytes
    assert part.bytes == stack.vllm_bytes + BYTECODE_BYTES["vllm"]
    assert "https://" not in part.source
    assert found.complete


def test_an_unknown_size_makes_the_total_a_lower_bound() -> None:
    found = cuda(weights=UNKNOWN)
    assert not found.complete
    assert found.parts[-1].name == "weights"
    assert found.total == cuda().total


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
