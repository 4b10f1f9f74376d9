"""Decides which part costs least, by how much it may miss its bound, and which lengths would change that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from inferctl.estimate.calibration import CalibratedPart
from inferctl.estimate.cost import Transformer
from inferctl.estimate.forecast import Scenario, served

# Requests of each simulation at another length. Rates have an error of a few percent then.
_REQUESTS = 2000
_BISECTIONS = 4
_SHORTEST = 4
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
    longest: int,
) -> dict[str, Any] | None:
    """Return the cheapest row and how certain that is, or None if no row with a price can serve the load.

    `other_lengths`: the nearest mean lengths, below and above that of the scenario, at which another part is the
    cheapest or the difference is clear or not clear any more. With a rate, replicas are whole: a verdict that changes
    and changes back within twice the length is not found.
    """
    priced = [i for i, row in enumerate(rows) if row["costs"]]
    able = [i for i in priced if rows[i]["precision"] != "int8"] or priced  # the server's int8 is slower than fp16
    prices = {i: min(float(cost["usd_per_hour"]) for cost in rows[i]["costs"]) for i in able}
    slow = {i: band[0] / band[1] for i in able if (band := parts[i].band_for(model).throughput)}

    def at(tokens: Sequence[int]) -> Comparison | None:
        work = replace(scenario, tokens=tokens, count=_REQUESTS)
        return compare(prices, {i: served(parts[i], model, work, slo_p99_ms) for i in able}, slow, rate)

    here = {i: rows[i].get("highest_rate") or rows[i]["offline_texts_per_s"] for i in able}
    texts = 1 if slo_p99_ms is not None else scenario.inputs
    found = compare(prices, {i: float(each["high"]) / texts for i, each in here.items()}, slow, rate)
    if found is None:
        return None
    others = []
    for step in (0.5, 2.0) if found.second is not None else ():
        if (change := _first_change(scenario.tokens, step, longest, found, at)) is not None:
            length, there = change
            named = _named(rows[there.first]) if there else {"hardware": None, "precision": None}
            others.append({"tokens": length, **named, "clear": there is not None and there.clear})
    return {
        **_named(rows[found.first]),
        "next": None if found.second is None else {**_named(rows[found.second]), "times": found.times},
        "share_needed": found.share,
        "replicas_at_most": found.replicas,
        "clear": found.clear,
        "other_lengths": others,
    }


def _first_change(
    tokens: Sequence[int],
    step: float,
    longest: int,
    here: Comparison,
    at: Callable[[Sequence[int]], Comparison | None],
) -> tuple[float, Comparison | None] | None:
    """Multiply all lengths by `step` until the verdict changes. Return the mean length there, and the comparison.

    Return None if it does not change between `_SHORTEST` and `longest` tokens on average.
    """

    def scaled(factor: float) -> list[int]:
        return [max(1, min(longest, round(each * factor))) for each in tokens]

    def same(other: Comparison | None) -> bool:
        return other is not None and (other.first, other.clear) == (here.first, here.clear)

    inside = 1.0
    while same(there := at(scaled(inside * step))):
        inside *= step
        if not _SHORTEST < mean(scaled(inside)) < 0.95 * longest:
            return None
    outside = inside * step
    for _ in range(_BISECTIONS):
        middle = math.sqrt(inside * outside)
        if same(found := at(scaled(middle))):
            inside = middle
        else:
            outside, there = middle, found
    return mean(scaled(outside)), there


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"hardware": row["hardware"], "precision": row["precision"]}
