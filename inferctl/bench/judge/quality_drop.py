"""Compare the quality of two receipts. Exact, without intervals: the outputs are computed, not sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inferctl.bench.judge.comparable import ReceiptPair
from inferctl.bench.judge.compare_result import MetricResult, QualityTolerance
from inferctl.bench.receipt import JsonObject

# The largest default drop, and the drop that is always allowed: near-ties change places if the batches differ.
_MAX_DROP = {"cosine_p1": 0.005, "recall_at_10": 0.02, "kendall": 0.02}
_MIN_DROP = {"cosine_p1": 0.0005, "recall_at_10": 0.005, "kendall": 0.005}


def judge(pair: ReceiptPair, drops: Mapping[str, float | None], allow: Sequence[str]) -> list[MetricResult]:
    """Return the verdicts on the quality of `pair.new`, by the limits of its plan and by the quality of `pair.old`.

    `drops` has the largest drop of each metric; None: `allowed_drop`.
    """
    assert pair.new is not None
    old, new = pair.old.quality, pair.new.quality
    if not new.get("checked"):
        if old.get("checked"):
            reason = f"the new receipt has no quality check ({new.get('reason')}), the old receipt has one"
            return [MetricResult("quality", "", "not enough evidence", reason)]
        return [MetricResult("quality", "", "not compared", f"not checked: {new.get('reason')}")]
    after = _figures(new)
    if not after:
        return [MetricResult("quality", "", "regression", f"broken: {new.get('reason')}")]
    same_texts = pair.same_texts and old.get("texts") == new.get("texts")
    before = _figures(old) if old.get("checked") and same_texts else {}
    limits = new.get("limits") or {}
    rows = [
        _judge(name, before.get(name), value, limits.get(name), drops.get(name), allow) for name, value in after.items()
    ]
    return [*rows, *_judge_scores(before and old, new)]


def _figures(quality: JsonObject) -> dict[str, float]:
    """Return the figures that are 1 if a server equals fp32; empty for broken outputs."""
    if "cosine" in quality:
        return {"cosine_p1": quality["cosine"]["p1"], "recall_at_10": quality["recall_at_10"]}
    return {"kendall": quality["kendall"]} if "kendall" in quality else {}


def _judge_scores(old: JsonObject, new: JsonObject) -> list[MetricResult]:
    """Return the verdict on the maximum difference of rerank scores, by the limit of the plan."""
    if not (found := new.get("score_difference")):
        return []
    low, high = found["range"]
    limit = new["limits"]["score_difference"] * (high - low)
    worse = found["max"] > limit
    return [
        MetricResult(
            "score_difference",
            unit="",
            outcome="regression" if worse else "no regression",
            reason=f"above the plan's limit of {limit:.4g}" if worse else "",
            old=(old.get("score_difference") or {}).get("max"),
            new=found["max"],
            limits=QualityTolerance(most=limit),
        )
    ]


def allowed_drop(name: str, old: float | None, allow: Sequence[str] = ()) -> float:
    """Return the default drop of a quality metric: its distance from 1 may double, within a least and a largest drop.

    If different precisions are allowed, the largest drop applies, since precisions differ in quality.
    """
    if old is None or "precision" in allow:
        return _MAX_DROP[name]
    return min(_MAX_DROP[name], max(_MIN_DROP[name], 1 - old))


def _judge(
    name: str, old: float | None, new: float, least: float | None, given_drop: float | None, allow: Sequence[str]
) -> MetricResult:
    drop = allowed_drop(name, old, allow) if given_drop is None else given_drop
    reason = ""
    if least is not None and new < least:
        reason = f"below the plan's limit of {least:g}"
    # Both values are rounded to a few decimals: a drop of exactly the limit must not fail for its last binary digit.
    elif old is not None and old - new > drop + 1e-9:
        reason = f"dropped by {old - new:.4g}, the limit is {drop:g}"
    return MetricResult(
        name,
        unit="",
        outcome="regression" if reason else "no regression",
        reason=reason or ("" if old is not None else "the old receipt has no value for the same texts"),
        old=old,
        new=new,
        limits=QualityTolerance(drop, least),
    )
