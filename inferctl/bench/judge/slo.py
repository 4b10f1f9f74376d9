"""Decide whether a latency SLO is met: yes, no or inconclusive. No other module decides this."""

from __future__ import annotations

from dataclasses import dataclass

from inferctl.bench import stats
from inferctl.bench.receipt import JsonObject

# With more than this share of requests without a good response, the p99 of all requests has no upper bound.
_P99_SHARE = 0.01


@dataclass(frozen=True)
class SloResult:
    """Whether the SLO is met (None: inconclusive), and why.

    `interval_contains_limit`: it is inconclusive because the interval of the p99 contains the limit.
    """

    met: bool | None
    reason: str
    interval_contains_limit: bool = False


def judge(latency: JsonObject, limit_ms: float, lost: float = 0.0, budget: float = 0.0) -> SloResult:
    """Return whether the p99 of `latency` (from `summary.latency_summary`) is within the limit.

    The SLO is met if the whole 95% interval of the p99 is within the limit, and the effective sample size is enough: a
    smaller sample bounds its own interval. `lost` is the share of requests that failed, were rejected or were dropped.
    They have no latency and count as above each limit. `budget` is the share of requests that may be lost.
    """
    n, p99 = latency["n"], latency["p99"]
    if lost > _P99_SHARE:
        return SloResult(False, f"{100 * lost:.2g}% of the requests got no good response")
    if p99["value"] is None:
        return SloResult(None, f"not enough samples for a p99: {n} of {p99['needed']}")
    span = f"p99 {p99['value']:.1f} ms ({p99['low']:.1f} - {p99['high']:.1f})"
    if p99["low"] > limit_ms:
        return SloResult(False, f"{span} is over {limit_ms:g} ms")
    if p99["high"] > limit_ms:
        reason = f"{span} is not shown to be within {limit_ms:g} ms: its interval contains it"
        return SloResult(None, reason, interval_contains_limit=True)
    if (size := stats.effective_size(n, p99.get("dependence"))) < p99["needed"]:
        return SloResult(
            None,
            f"{span} is within {limit_ms:g} ms, but the effective sample size is {size} "
            f"({n} responses, autocorrelated); the p99 needs {p99['needed']}",
        )
    if lost > budget:
        reason = f"{span} is within {limit_ms:g} ms, but {100 * lost:.2g}% of the requests got no good response"
        return SloResult(None, reason)
    return SloResult(True, f"{span} is within {limit_ms:g} ms")
