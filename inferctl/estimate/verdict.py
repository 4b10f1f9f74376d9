"""Decides which part costs least, and by how much it may miss its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.estimate.calibration import CalibratedPart
from inferctl.estimate.cost import Transformer
from inferctl.estimate.forecast import Scenario

_EQUAL = 1 + 1e-6  # floats


def decide(
    rows: Sequence[Mapping[str, Any]],
    parts: Sequence[CalibratedPart],
    model: Transformer,
    scenario: Scenario,
    rate: float | None,
    slo_p99_ms: float | None,
) -> dict[str, Any] | None:
    """Return the cheapest row and how certain that is, or None if no row with a price can serve the load.

    `next` is the next cheapest row that can, with its cost relative to the first. The first stays the cheapest above
    `share_needed` of its bound, even if the next one reaches its own: with up to `replicas_at_most` replicas. `clear`:
    the slow end of its error band is above that.
    """
    priced = [i for i, row in enumerate(rows) if row["costs"]]
    able = [i for i in priced if rows[i]["precision"] != "int8"] or priced  # the server's int8 is slower than fp16
    prices = {i: min(float(cost["usd_per_hour"]) for cost in rows[i]["costs"]) for i in able}
    slow = {i: band[0] / band[1] for i in able if (band := parts[i].band_for(model).throughput)}
    texts = 1 if slo_p99_ms is not None else scenario.inputs
    highest = {i: rows[i].get("highest_rate") or rows[i]["offline_texts_per_s"] for i in able}
    rates = {i: float(each["high"]) / texts for i, each in highest.items()}
    costs = {i: prices[i] * (math.ceil(rate / one) if rate else 1 / one) for i, one in rates.items() if one}
    if not costs:
        return None
    first, *others = sorted(costs, key=costs.__getitem__)
    found = {**_named(rows[first]), "next": None, "share_needed": 0.0, "replicas_at_most": None, "clear": True}
    if not others:
        return found
    second, replicas = others[0], None
    times = costs[second] / costs[first]
    if equal := times < _EQUAL:
        times = share = 1.0
    elif rate:
        # With so many replicas, the first still costs less than the next.
        replicas = max(math.ceil(rate / rates[first]), math.ceil(costs[second] / prices[first] / _EQUAL) - 1)
        share = rate / replicas / rates[first]
    else:
        share = 1 / times
    return found | {
        "next": {**_named(rows[second]), "times": times},
        "share_needed": share,
        "replicas_at_most": replicas,
        "clear": not equal and share < slow[first],
    }


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"hardware": row["hardware"], "precision": row["precision"]}
