"""Whether a latency SLO is met, as far as the sample supports it: yes, no, or inconclusive. Nothing else decides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferctl.bench import stats

# Of the requests without a good response, so many may be missing before the p99 of all requests has no bound.
_P99 = 0.01


def judge(
    latency: Mapping[str, Any], limit_ms: float, lost: float = 0.0, budget: float = 0.0
) -> tuple[bool | None, str]:
    """Return (met, reason) for the p99 of `latency` (`summary.latency_summary`); met is None where it is inconclusive.

    It is met where the whole 95 % interval of the p99 is within the limit, and the effective sample size is enough for
    the interval to be one: a smaller sample bounds its own interval. `lost` is the share of requests that failed, were
    rejected or were dropped. They have no latency, and would be beyond each limit.
    """
    n, p99 = latency["n"], latency["p99"]
    if lost > _P99:
        return False, f"{100 * lost:.2g} % of the requests got no good response"
    if p99["value"] is None:
        return None, f"not enough samples for a p99: {n} of {p99['needed']}"
    span = f"p99 {p99['value']:.1f} ms ({p99['low']:.1f} - {p99['high']:.1f})"
    if p99["low"] > limit_ms:
        return False, f"{span} is over {limit_ms:g} ms"
    if p99["high"] > limit_ms:
        return None, f"{span} is not shown to be within {limit_ms:g} ms: its interval contains it"
    if (worth := stats.effective(n, p99.get("dependence"))) < p99["needed"]:
        return None, (
            f"{span} is within {limit_ms:g} ms, but the effective sample size is {worth} "
            f"({n} responses, autocorrelated); the p99 needs {p99['needed']}"
        )
    if lost > budget:
        return None, f"{span} is within {limit_ms:g} ms, but {100 * lost:.2g} % of the requests got no good response"
    return True, f"{span} is within {limit_ms:g} ms"
