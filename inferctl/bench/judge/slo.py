"""Decide whether a latency SLO is met: yes, no or inconclusive. No other module decides this."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from inferctl.bench import stats
from inferctl.receipts import shares
from inferctl.receipts.receipt import JsonObject

# The variance inflation factor of a sample that is too small to estimate it.
_UNKNOWN_DEPENDENCE = 5.0


@dataclass(frozen=True)
class SloResult:
    """Whether the SLO is met (None: inconclusive), and why.

    `interval_contains_limit`: it is inconclusive because the interval of the p99 contains the limit.
    """

    met: bool | None
    reason: str
    interval_contains_limit: bool = False


def describe(p99_ms: float | None, bounds_ms: Mapping[str, float] | None) -> str:
    """Return an SLO in words: `p99 100 ms`, or the bounds that 99% of all responses must be within."""
    if not bounds_ms:
        return f"p99 {p99_ms:g} ms"
    limits = " and ".join(f"{key.upper()} {value:g} ms" for key, value in bounds_ms.items())
    return f"99% of the requests within {limits}"


# The unit of `bounds_percent` in reasons.
OF_BOUNDS = "% of the bounds"


def judge_bounds(summary: JsonObject, budget: float) -> SloResult:
    """Return whether 99% of all requests are within the bounds of TTFT and gaps, from the summary of generation.

    In a sample that is too small for a p99, a share of other requests that is shown to be over 1% decides. Slow
    requests come in groups, so the sample counts as the effective number of independent requests.
    """
    found, total = summary["goodput"], summary["requests"]
    figures, bad = found["bounds_percent"], round(total * (1 - found["percent"] / 100))
    if total < figures["p99"]["needed"]:
        inflation = found.get("dependence") or _UNKNOWN_DEPENDENCE
        if shares.exceeds(math.floor(bad / inflation), math.ceil(total / inflation), shares.P99_SHARE):
            reason = f"{bad} of {total} requests ({shares.percent(bad, total)}) were not within the bounds"
            return SloResult(False, reason)
    return judge(figures, 100.0, total - figures["n"], budget, OF_BOUNDS)


def judge(latency: JsonObject, limit_ms: float, lost: int, budget: float, unit: str = " ms") -> SloResult:
    """Return whether the p99 of all requests is within the limit, from the `latency_ms` of a summary.

    The SLO is met if the whole 95% interval of the p99 is within the limit, and the effective sample size is enough: a
    smaller sample bounds its own interval. `lost` is the number of requests that failed, were rejected or were dropped.
    Their latency counts as infinite. `budget` is the share of requests that may be lost.
    """
    total = latency["n"] + lost
    loss = f"{lost} of {total} requests ({shares.percent(lost, total)}) got no good response"
    if shares.exceeds(lost, total, shares.P99_SHARE):
        return SloResult(False, loss)
    # Receipts of older versions have the p99 of good responses only.
    p99, n = (latency["p99_of_all"], total) if lost and "p99_of_all" in latency else (latency["p99"], latency["n"])
    if n < p99["needed"]:
        return SloResult(None, f"not enough samples for a p99: {n} of {p99['needed']}")
    value, low, high = (math.inf if p99[key] is None else p99[key] for key in ("value", "low", "high"))
    span, limit = f"p99 {_ms(value)}{unit} ({_ms(low)} - {_ms(high)})", f"{limit_ms:g}{unit}"
    if math.isinf(high):
        span += f", because {loss},"
    if low > limit_ms:
        return SloResult(False, f"{span} is over {limit}")
    if high > limit_ms:
        reason = f"{span} is not shown to be within {limit}: its interval contains it"
        return SloResult(None, reason, interval_contains_limit=True)
    if (size := stats.effective_size(n, p99.get("dependence"))) < p99["needed"]:
        return SloResult(
            None,
            f"{span} is within {limit}, but the effective sample size is {size} "
            f"({n} responses, autocorrelated); the p99 needs {p99['needed']}",
        )
    if lost > budget * total:
        over = f"over the error budget of {100 * budget:g}%"
        undecided = "" if shares.exceeds(lost, total, budget) else "not shown to be "
        return SloResult(None, f"{span} is within {limit}, but {loss}, which is {undecided}{over}")
    return SloResult(True, f"{span} is within {limit}")


def _ms(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.1f}"
