"""Describe the result of a search in sentences. Reads the `search` key of a receipt."""

from __future__ import annotations

from collections.abc import Sequence

from inferctl.bench.judge import slo
from inferctl.core.errors import NotEnoughEvidenceError
from inferctl.receipts.receipt import JsonObject

_INCONCLUSIVE = ("n too small", "not confirmed")


def sentences(name: str, search: JsonObject) -> list[str]:
    """Return what the search of configuration `name` found; the first sentence is the result."""
    found = [f"{name} meets the SLO{_result(search)}." if _confirmed(search) else f"{name}{_without_rate(search)}."]
    if search["first_failing_rps"]:
        times = search.get("first_failing_times")
        once = " in one probe only" if times == 1 else f" in {times} probes" if times else ""
        above = "the lowest such rate above it" if search["max_goodput_rps"] else "the lowest such rate"
        found.append(f"{name} failed at {search['first_failing_rps']:g} requests/s{once}, {above}: {search['reason']}.")
    if search.get("failed_below"):
        rates = ", ".join(f"{rate:g}" for rate in search["failed_below"])
        found.append(f"{name} also failed at {rates} requests/s, below rates within the SLO: the machine was unsteady.")
    if search.get("expired") and (budget := search.get("budget")):
        found.append(
            f"{name}: the search ended with its budget ({budget['seconds']:.0f} s, of which it used "
            f"{budget['spent_s']:.0f} s); a longer budget narrows the band."
        )
    return found


def inconclusive(rows: Sequence[JsonObject]) -> NotEnoughEvidenceError | None:
    """Return the error of a benchmark whose searches were all inconclusive; `rows` are those of its result."""
    searched = [row for row in rows if row.get("search")]
    if not searched or any(row["search"]["verdict"] not in _INCONCLUSIVE for row in searched):
        return None
    reasons = "; ".join(sentences(row["configuration"], row["search"])[0].rstrip(".") for row in searched)
    return NotEnoughEvidenceError(
        reasons, "give each probe more time: `search: {probe_s: 20, max_probe_s: 120}` in a plan"
    )


def slo_of(search: JsonObject) -> str:
    """Return the SLO of a search in words."""
    return slo.describe(search["slo_p99_ms"], search.get("bounds_ms"))


def unit_of(search: JsonObject) -> str:
    """Return the unit of the percentiles of a search: ms, or for generation percent of the bounds."""
    return slo.OF_BOUNDS if search.get("bounds_ms") else " ms"


def _confirmed(search: JsonObject) -> JsonObject | None:
    """Return the probe that confirmed the highest rate within the SLO; None if there is none."""
    best = search["max_goodput_rps"]
    probes = reversed(search["probes"])
    return next((probe for probe in probes if best and probe["rate"] == best and probe["holds"]), None)


def _result(search: JsonObject) -> str:
    probe = _confirmed(search) or {}
    low, high = probe["p99_interval_ms"]
    least = "at least " if search["verdict"] == "at least" else ""
    return (
        f" ({slo_of(search)}) up to {least}{search['max_goodput_rps']:g} requests/s{_band(search)}; "
        f"p99 at this rate {probe['p99_ms']:.1f}{unit_of(search)}, interval {low:.1f} - {high:.1f}"
    )


def _without_rate(search: JsonObject) -> str:
    """Return why the search has no rate within the SLO."""
    none = f": no rate within the SLO ({slo_of(search)}) was confirmed"
    if search["verdict"] == "n too small":
        return f"{none}, not enough samples; give each probe more time (`max_probe_s`)"
    if search["verdict"] == "not confirmed":
        if search.get("expired"):
            return f"{none}, the budget left no time to confirm one{_band(search)}"
        return f"{none} by a second probe; the machine is too unsteady"
    unknown = max((probe["rate"] for probe in search["probes"] if probe["holds"] is None), default=None)
    rest = f"; {unknown:g} requests/s is inconclusive (not enough samples)" if unknown else ""
    return f"{none}{rest}"


def _band(search: JsonObject) -> str:
    """Return the band of the rate in words; empty without one."""
    if not (band := search.get("band_rps")):
        return ""
    low, high = band
    return f" (the limit is between {low:g} and {high:g})" if high else f" (the limit is {low:g} or higher)"
