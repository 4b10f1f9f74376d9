"""Compare the quality of two receipts. Exact, without intervals: the vectors are computed, not sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inferctl.bench.judge.comparable import ReceiptPair
from inferctl.bench.judge.compare_result import MetricResult, QualityTolerance

# The largest default drop, and the drop that is always allowed: near-ties change places if the batches differ.
_MAX_DROP = {"cosine_p1": 0.005, "recall_at_10": 0.02}
_MIN_DROP = {"cosine_p1": 0.0005, "recall_at_10": 0.005}


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
    if "cosine" not in new:
        return [MetricResult("quality", "", "regression", f"broken: {new.get('reason')}")]
    same_texts = pair.same_texts and old.get("texts") == new.get("texts")
    known = old if old.get("checked") and "cosine" in old and same_texts else {}
    limits = new.get("limits") or {}
    old_cosine, new_cosine = (known.get("cosine") or {}).get("p1"), new["cosine"]["p1"]
    old_recall, new_recall = known.get("recall_at_10"), new["recall_at_10"]
    rows = (("cosine_p1", old_cosine, new_cosine), ("recall_at_10", old_recall, new_recall))
    return [_judge(name, before, after, limits.get(name), drops[name], allow) for name, before, after in rows]


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
