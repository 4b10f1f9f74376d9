"""Builds the JSON document of `inferctl estimate`.

It has one row per part and precision, with the data source, the costs and a comparison of costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.estimate import calibration, front_end
from inferctl.estimate.calibration import CalibratedPart
from inferctl.estimate.cost import Cost, Transformer
from inferctl.estimate.forecast import (
    OfferedLoad,
    Range,
    Scenario,
    at_least_ms,
    capacity,
    differences,
    notes_for,
    per_million,
    prices,
    simulate,
    under_load,
)
from inferctl.estimate.search import SimulatedServer
from inferctl.estimate.simulate import percentile
from inferctl.facts import catalog
from inferctl.facts.precision import best_precision

# Version 3: figures of the catalog's hardware are always bounds, and `against` has the ratio of two bounds, no verdict.
SCHEMA = "inferctl.estimate/3"
# If a front end is busy for less than this share of the time, it does not limit the rate.
_MIN_FRONT_LOAD = 0.2


@dataclass(frozen=True)
class Question:
    """The figures to estimate for each part: under a load, within an SLO (ms), and compared with the part `against`."""

    load: OfferedLoad | None = None
    slo_p99_ms: float | None = None
    against: str | None = None


def build(
    keys: Sequence[str],
    precisions: Sequence[str],
    config: Mapping[str, Any],
    scenario: Scenario,
    question: Question,
) -> dict[str, Any]:
    """Estimate each part in each precision. `absent` lists the rows that cannot be estimated, with the reason.

    Raises `UsageError` for an unknown part.
    """
    rows, absent = [], []
    model = Transformer.of(config)
    calibrations = calibration.load()
    for key in dict.fromkeys([*keys, *([question.against] if question.against else [])]):
        part = catalog.hardware(key)
        for precision in dict.fromkeys(best_precision(part.traits) if p == "auto" else p for p in precisions):
            try:
                calibrated = calibrations.of(part.key, precision)
            except UsageError as error:
                absent.append({"hardware": key, "precision": precision, "reason": error.message, "hint": error.hint})
                continue
            rows.append(row(calibrated, config, model, scenario, question))
    if question.against:
        compare(rows, question.against)
    return {
        "schema": SCHEMA,
        "estimated": True,
        "model": model.as_dict(),
        "tokens": {
            "mean": sum(scenario.tokens) / len(scenario.tokens),
            "longest": max(scenario.tokens),
            "inputs": scenario.inputs,
        },
        "load": None if question.load is None else _load(question.load),
        "slo_p99_ms": question.slo_p99_ms,
        "against": question.against,
        "batch_tokens": scenario.batch_tokens,
        "front_end": front_end.load().as_dict(scenario.inputs, scenario.api_processes),
        "seed": scenario.seed,
        "source": calibrations.source,
        "rows": rows,
        "absent": absent,
    }


def row(
    calibrated: CalibratedPart, config: Mapping[str, Any], model: Transformer, scenario: Scenario, question: Question
) -> dict[str, Any]:
    """Return all figures of one part in one precision. Each is `{value, low, high, bound}`."""
    server = scenario.server(calibrated.fastest(model))
    most, single = capacity(calibrated, model, scenario), server.single()
    result: dict[str, Any] = {
        "hardware": calibrated.part.key,
        "name": calibrated.part.name,
        "precision": calibrated.precision,
        "outcome": "estimated",
        "basis": calibrated.basis,
        "rests_on": calibrated.rests_on,
        "bounded_by": differences(model, scenario),
        "limited_by": "front end" if most == scenario.front_rate else "engine",
        "fixed_ms": calibrated.cost(model).fixed * 1000,
        "sustained_fraction": calibrated.fit.fraction,
        "offline_texts_per_s": asdict(Range.at_most(most * scenario.inputs)),
        "single_ms": {f"p{q * 100:g}": asdict(at_least_ms(single, q)) for q in (0.5, 0.9, 0.99)},
        "notes": notes_for(calibrated, config, scenario.batch_tokens),
    }
    if question.load is not None:
        estimate = under_load(calibrated, model, scenario, question.load).as_dict()
        result["load"] = {key: estimate[key] for key in ("requests_per_s", "p50_ms", "p90_ms", "p99_ms", "saturated")}
    if question.slo_p99_ms is not None:
        rate = server.highest_rate(question.slo_p99_ms / 1000)
        most = min(rate, most)
        if result["limited_by"] == "engine" and _waits_for_front(server, question.slo_p99_ms / 1000, rate):
            result["limited_by"] = "front end"
        result["highest_rate"] = asdict(Range.at_most(most))
    result["costs"] = [
        price | {"usd_per_million_texts": asdict(per_million(price["usd_per_hour"], most * scenario.inputs))}
        for price in prices(calibrated.part)
        if most
    ]
    return result


def _waits_for_front(server: SimulatedServer, slo: float, rate: float) -> bool:
    """Return whether the highest rate within `slo` seconds grows by over 2% without the time of the front end."""
    if not rate or rate * server.front < _MIN_FRONT_LOAD:
        return False
    return replace(server, front=0.0).highest_rate(slo) > 1.02 * rate


def measured_row(cost: Cost, name: str, scenario: Scenario, question: Question) -> dict[str, Any]:
    """Return the row of a server with measured batch times (`capacity.json`). Its figures are estimates too."""
    server = scenario.server(cost)
    offline, single = server.offline().per_second, server.single()
    result: dict[str, Any] = {
        "hardware": name,
        "name": name,
        "precision": None,
        "outcome": "estimated",
        "basis": "pace",
        "rests_on": "measured batch times of a server"
        + (f", {scenario.slots} batches at a time" if scenario.slots > 1 else ""),
        "bounded_by": [],
        "parallel_batches": scenario.slots,
        "batch_tokens": scenario.batch_tokens,
        "fixed_ms": cost.fixed * 1000,
        "sustained_fraction": None,
        "offline_texts_per_s": _exact(offline * scenario.inputs),
        "single_ms": {f"p{q * 100:g}": _exact(percentile(single, q) * 1000) for q in (0.5, 0.9, 0.99)},
        "costs": [],
        "notes": ["no error band; docs/estimate.md has the errors of two such estimates"],
    }
    if question.load is not None:
        done = simulate(server, question.load)
        rate = offline if done is None else question.load.rate if question.load.mode == "open" else done.per_second
        result["load"] = {
            "requests_per_s": _exact(rate),
            **{f"p{q * 100:g}_ms": done and _exact(done.percentile(q) * 1000) for q in (0.5, 0.9, 0.99)},
            "saturated": done is None,
        }
    if question.slo_p99_ms is not None:
        result["highest_rate"] = _exact(server.highest_rate(question.slo_p99_ms / 1000, most=offline))
    return result


def compare(rows: Sequence[dict[str, Any]], against: str) -> None:
    """Add to each row a comparison with the part `against`: the ratio of their bounds, and of their prices.

    Rows of the same precision are compared. If `against` has a single row, all rows are compared with it.
    """
    baselines = {row["precision"]: row for row in rows if row["hardware"] == against}
    for row in rows:
        baseline = baselines.get(row["precision"]) or (next(iter(baselines.values())) if len(baselines) == 1 else None)
        if baseline is None or baseline is row:
            continue
        rate, baseline_rate = (
            (each.get("highest_rate") or each["offline_texts_per_s"])["high"] for each in (row, baseline)
        )
        if not (rate and baseline_rate):
            continue
        prices_of_baseline = {price["provider"]: price["usd_per_hour"] for price in baseline["costs"]}
        row["against"] = {
            "hardware": against,
            "precision": baseline["precision"],
            # If both parts reach their bounds, a text costs the same at this multiple of the price of `against`.
            "of_bounds": rate / baseline_rate,
            "whole_gpu_of_bounds": rate / baseline_rate * catalog.hardware(row["hardware"]).parts,
            "behind_front_end": _front_limited(row) or _front_limited(baseline),
            "prices": [
                {"provider": price["provider"], "price_ratio": price["usd_per_hour"] / other}
                for price in row["costs"]
                if (other := prices_of_baseline.get(price["provider"]))
            ],
        }


def _front_limited(row: Mapping[str, Any]) -> bool:
    return row.get("limited_by") == "front end"


def _exact(value: float | None) -> dict[str, Any]:
    return asdict(Range.exactly(float(value or 0.0)))


def _load(load: OfferedLoad) -> dict[str, Any]:
    return {"mode": load.mode, "users": load.users, "rate": load.rate, "arrivals": load.arrivals}
