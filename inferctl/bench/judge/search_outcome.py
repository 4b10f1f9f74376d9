"""What the probes of a search say together: the highest rate within the SLO, and its band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inferctl.bench.judge.probe import Probe

Band = tuple[float, float | None]


def summarize(
    probes: Sequence[Probe],
    best: Probe | None,
    *,
    slo_p99_ms: float,
    resolution: float,
    ceiling_rps: float | None,
    expired: bool,
    low: float | None,
) -> dict[str, Any]:
    """Return the `search` key of a receipt from the `probes` in the order in which they ran.

    `best` is the probe that confirmed the highest rate within the SLO, if one did; `low` is the highest rate that met
    the SLO at least once. `expired` is whether the budget ended the search. The first failing probe is the lowest one
    above `best`; `band_rps` has the rates between which the highest rate within the SLO lies.
    """
    latest = {probe.rate: probe for probe in probes}
    ascending = [latest[rate] for rate in sorted(latest)]
    failing = [probe for probe in ascending if probe.meets_slo is False and (not best or probe.rate > best.rate)]
    first = failing[0] if failing else None
    ends = band(probes, best) if best or not expired else _band_without_confirmation(probes, low)
    return {
        "slo_p99_ms": slo_p99_ms,
        "resolution": resolution,
        "ceiling_rps": ceiling_rps and round(ceiling_rps, 3),
        "verdict": _verdict(probes, ascending, failing, best, expired),
        "max_goodput_rps": best.rate if best else None,
        "first_failing_rps": first.rate if first else None,
        "first_failing_times": sum(p.rate == first.rate and p.meets_slo is False for p in probes) if first else None,
        "limited_by": first.limited_by if first else None,
        "reason": first.reason if first else "",
        "band_rps": ends and list(ends),
        "expired": expired,
        "failed_below": [p.rate for p in ascending if best and p.meets_slo is False and p.rate < best.rate],
        "probes": [probe.as_dict() for probe in probes],
    }


def _verdict(
    probes: Sequence[Probe], ascending: Sequence[Probe], failing: Sequence[Probe], best: Probe | None, expired: bool
) -> str:
    if best:
        return "found" if failing and failing[0].limited_by != "generator" else "at least"
    # With more time, lower rates would have been probed, unless the lowest one is shown to be too high.
    unfinished = expired and not (ascending and ascending[0].above_limit)
    if unfinished or any(probe.meets_slo for probe in probes):
        return "not confirmed"
    # A rate at which the server saturates says nothing about lower rates without enough samples. If requests failed
    # there too, the server does not fail because of the rate.
    undecided = [probe for probe in ascending if probe.meets_slo is None]
    by_errors = bool(failing) and failing[0].limited_by == "errors" and all(probe.errors for probe in undecided)
    judged = failing and (failing[0].limited_by == "p99" or by_errors or not undecided)
    return "none holds" if judged else "n too small"


def band(probes: Sequence[Probe], best: Probe | None) -> Band | None:
    """Return the rates between which the highest rate within the SLO lies; None if no rate was confirmed.

    The lower end is the confirmed rate. The upper end is the lowest rate at which a second probe shows that the SLO is
    not met, there or at a lower rate; None if there is none. The lowest of several single probes would be biased.
    """
    if best is None:
        return None
    above = sorted(probe.rate for probe in probes if probe.above_limit and probe.rate > best.rate)
    return best.rate, above[1] if len(above) > 1 else None


def _band_without_confirmation(probes: Sequence[Probe], low: float | None) -> Band | None:
    """Return the band if no time was left to confirm: it starts at the highest rate that met the SLO once."""
    above = sorted(probe.rate for probe in probes if probe.above_limit and probe.rate > (low or 0))
    high = above[1] if len(above) > 1 else above[0] if above else None
    return (low or 0.0, high) if low or high else None
