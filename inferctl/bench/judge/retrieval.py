"""Judge nDCG@10 of two systems over the same queries: the paired t-test of `verdict.py`, in points (1 is 0.01)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from inferctl.bench.judge import verdict
from inferctl.bench.judge.comparable import ReceiptPair
from inferctl.bench.judge.compare_result import MetricResult, PointsResult, QualityTolerance
from inferctl.bench.judge.verdict import Outcome
from inferctl.receipts.receipt import JsonObject, Receipt

NAME = "ndcg_at_10"
MARGIN = 1.0
# The t-test keeps its error rate with skewed differences only if there are enough of them.
MIN_QUERIES = 30
# Queries that do not differ do not show that none would. Two more, so many points around the mean, keep the interval
# true if few differ, as those of Agresti and Coull do for a share.
_UNSEEN = 50.0


@dataclass(frozen=True)
class Difference:
    """The change of nDCG@10 in points, with its interval. `loss_at_most` is the upper bound of a loss (one-sided, 95%).

    `queries_needed`: the judged queries with which the interval of a true difference of one point excludes zero with
    80% probability, if as many of them differ as of these.
    """

    outcome: Outcome
    points: float
    low: float
    high: float
    loss_at_most: float
    queries_needed: int
    reason: str


def difference(old: Sequence[float], new: Sequence[float], margin: float, error_rate: float) -> Difference:
    """Return the verdict on nDCG@10 of the same queries. A loss of up to `margin` points is tolerated."""
    losses = [100 * (before - after) for before, after in zip(old, new, strict=True)]
    mean, spread = statistics.fmean(losses), statistics.stdev(losses)
    more = [*losses, mean - _UNSEEN, mean + _UNSEEN]
    found = verdict.decide_difference([0.0] * len(more), more, True, margin, error_rate)
    z = NormalDist().inv_cdf(1 - error_rate / 2) + NormalDist().inv_cdf(verdict.POWER)
    outcome, reason = found.outcome, found.reason
    if len(losses) < MIN_QUERIES:
        outcome, reason = "not enough evidence", f"{len(losses)} queries are judged: {MIN_QUERIES} are needed at least"
    # Adding 0.0 makes -0.0 positive.
    points, low, high = (round(-loss, 4) + 0.0 for loss in (found.change, found.high, found.low))
    half = (z * spread) ** 2 / 2  # n is enough if z * sqrt((spread**2 + 2 * _UNSEEN**2 / n) / n) is at most 1
    needed = math.ceil(half + math.sqrt(half**2 + 2 * (z * _UNSEEN) ** 2))
    return Difference(outcome, points, low, high, round(found.worst_case, 4), needed, reason)


def needed(found: Difference, done: int) -> str:
    """Return the end of a sentence: the queries that one point needs, if `done` are fewer, but enough to estimate."""
    more = found.reason and found.queries_needed > done >= MIN_QUERIES
    return f"; one point needs about {found.queries_needed:,} judged queries" if more else ""


def judge(pair: ReceiptPair, margin: float, family: int, required: bool) -> list[MetricResult]:
    """Return the verdict on the first variant of a pair, as a list of one.

    It is empty if no receipt has any, unless it is `required`.
    """
    old, new = _sections(pair)
    if not (old or new or required):
        return []
    if reason := _missing(old, new):
        return [MetricResult(NAME, "points", "not enough evidence" if old or required else "not compared", reason)]
    first, second = (side["variants"][0] for side in (old, new))
    found = difference(first["per_query"], second["per_query"], margin, verdict.ERROR_RATE / family)
    return [
        MetricResult(
            NAME,
            "points",
            found.outcome,
            found.reason + needed(found, len(first["per_query"])),
            round(100 * first[NAME], 4),
            round(100 * second[NAME], 4),
            points=PointsResult(found.points, (found.low, found.high), found.loss_at_most),
            limits=QualityTolerance(margin),
        )
    ]


def is_judged(pair: ReceiptPair) -> bool:
    """Return whether both receipts have nDCG of the same queries, so that the pair shares the error rate."""
    old, new = _sections(pair)
    return bool(old or new) and not _missing(old, new)


def is_weak(sealed: Receipt) -> bool:
    """Return whether the queries of a receipt were made of its documents."""
    return bool(((sealed.data.get("retrieval") or {}).get("collection") or {}).get("weak"))


def _sections(pair: ReceiptPair) -> list[JsonObject]:
    return [(sealed.data.get("retrieval") or {}) if sealed else {} for sealed in (pair.old, pair.new)]


def _missing(old: JsonObject, new: JsonObject) -> str:
    """Return why the two sections cannot be compared, or an empty string."""
    for side, found in (("old", old), ("new", new)):
        if not found.get("variants"):
            return f"the {side} receipt has no nDCG: {found.get('reason') or 'it was measured without `--retrieval`'}"
    if old["collection"]["sha256"] != new["collection"]["sha256"]:
        return "the collections differ: measure both with the same folder"
    return ""
