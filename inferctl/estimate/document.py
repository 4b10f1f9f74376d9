"""Builds the JSON document of `inferctl estimate`.

It has one row per part and precision, with the data source and the costs, and the verdict: which one is the cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.estimate import calibration, front_end, verdict
from inferctl.estimate.calibration import CalibratedPart
from inferctl.estimate.cost import Transformer
from inferctl.estimate.forecast import (
    Scenario,
    at_least,
    at_least_ms,
    at_most,
    capacity,
    differences,
    exactly,
    memory_problem,
    notes_for,
    prices,
    served,
    under_load,
)
from inferctl.facts import catalog
from inferctl.facts.precision import best_precision

# Version 5: the verdict has no `other_lengths`.
SCHEMA = "inferctl.estimate/5"


@dataclass(frozen=True)
class Question:
    """What to estimate for each part: a rate (requests/s), an SLO (ms), and a number of texts to embed."""

    rate: float | None = None
    slo_p99_ms: float | None = None
    texts: int | None = None


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
    parts, absent = [], []
    model = Transformer.of(config)
    calibrations = calibration.load()
    for key in dict.fromkeys(keys):
        part = catalog.hardware(key)
        for precision in dict.fromkeys(best_precision(part.traits) if p == "auto" else p for p in precisions):
            try:
                parts.append(calibrations.of(part.key, precision))
            except UsageError as error:
                absent.append({"hardware": key, "precision": precision, "reason": error.message, "hint": error.hint})
    rows = [row(part, config, model, scenario, question) for part in parts]
    return {
        "schema": SCHEMA,
        "estimated": True,
        "verdict": verdict.decide(rows, parts, model, scenario, question.rate, question.slo_p99_ms),
        "model": model.as_dict(),
        "tokens": {
            "mean": sum(scenario.tokens) / len(scenario.tokens),
            "longest": max(scenario.tokens),
            "inputs": scenario.inputs,
        },
        "load": {"mode": "open", "rate": question.rate, "arrivals": "poisson"} if question.rate else None,
        "slo_p99_ms": question.slo_p99_ms,
        "texts": question.texts,
        "batch_tokens": scenario.batch_tokens,
        "front_end": front_end.load().as_dict(scenario.inputs, scenario.api_processes),
        "source": calibrations.source,
        "rows": rows,
        "absent": absent,
    }


def row(
    calibrated: CalibratedPart, config: Mapping[str, Any], model: Transformer, scenario: Scenario, question: Question
) -> dict[str, Any]:
    """Return all figures of one part in one precision. Each is `{value, low, high, bound}`.

    `replicas` is None if the part cannot serve the requests: it is too small, or no rate meets the SLO.
    """
    most, single = capacity(calibrated, model, scenario), scenario.server(calibrated.fastest(model)).single()
    one = served(calibrated, model, scenario, question.slo_p99_ms)
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
        "offline_texts_per_s": at_most(most * scenario.inputs),
        "single_ms": {f"p{q * 100:g}": at_least_ms(single, q) for q in (0.5, 0.9, 0.99)},
        "notes": notes_for(calibrated, config, scenario.batch_tokens),
    }
    if question.slo_p99_ms is not None:
        result["highest_rate"] = at_most(one)
    fits = one > 0 and not memory_problem(calibrated, config, scenario.batch_tokens)
    replicas = max(1, math.ceil(question.rate / one)) if question.rate and one else 1
    if question.rate:
        # Each replica receives its part of the rate.
        result["load"] = under_load(calibrated, model, scenario, question.rate / replicas)
    result["replicas"] = at_least(replicas) if fits else None
    texts_per_hour = 3600 * (question.rate or one) * scenario.inputs
    if fits and question.texts:
        # A given rate is exact, so the time is too.
        bound = exactly if question.rate else at_least
        result["hours"] = bound(question.texts / texts_per_hour)
    result["costs"] = [
        price | _cost(price["usd_per_hour"] * replicas, texts_per_hour, question.texts)
        for price in prices(calibrated.part)
        if fits
    ]
    return result


def _cost(usd_per_hour: float, texts_per_hour: float, texts: int | None) -> dict[str, Any]:
    """Return the cost of all replicas: per hour, per million texts and for `texts`. All are lower bounds."""
    per_text = usd_per_hour / texts_per_hour
    found = {"usd_per_hour_of_all": usd_per_hour, "usd_per_million_texts": per_text * 1e6}
    if texts:
        found["usd"] = per_text * texts
    return {key: at_least(value) for key, value in found.items()}
