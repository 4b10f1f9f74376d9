"""When rejected requests (429) make the figures of a load invalid. No other module decides this."""

from __future__ import annotations

from inferctl.receipts import shares
from inferctl.receipts.receipt import JsonObject

_FIX = "use fewer users, or raise `slo.p99_ms` and `serve.max_wait_seconds` in the server's spec"


def reason(summary: JsonObject) -> str | None:
    """Return why rejections invalidate the figures of a load; None if they do not, or if too few requests show it.

    In a closed loop, a rejected user waits for the time in `Retry-After`. Its load is then smaller than that of the
    plan, and requests/s are not the capacity of the server. An open loop sends its schedule whatever the server does:
    there, the share of rejected requests is a result.
    """
    rejected, total = summary.get("rejected", 0), summary.get("requests", 0)
    if summary.get("offered") is not None or not shares.exceeds(rejected, total, shares.P99_SHARE):
        return None
    return (
        f"the server rejected {rejected} of {total} requests (429, {shares.percent(rejected, total)}, limit "
        f"{shares.P99_SHARE:.0%}), and rejected users wait, so this closed loop does not show its capacity: {_FIX}"
    )
