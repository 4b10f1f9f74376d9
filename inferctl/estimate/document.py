"""The document of `inferctl estimate`: a row for each part and precision, what it rests on, what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inferctl import catalog
from inferctl.errors import UsageError
from inferctl.estimate import calibration
from inferctl.estimate.calibration import Calibrated
from inferctl.estimate.cost import Cost, Transformer
from inferctl.estimate.forecast import (
    Load,
    Range,
    Work,
    ends,
    latency,
    notes_for,
    per_million,
    prices,
    ranged,
    under,
)

SCHEMA = "inferctl.estimate/1"


@dataclass(frozen=True)
class Question:
    """What is asked of every part: a load, an SLO (ms), neither or both."""

    load: Load | None = None
    slo_p99_ms: float | None = None
    against: str | None = None


def build(
    keys: Sequence[str],
    precisions: Sequence[str],
    config: Mapping[str, Any],
    work: Work,
    question: Question,
) -> dict[str, Any]:
    """Every part in every precision; those that cannot be estimated are in `absent`, with the reason. Raises `UsageError` for a wrong part."""
    found, absent = [], []
    model = Transformer.of(config)
    known = calibration.load()
    for key in dict.fromkeys([*keys, *([question.against] if question.against else [])]):
        part = catalog.hardware(key)
        for precision in dict.fromkeys(catalog.best_precision(part.traits) if p == "auto" else p for p in precisions):
            try:
                calibrated = known.of(part.key, precision)
            except UsageError as error:
                absent.append({"hardware": key, "precision": precision, "reason": error.message, "hint": error.hint})
                continue
            found.append(row(calibrated, config, model, work, question))
    if question.against:
        compare(found, question.against)
    return {
        "schema": SCHEMA,
        "estimated": True,
        "model": asdict(model),
        "tokens": {"mean": sum(work.tokens) / len(work.tokens), "longest": max(work.tokens), "inputs": work.inputs},
        "load": None if question.load is None else _load(question.load),
        "slo_p99_ms": question.slo_p99_ms,
        "against": question.against,
        "batch_tokens": work.batch_tokens,
        "seed": work.seed,
        "source": known.source,
        "rows": found,
        "absent": absent,
    }


def row(
    calibrated: Calibrated, config: Mapping[str, Any], model: Transformer, work: Work, question: Question
) -> dict[str, Any]:
    """All figures of one part in one precision; each is a range `{value, low, high}`."""
    fitted, fast, slow = (work.server(cost) for cost in ends(calibrated, model))
    offline = ranged(calibrated.band.throughput, fitted.offline().per_second)
    single = [server.single() for server in (fitted, fast, slow)]
    result: dict[str, Any] = {
        "hardware": calibrated.part.key,
        "name": calibrated.part.name,
        "precision": calibrated.precision,
        "outcome": "estimated",
        "basis": calibrated.basis,
        "rests_on": calibrated.rests_on,
        "fixed_ms": calibrated.cost(model).fixed * 1000,
        "sustained_fraction": calibrated.fit.fraction,
        "offline_texts_per_s": asdict(offline.times(work.inputs)),
        "single_ms": {f"p{q * 100:g}": asdict(latency(q, *single)) for q in (0.5, 0.9, 0.99)},
        "notes": notes_for(calibrated, config, work.batch_tokens),
    }
    best = offline
    if question.load is not None:
        estimate = under(calibrated, model, work, question.load).as_dict()
        result["load"] = {key: estimate[key] for key in ("requests_per_s", "p50_ms", "p90_ms", "p99_ms", "saturated")}
    if question.slo_p99_ms is not None:
        rate = fitted.highest_rate(question.slo_p99_ms / 1000, most=offline.value)
        best = ranged(calibrated.band.rate, rate)
        result["highest_rate"] = asdict(best)
    texts = best.times(work.inputs)
    result["costs"] = [
        price | {"usd_per_million_texts": asdict(per_million(price["usd_per_hour"], texts))}
        for price in prices(calibrated.part)
        if texts.value
    ]
    return result


def paced(cost: Cost, name: str, work: Work, question: Question) -> dict[str, Any]:
    """A row for a server whose own pace was measured (`capacity.json`); the figures under load are estimated all the same."""
    server = work.server(cost)
    offline = server.offline().per_second
    result: dict[str, Any] = {
        "hardware": name,
        "name": name,
        "precision": None,
        "outcome": "estimated",
        "basis": "pace",
        "rests_on": "the pace that a server measured of itself"
        + (f", {work.slots} batches at a time" if work.slots > 1 else ""),
        "parallel_batches": work.slots,
        "batch_tokens": work.batch_tokens,
        "fixed_ms": cost.fixed * 1000,
        "sustained_fraction": None,
        "offline_texts_per_s": _exact(offline * work.inputs),
        "single_ms": {f"p{q * 100:g}": _exact(server.single().percentile(q) * 1000) for q in (0.5, 0.9, 0.99)},
        "costs": [],
        "notes": ["no error band: docs/estimate.md says how far one such prediction was off"],
    }
    load = question.load
    if load is not None:
        saturated = load.mode == "open" and (load.rate or 1.0) >= offline
        answers = (
            None
            if saturated
            else server.open(load.rate or 1.0, load.arrivals)
            if load.mode == "open"
            else server.closed(load.users)
        )
        result["load"] = {
            "requests_per_s": _exact(
                offline if answers is None else load.rate if load.mode == "open" else answers.per_second
            ),
            **{
                f"p{q * 100:g}_ms": None if answers is None else _exact(answers.percentile(q) * 1000)
                for q in (0.5, 0.9, 0.99)
            },
            "saturated": answers is None,
        }
    if question.slo_p99_ms is not None:
        result["highest_rate"] = _exact(server.highest_rate(question.slo_p99_ms / 1000, most=offline))
    return result


def compare(rows: Sequence[dict[str, Any]], against: str) -> None:
    """Puts beside each row how it stands to the part `against`: throughput, a lone request, and where the price flips.

    In the same precision where both have it, else with the other's only one.
    """
    others = {one["precision"]: one for one in rows if one["hardware"] == against}
    for one in rows:
        other = others.get(one["precision"]) or (next(iter(others.values())) if len(others) == 1 else None)
        if other is None or other is one:
            continue
        mine, theirs = (each.get("highest_rate") or each["offline_texts_per_s"] for each in (one, other))
        lone, their_lone = one["single_ms"]["p99"], other["single_ms"]["p99"]
        if not (mine["value"] and theirs["value"]):
            continue
        share = slice_of(one["hardware"])
        ratio = {
            "value": mine["value"] / theirs["value"],
            "low": mine["low"] / theirs["high"],
            "high": mine["high"] / theirs["low"],
        }
        one["against"] = {
            "hardware": against,
            "precision": other["precision"],
            "throughput": ratio,
            "single_p99": lone["value"] / their_lone["value"],
            # Up to this many times the price of the other part a text is cheaper here.
            "price_flips_at": ratio,
            "whole_gpu_price_flips_at": {key: value / share for key, value in ratio.items()},
        }


def slice_of(key: str) -> float:
    """Share of its GPU's price that a part takes; 1 for a whole one."""
    from inferctl.estimate.forecast import slice_share

    return slice_share(catalog.hardware(key))


def _exact(value: float | None) -> dict[str, Any]:
    number = float(value or 0.0)
    return asdict(Range(number, number, number))


def _load(load: Load) -> dict[str, Any]:
    return {"mode": load.mode, "users": load.users, "rate": load.rate, "arrivals": load.arrivals}
