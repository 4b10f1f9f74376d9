"""Tests the estimate of a cold start against sizes that were measured, and its parts for each kind of image."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inferctl.config.spec import Spec
from inferctl.facts import catalog
from inferctl.image import cold_start
from inferctl.image.cold_start import StartPart

WEIGHTS = 90_900_000


def start(
    base: str = "cpu", *, weights: int | None = WEIGHTS, known: bool = True, **settings: object
) -> dict[str, StartPart]:
    document = {
        "name": "x",
        "model": {"source": "team/x", "weights": settings.pop("stored", "bake")},
        "image": {"base": base},
        "deploy": settings,
    }
    entry = catalog.base(base)
    entry = entry if known else replace(entry, compressed_bytes=None)
    found = cold_start.of_spec(Spec.model_validate(document), entry, catalog.stack(entry.stack), weights)
    return {part.name: part for part in found}


def test_known_sizes_are_divided_by_the_rates() -> None:
    pull, unpack = cold_start.of_image(3_000_000_000, 5_200_000_000, "zstd")
    assert (pull.seconds, unpack.seconds) == (30, pytest.approx(47.3, abs=0.1))
    assert cold_start.of_image(3_000_000_000, 5_200_000_000, "gzip")[1].seconds > unpack.seconds


def test_the_estimate_is_close_to_a_measured_image() -> None:
    """The CPU image of all-MiniLM-L6-v2 had 439 MB with gzip, on a base of 96 MB instead of 46."""
    pulled = start()["pull"].seconds * 100_000_000
    assert pulled == pytest.approx(439_000_000 - (96_000_000 - 46_000_000), rel=0.1)


@pytest.mark.parametrize(
    ("base", "stored", "expected"),
    [
        ("cpu", "bake", {"pull", "unpack", "load and warm-up"}),
        ("cpu", "mount", {"pull", "unpack", "load and warm-up"}),
        ("cpu", "download", {"pull", "unpack", "download", "load and warm-up"}),
        ("vllm-cuda13.0", "mount", {"pull", "unpack"}),
    ],
)
def test_the_parts_of_each_image(base: str, stored: str, expected: set[str]) -> None:
    assert set(start(base, stored=stored)) == expected


def test_weights_in_the_image_are_pulled() -> None:
    more = start(stored="bake")["pull"].seconds - start(stored="mount")["pull"].seconds
    assert more == pytest.approx(WEIGHTS / 100_000_000)


def test_without_a_size_there_is_no_estimate() -> None:
    assert start(known=False) == {}
    assert start(weights=None, stored="bake") == {}
    assert set(start(weights=None, stored="mount")) == {"pull", "unpack"}
