"""Compare the quality of two receipts.

Exact, without intervals: the outputs are computed, not sampled. The exception is the top-1 agreement of generation,
which depends on how many of the most likely tokens are near-ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from inferctl.bench.judge.comparable import ReceiptPair
from inferctl.bench.judge.compare_result import MetricResult, QualityTolerance
from inferctl.receipts.receipt import JsonObject

# The largest default drop, and the drop that is always allowed: near-ties change places if the batches differ.
_MAX_DROP = {"cosine_p1": 0.005, "recall_at_10": 0.02, "kendall": 0.02, "top_1": 0.03}
_MIN_DROP = {"cosine_p1": 0.0005, "recall_at_10": 0.005, "kendall": 0.005, "top_1": 0.01}
# The same for the KL divergence (nats), which rises. bf16 differs by 0.0006 between two implementations.
_MAX_RISE, _MIN_RISE = 0.02, 0.001


def judge(pair: ReceiptPair, allow: Sequence[str]) -> list[MetricResult]:
    """Return the verdicts on the quality of `pair.new`, by the limits of its plan and by the quality of `pair.old`."""
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
    noise = _noise(old, new) if "kl" in new and before else 0.0
    rows = [_judge(name, before.get(name), value, limits.get(name), noise, allow) for name, value in after.items()]
    return [*rows, *_judge_scores(before and old, new), *_judge_kl(before and old, new, allow)]


def _figures(quality: JsonObject) -> dict[str, float]:
    """Return the figures that are 1 if a server equals fp32; empty for broken outputs."""
    if "cosine" in quality:
        return {"cosine_p1": quality["cosine"]["p1"], "recall_at_10": quality["recall_at_10"]}
    if "kl" in quality:
        return {"top_1": quality["agreement"]["share"]}
    if "kendall" in quality:
        return {"kendall": quality["kendall"]}
    return {"top_1": quality["top_1"]} if "top_1" in quality else {}


def _noise(old: JsonObject, new: JsonObject) -> float:
    """Return the half-width of the 95% interval of the difference of two top-1 agreements, as if independent."""
    intervals = [side["agreement"].get("interval") or (0.0, 0.0) for side in (old, new)]
    return math.hypot(*((high - low) / 2 for low, high in intervals))


def _judge_kl(old: JsonObject, new: JsonObject, allow: Sequence[str]) -> list[MetricResult]:
    """Return the verdict on the mean KL divergence of generation: like `allowed_drop`, but smaller is better."""
    if not (found := new.get("kl")):
        return []
    before, after, most = (old.get("kl") or {}).get("mean"), found["mean"], new["limits"]["kl"]
    rise = _MAX_RISE
    if before is not None and "precision" not in allow:
        rise = min(_MAX_RISE, max(_MIN_RISE, before))
    reason = ""
    if after > most:
        reason = f"above the plan's limit of {most:g}"
    elif before is not None and after - before > rise + 1e-9:
        reason = f"rose by {after - before:.4g}, the limit is {rise:.4g}"
    return [_verdict("kl", reason, before, after, QualityTolerance(most=most))]


def _judge_scores(old: JsonObject, new: JsonObject) -> list[MetricResult]:
    """Return the verdict on the maximum difference of scores, by the limit of the plan."""
    if not (found := new.get("score_difference")):
        return []
    low, high = found["range"]
    limit = new["limits"]["score_difference"] * (high - low)
    reason = f"above the plan's limit of {limit:.4g}" if found["max"] > limit else ""
    before = (old.get("score_difference") or {}).get("max")
    return [_verdict("score_difference", reason, before, found["max"], QualityTolerance(most=limit))]


def allowed_drop(name: str, old: float | None, allow: Sequence[str] = ()) -> float:
    """Return the default drop of a quality metric: its distance from 1 may double, within a least and a largest drop.

    If different precisions are allowed, the largest drop applies, since precisions differ in quality.
    """
    if old is None or "precision" in allow:
        return _MAX_DROP[name]
    return min(_MAX_DROP[name], max(_MIN_DROP[name], 1 - old))


def _judge(
    name: str, old: float | None, new: float, least: float | None, noise: float, allow: Sequence[str]
) -> MetricResult:
    drop = max(allowed_drop(name, old, allow), noise)
    reason = ""
    if least is not None and new < least:
        reason = f"below the plan's limit of {least:g}"
    # Both values are rounded to a few decimals: a drop of exactly the limit must not fail for its last binary digit.
    elif old is not None and old - new > drop + 1e-9:
        reason = f"dropped by {old - new:.4g}, the limit is {drop:g}"
    return _verdict(name, reason, old, new, QualityTolerance(drop, least))


def _verdict(name: str, reason: str, old: float | None, new: float, limits: QualityTolerance) -> MetricResult:
    unknown = "" if old is not None else "the old receipt has no value for the same texts"
    return MetricResult(
        name, "", "regression" if reason else "no regression", reason or unknown, old=old, new=new, limits=limits
    )
