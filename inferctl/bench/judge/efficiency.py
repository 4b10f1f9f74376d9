"""What requests cost: energy, dollars and CPU time, as far as they were measured or the catalog has a price.

Nothing is invented: an unknown figure is None, with the reason in `unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from inferctl.facts import catalog
from inferctl.receipts.receipt import JsonObject


@dataclass(frozen=True)
class InstanceCost:
    """The on-demand price of an instance with this hardware, with its source and date."""

    provider: str
    instance: str
    usd_per_hour: float
    source: str
    date: str
    usd_per_million_texts: float


@dataclass(frozen=True)
class Efficiency:
    """The costs of one configuration under its load. The names are keys of the receipt."""

    watts: float | None = None
    watts_from: Sequence[str] = field(default_factory=list)
    joules_per_1000_requests: float | None = None
    joules_per_million_texts: float | None = None
    cpu_seconds_per_1000_requests: float | None = None
    cost: Sequence[InstanceCost] = field(default_factory=list)
    unknown: Mapping[str, str] = field(default_factory=dict)


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
) -> Efficiency:
    """Return the costs of one configuration under its load.

    `summary` pools its runs, `telemetry` has one document per run, `runs` the summary and the resources of each run.
    `hardware` is a catalog key.

    Energy is the average power over the runs divided by the throughput, so it contains idle power.
    """
    requests, texts = summary["requests_per_s"], summary["texts_per_s"]
    if not requests:
        reason = "no request was completed"
        return Efficiency(unknown={"joules": reason, "cost": reason})
    used, (cost, no_price) = power(telemetry), _prices(hardware, texts)
    reasons = {"joules": used.unknown, "cost": no_price}
    return Efficiency(
        watts=used.watts,
        watts_from=list(used.sources),
        joules_per_1000_requests=None if used.watts is None else _rounded(1000 * used.watts / requests),
        joules_per_million_texts=None if used.watts is None else _rounded(1e6 * used.watts / texts),
        cpu_seconds_per_1000_requests=_cpu_seconds(runs),
        cost=cost,
        unknown={name: reason for name, reason in reasons.items() if reason},
    )


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


def _prices(hardware: str | None, texts_per_s: float) -> tuple[list[InstanceCost], str | None]:
    """Return the prices of the catalog for one device, the lowest first, or the reason why there are none."""
    profile = catalog.hardware_profiles().get(hardware or "")
    if profile is None:
        return [], "this hardware is not in the catalog"
    if not profile.prices:
        return [], f"the catalog has no price for {profile.key}"
    return [
        InstanceCost(
            price.provider,
            price.instance,
            price.usd_per_hour,
            price.source,
            price.date.isoformat(),
            _rounded(1e6 * price.usd_per_hour / 3600 / texts_per_s),
        )
        for price in sorted(profile.prices, key=lambda price: price.usd_per_hour)
    ], None


def _rounded(value: float) -> float:
    """Return four significant digits: no counter and no price is more exact."""
    return float(f"{value:.4g}")
