"""What requests cost: joules where a counter told, dollars where the catalog knows a price, CPU seconds where the server's process was seen.

Nothing is made up: what is not known is None, with the reason in `unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl import catalog


def efficiency(
    summary: Mapping[str, Any],
    telemetry: Sequence[Mapping[str, Any]],
    runs: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]],
    hardware: str | None,
) -> dict[str, Any]:
    """Return the costs of one configuration under its load.

    `summary` pools its runs, `telemetry` has one document per run, `runs` the summary and the resources of each run.
    `hardware` is a catalog key.

    Energy is average power over the runs, divided by what was answered: it holds idle power too.
    """
    requests, texts = summary["requests_per_s"], summary["texts_per_s"]
    watts, sources, unknown = power(telemetry)
    dollars, no_price = prices(hardware)
    if not requests:
        return _nothing("nothing was answered")
    reasons = {"joules": unknown, "cost": no_price}
    return {
        "watts": watts,
        "watts_from": sources,
        "joules_per_1000_requests": None if watts is None else _digits(1000 * watts / requests),
        "joules_per_million_texts": None if watts is None else _digits(1e6 * watts / texts),
        "cpu_seconds_per_1000_requests": _cpu_seconds(runs),
        "cost": [
            {**one, "usd_per_million_texts": _digits(1e6 * one["usd_per_hour"] / 3600 / texts)} for one in dollars
        ],
        "unknown": {name: reason for name, reason in reasons.items() if reason},
    }


def _cpu_seconds(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, float]]]) -> float | None:
    """Return the CPU seconds per 1,000 requests: time and requests of the same runs. None where no run knows both."""
    known = [
        (found["seconds"] * used["server_cores"], found["seconds"] * found["requests_per_s"])
        for found, used in runs
        if "server_cores" in used
    ]
    seconds, requests = (math.fsum(column) for column in zip(*known, strict=True)) if known else (0.0, 0.0)
    return _digits(1000 * seconds / requests) if requests else None


def power(telemetry: Sequence[Mapping[str, Any]]) -> tuple[float | None, list[str], str | None]:
    """Average power over the runs, W; what it was read from; why it is not known."""
    found = [_of_run(one) for one in telemetry]
    known = [watts for watts, _, _ in found if watts is not None]
    if not found or len(known) < len(found):
        return None, [], next((why for _, _, why in found if why), "no run was watched")
    return _digits(math.fsum(known) / len(known)), found[0][1], None


def _of_run(one: Mapping[str, Any]) -> tuple[float | None, list[str], str | None]:
    """Power of a run's GPUs and CPU packages, W: the GPUs' where there are any, since theirs is what differs between parts."""
    gpus, cpu = one.get("gpus") or [], one.get("cpu_energy")
    watts, sources = 0.0, []
    for each in gpus:
        if each["sliced"]:
            return None, [], f"{each['name']} counts energy for all of its slices together"
        if not each["ours"] and len(gpus) > 1:
            return None, [], "which of the GPUs the server used cannot be told"
        if each["joules"] is None:
            return None, [], f"{each['name']} does not tell its power"
        watts += each["joules"] / each["seconds"]
        sources.append(f"GPU ({each['joules_from']})")
    if cpu:
        watts += cpu["joules"] / cpu["seconds"]
        sources.append(f"CPU {', '.join(cpu['zones'])} ({cpu['scope']})")
    if sources:
        return watts, sources, None
    absent = one.get("absent") or {}
    return None, [], absent.get("cpu_energy") or absent.get("gpu") or "no energy counter was read"


def prices(hardware: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """On-demand prices of the catalog for one such part, the lowest first, each with its source and date; why there are none."""
    part = catalog.hardware_profiles().get(hardware or "")
    if part is None:
        return [], "the catalog does not know this hardware"
    if not part.prices:
        return [], f"the catalog has no price for {part.key}"
    found = [
        {
            "provider": one.provider,
            "instance": one.instance,
            "usd_per_hour": one.usd_per_hour,
            "source": one.source,
            "date": one.date.isoformat(),
        }
        for one in sorted(part.prices, key=lambda one: one.usd_per_hour)
    ]
    return found, None


def _nothing(why: str) -> dict[str, Any]:
    none = dict.fromkeys(
        ("watts", "joules_per_1000_requests", "joules_per_million_texts", "cpu_seconds_per_1000_requests")
    )
    return {**none, "watts_from": [], "cost": [], "unknown": {"joules": why, "cost": why}}


def _digits(value: float) -> float:
    """Four significant digits: no counter or price here is better than that."""
    return float(f"{value:.4g}")
