"""Tests which part is cheaper, and when that is undecided."""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.cli.estimate import verdict
from inferctl.estimate import document


def row(key: str, price: float, **rate: Any) -> dict[str, Any]:
    figure = {"value": None, "low": None, "high": None, "bound": None} | rate
    costs = [{"provider": "aws", "usd_per_hour": price}]
    return {"hardware": key, "precision": "fp16", "offline_texts_per_s": figure, "costs": costs}


BANDED = {"value": 100.0, "low": 90.0, "high": 110.0}
BOUND = {"high": 110.0, "bound": "at most"}


def judged(price: float, mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    rows = [row("a100-40gb-sxm", price, **mine), row("t4", 1.0, **theirs)]
    document.compare(rows, "t4")
    return rows[0]


@pytest.mark.parametrize(
    ("price", "expected", "reason"),
    [
        (3.0, "cheaper", "below"),
        (4.2, "undecided", "price ratio inside the band"),
        (6.0, "undecided", "price ratio inside the band"),
        (6.5, "more expensive", "above"),
    ],
)
def test_a_price_inside_the_band_of_the_break_even_price_is_undecided(price: float, expected: str, reason: str) -> None:
    """The break-even price is 5x: 4.09x at the slow end (450 / 110) and 6.11x at the fast end (550 / 90)."""
    mine = {key: 5 * value for key, value in BANDED.items()}
    found = judged(price, mine, BANDED)
    assert found["against"]["break_even"]["value"] == pytest.approx(5)
    (one,) = found["against"]["prices"]
    assert one["verdict"] == expected and reason in one["reason"]
    assert "break-even price 5.00x (4.09 to 6.11)" in verdict(found)
    assert (expected == "undecided") is ("undecided: price ratio inside the band" in verdict(found))


@pytest.mark.parametrize(("limited", "price"), [("a100-40gb-sxm", 9.0), ("t4", 0.1)])
def test_a_fast_end_that_the_front_end_limits_decides_nothing(limited: str, price: float) -> None:
    """A faster front end could raise the rate of the part that looks too slow for its price."""
    rows = [row("a100-40gb-sxm", price, **BANDED), row("t4", 1.0, **BANDED)]
    document.compare(rows, "t4")
    assert rows[0]["against"]["prices"][0]["verdict"] != "undecided"
    for one in rows:
        if one["hardware"] == limited:
            one["limited_by"] = "front end"
    document.compare(rows, "t4")
    (found,) = rows[0]["against"]["prices"]
    assert (found["verdict"], found["reason"]) == ("undecided", "limited by the front end")
    assert "behind this front end" in verdict(rows[0])


def test_two_bounds_decide_nothing() -> None:
    found = judged(0.01, BOUND, BOUND)
    assert found["against"]["prices"][0]["verdict"] == "undecided"
    assert found["against"]["break_even"]["of_bounds"] == pytest.approx(1)
    assert "only bounds are known" in verdict(found)


def test_a_bound_decides_against_the_part_that_cannot_reach_its_price() -> None:
    """At most 110 divided by at least 90 is at most 1.22.

    A price ratio of 2 is too high, a price ratio of 1 may be.
    """
    assert judged(2.0, BOUND, BANDED)["against"]["prices"][0]["verdict"] == "more expensive"
    assert judged(1.0, BOUND, BANDED)["against"]["prices"][0]["verdict"] == "undecided"
    assert judged(0.5, BANDED, BOUND)["against"]["prices"][0]["verdict"] == "cheaper"
    assert judged(1.0, BANDED, BOUND)["against"]["prices"][0]["verdict"] == "undecided"
