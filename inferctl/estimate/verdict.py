"""Decides which part costs least, by how much it may miss its bound, and for which lengths another one costs less."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from inferctl.estimate.calibration import CalibratedPart
from inferctl.estimate.cost import Transformer
from inferctl.estimate.forecast import Scenario, served

# Requests of each simulation at another length. Rates have an error of a few percent then.
_REQUESTS = 2000
_BISECTIONS = 4
_SHORTEST = 4


def decide(
    rows: Sequence[Mapping[str, Any]],
    parts: Sequence[CalibratedPart],
    model: Transformer,
    scenario: Scenario,
    rate: float | None,
    slo_p99_ms: float | None,
    longest: int,
) -> dict[str, Any] | None:
    """Return the cheapest row and how certain that is, or None if no row with a price can serve the requests.

    `share_needed`: the share of its bound above which the cheapest stays the cheapest, if the next one reaches its own.
    `clear`: also the slow end of its error band is above that.
    `other_lengths`: the nearest mean lengths, below and above that of the scenario, at which another part is cheaper.
    """
    ranked = sorted((i for i, row in enumerate(rows) if row["costs"]), key=lambda i: _usd(rows[i], "per_million_texts"))
    if not ranked:
        return None
    first = rows[ranked[0]]
    found = {**_named(first), "next": None, "share_needed": None, "clear": None, "other_lengths": []}
    if len(ranked) == 1:
        return found
    second = rows[ranked[1]]
    found["next"] = {**_named(second), "times": _usd(second, "per_million_texts") / _usd(first, "per_million_texts")}
    found["share_needed"] = 1 / found["next"]["times"]
    if rate:
        # With so many replicas, the first still costs less than the next.
        price = _usd(first, "per_hour_of_all") / first["replicas"]["low"]
        replicas = max(first["replicas"]["low"], math.ceil(_usd(second, "per_hour_of_all") / price) - 1)
        one = (first.get("highest_rate") or first["offline_texts_per_s"])["high"]
        one /= 1 if "highest_rate" in first else scenario.inputs
        found["replicas_at_most"] = replicas
        found["share_needed"] = rate / replicas / one
    slow, fast = parts[ranked[0]].band_for(model).throughput
    found["clear"] = found["share_needed"] < slow / fast

    def cheapest(tokens: Sequence[int]) -> int | None:
        costs = {}
        for i in ranked:
            one = served(parts[i], model, replace(scenario, tokens=tokens, count=_REQUESTS), slo_p99_ms)
            price = min(each["usd_per_hour"] for each in rows[i]["costs"])
            costs[i] = price * (math.ceil(rate / one) / rate if rate else 1 / one) if one else math.inf
        best = min(costs, key=costs.__getitem__)
        return best if costs[best] < math.inf else None

    for step in (0.5, 2.0):
        if (other := _first_other(scenario.tokens, step, longest, ranked[0], cheapest)) is not None:
            length, i = other
            found["other_lengths"].append(
                {"tokens": length, **(_named(rows[i]) if i is not None else {"hardware": None, "precision": None})}
            )
    return found


def _first_other(
    tokens: Sequence[int], step: float, longest: int, first: int, cheapest: Callable[[Sequence[int]], int | None]
) -> tuple[float, int | None] | None:
    """Multiply all lengths by `step` until `first` is not the cheapest. Return the mean length there, and which one is.

    Return None if that does not happen between `_SHORTEST` and `longest` tokens on average.
    """

    def scaled(factor: float) -> list[int]:
        return [max(1, min(longest, round(each * factor))) for each in tokens]

    inside = 1.0
    while (other := cheapest(scaled(inside * step))) == first:
        inside *= step
        if not _SHORTEST < mean(scaled(inside)) < 0.95 * longest:
            return None
    outside = inside * step
    for _ in range(_BISECTIONS):
        middle = math.sqrt(inside * outside)
        if (found := cheapest(scaled(middle))) == first:
            inside = middle
        else:
            outside, other = middle, found
    return mean(scaled(outside)), other


def _usd(row: Mapping[str, Any], what: str) -> float:
    """Return the lowest cost of a row over the providers."""
    return min(float(cost[f"usd_{what}"]["low"]) for cost in row["costs"])


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"hardware": row["hardware"], "precision": row["precision"]}
