"""What requests cost: energy, dollars and CPU time, as far as they were measured or the catalog has a price.

Nothing is invented: an unknown figure is None, with the reason in `unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.facts import catalog
from inferctl.receipts.receipt import JsonObject


@dataclass(frozen=True)
class Power:
    """Average power (W) and the counters it was read from; `unknown` is the reason why it is None."""

    watts: float | None
    sources: Sequence[str] = ()
    unknown: str | None = None


def efficiency(
    summary: JsonObject,
    telemetry: Sequence[JsonObject],
    runs: Sequence[tuple[JsonObject, Mapping[str, float]]],
    hardware: str | None,
) -> dict[str, Any]:
    """Return the costs of one configuration under its load: the key `efficiency` of a receipt.

    `summary` pools its runs, `telemetry` has one document per run, `runs` the summary and the resources of each run.
    `hardware` is a catalog key.

    Energy is the average power over the runs divided by the throughput, so it contains idle power.
    """
    requests, texts = summary["requests_per_s"], summary["texts_per_s"]
    if requests:
        used, (cost, no_price) = power(telemetry), _prices(hardware, texts)
    else:
        no_price = "no request was completed"
        used, cost = Power(None, unknown=no_price), []
    reasons = {"joules": used.unknown, "cost": no_price}
    return {
        "watts": used.watts,
        "watts_from": list(used.sources),
        "joules_per_1000_requests": None if used.watts is None else _rounded(1000 * used.watts / requests),
        "joules_per_million_texts": None if used.watts is None else _rounded(1e6 * used.watts / texts),
        "cpu_seconds_per_1000_requests": _cpu_seconds(runs) if requests else None,
        "cost": cost,
        "unknown": {name: reason for name, reason in reasons.items() if reason},
    }


def _cpu_seconds(runs: Sequence[tuple[JsonObject, Mapping[str, float]]]) -> float | None:
    """Return the CPU seconds per 1,000 requests: time and requests of the same runs. None if no run has both."""
    known = [
        (summary["seconds"] * resources["server_cores"], summary["seconds"] * summary["requests_per_s"])
        for summary, resources in runs
        if "server_cores" in resources
    ]
    seconds, requests = (math.fsum(column) for column in zip(*known, strict=True)) if known else (0.0, 0.0)
    return _rounded(1000 * seconds / requests) if requests else None


def power(telemetry: Sequence[JsonObject]) -> Power:
    """Return the average power over the runs; unknown if it is unknown for one of them."""
    runs = [_power_of_run(document) for document in telemetry]
    known = [run.watts for run in runs if run.watts is not None]
    if not runs or len(known) < len(runs):
        return Power(None, unknown=next((run.unknown for run in runs if run.unknown), "no run has telemetry"))
    return Power(_rounded(math.fsum(known) / len(known)), runs[0].sources)


def _power_of_run(telemetry: JsonObject) -> Power:
    """Return the power of a run's GPUs."""
    gpus = telemetry.get("gpus") or []
    watts, sources = 0.0, []
    for gpu in gpus:
        if gpu["sliced"]:
            return Power(None, unknown=f"{gpu['name']} counts energy for all of its slices together")
        if not gpu["ours"] and len(gpus) > 1:
            return Power(None, unknown="it is unknown which GPU the server used")
        if gpu["joules"] is None:
            return Power(None, unknown=f"{gpu['name']} does not report its power")
        watts += gpu["joules"] / gpu["seconds"]
        sources.append(f"GPU ({gpu['joules_from']})")
    if sources:
        return Power(watts, sources)
    absent = telemetry.get("absent") or {}
    return Power(None, unknown=absent.get("gpu") or "no energy counter was read")


def _prices(hardware: str | None, texts_per_s: float) -> tuple[list[JsonObject], str | None]:
    """Return the on-demand prices of the catalog for one device, the lowest first, or the reason why there are none."""
    profile = catalog.hardware_profiles().get(hardware or "")
    if profile is None:
        return [], "this hardware is not in the catalog"
    if not profile.prices:
        return [], f"the catalog has no price for {profile.key}"
    return [
        {
            "provider": price.provider,
            "instance": price.instance,
            "usd_per_hour": price.usd_per_hour,
            "source": price.source,
            "date": price.date.isoformat(),
            "usd_per_million_texts": _rounded(1e6 * price.usd_per_hour / 3600 / texts_per_s),
        }
        for price in sorted(profile.prices, key=lambda price: price.usd_per_hour)
    ], None


def _rounded(value: float) -> float:
    """Return four significant digits: no counter and no price is more exact."""
    return float(f"{value:.4g}")
