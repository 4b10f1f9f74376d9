"""Decides which part costs least, and by how much it may miss its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.estimate.calibration import CalibratedPart
from inferctl.estimate.cost import Transformer
from inferctl.estimate.forecast import Scenario

_EQUAL = 1 + 1e-6  # floats


@dataclass(frozen=True)
class Comparison:
    """The cheapest part of a comparison, and the next one if another can serve the load.

    `times`: cost of the next one relative to the first. `share`: the share of its bound above which the first stays the
    cheapest, if the next one reaches its own; `replicas`: with so many of them. `clear`: the slow end of its error band
    is above that.
    """

    first: int
    second: int | None = None
    times: float = math.inf
    share: float = 0.0
    replicas: int | None = None
    clear: bool = True


def compare(
    prices: Mapping[int, float], rates: Mapping[int, float], slow: Mapping[int, float], rate: float | None
) -> Comparison | None:
    """Compare parts by cost, or return None if none can serve the load.

    `prices`: USD per hour. `rates`: requests per second that one replica serves. `slow`: the slow end of the error
    band, relative to the fast end. `rate`: requests per second of the load, None for full load.
    """
    costs = {i: prices[i] * (math.ceil(rate / one) if rate else 1 / one) for i, one in rates.items() if one}
    if len(costs) < 2:
        return Comparison(next(iter(costs))) if costs else None
    first, second = sorted(costs, key=costs.__getitem__)[:2]
    times, replicas = costs[second] / costs[first], None
    if times < _EQUAL:
        return Comparison(first, second, 1.0, 1.0, None, False)
    share = 1 / times
    if rate:
        # With so many replicas, the first still costs less than the next.
        replicas = max(math.ceil(rate / rates[first]), math.ceil(costs[second] / prices[first] / _EQUAL) - 1)
        share = rate / replicas / rates[first]
    return Comparison(first, second, times, share, replicas, share < slow[first])


def decide(
    rows: Sequence[Mapping[str, Any]],
    parts: Sequence[CalibratedPart],
    model: Transformer,
    scenario: Scenario,
    rate: float | None,
    slo_p99_ms: float | None,
) -> dict[str, Any] | None:
    """Return the cheapest row and how certain that is, or None if no row with a price can serve the load."""
    priced = [i for i, row in enumerate(rows) if row["costs"]]
    able = [i for i in priced if rows[i]["precision"] != "int8"] or priced  # the server's int8 is slower than fp16
    prices = {i: min(float(cost["usd_per_hour"]) for cost in rows[i]["costs"]) for i in able}
    slow = {i: band[0] / band[1] for i in able if (band := parts[i].band_for(model).throughput)}
    texts = 1 if slo_p99_ms is not None else scenario.inputs
    highest = {i: rows[i].get("highest_rate") or rows[i]["offline_texts_per_s"] for i in able}
    found = compare(prices, {i: float(each["high"]) / texts for i, each in highest.items()}, slow, rate)
    if found is None:
        return None
    return {
        **_named(rows[found.first]),
        "next": None if found.second is None else {**_named(rows[found.second]), "times": found.times},
        "share_needed": found.share,
        "replicas_at_most": found.replicas,
        "clear": found.clear,
    }


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"hardware": row["hardware"], "precision": row["precision"]}
