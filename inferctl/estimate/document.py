"""The document of `inferctl estimate`.

A row per part and precision, its data source, its costs and which part is cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inferctl import catalog
from inferctl.errors import UsageError
from inferctl.estimate import calibration, front_end
from inferctl.estimate.calibration import Calibrated
from inferctl.estimate.cost import Cost, Transformer
from inferctl.estimate.forecast import (
    Load,
    Range,
    Work,
    capacity,
    differences,
    ends,
    latency,
    notes_for,
    per_million,
    prices,
    ranged,
    under,
)

# Version 2: a figure can be a bound, with `value` null. `against` names the break-even price.
SCHEMA = "inferctl.estimate/2"


@dataclass(frozen=True)
class Question:
    """What to estimate for every part: a load, an SLO (ms), neither or both, and the part to compare with."""

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
    """Every part in every precision. `absent` lists those that cannot be estimated, with the reason.

    Raises `UsageError` for an unknown part.
    """
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
        "engine": work.engine,
        "model": model.as_dict(),
        "tokens": {"mean": sum(work.tokens) / len(work.tokens), "longest": max(work.tokens), "inputs": work.inputs},
        "load": None if question.load is None else _load(question.load),
        "slo_p99_ms": question.slo_p99_ms,
        "against": question.against,
        "batch_tokens": work.batch_tokens,
        "front_end": front_end.load().as_dict(work.inputs),
        "seed": work.seed,
        "source": known.source,
        "rows": found,
        "absent": absent,
    }


def row(
    calibrated: Calibrated, config: Mapping[str, Any], model: Transformer, work: Work, question: Question
) -> dict[str, Any]:
    """All figures of one part in one precision. Each is `{value, low, high, bound}`."""
    fitted, fast, slow = (work.server(cost) for cost in ends(calibrated, model))
    far = differences(model, work.engine)
    offline = capacity(calibrated, model, work)
    single = [server.single() for server in (fitted, fast, slow)]
    result: dict[str, Any] = {
        "hardware": calibrated.part.key,
        "name": calibrated.part.name,
        "precision": calibrated.precision,
        "outcome": "estimated",
        "basis": calibrated.basis,
        "rests_on": calibrated.rests_on,
        "bounded_by": far,
        "limited_by": "front end" if offline.high == work.front_rate else "engine",
        "fixed_ms": calibrated.cost(model).fixed * 1000,
        "sustained_fraction": calibrated.fit.fraction,
        "offline_texts_per_s": asdict(offline.times(work.inputs)),
        "single_ms": {f"p{q * 100:g}": asdict(latency(q, single, bool(far))) for q in (0.5, 0.9, 0.99)},
        "notes": notes_for(calibrated, config, work.batch_tokens),
    }
    best = offline
    if question.load is not None:
        estimate = under(calibrated, model, work, question.load).as_dict()
        result["load"] = {key: estimate[key] for key in ("requests_per_s", "p50_ms", "p90_ms", "p99_ms", "saturated")}
    if question.slo_p99_ms is not None:
        server = fast if far else fitted
        rate = server.highest_rate(question.slo_p99_ms / 1000)
        best = Range.at_most(rate) if offline.bound else ranged(calibrated.band_for(model).rate, rate)
        best = best.capped(offline.high or work.front_rate)
        result["highest_rate"] = asdict(best)
    texts = best.times(work.inputs)
    result["costs"] = [
        price | {"usd_per_million_texts": asdict(per_million(price["usd_per_hour"], texts))}
        for price in prices(calibrated.part)
        if texts.high
    ]
    return result


def paced(cost: Cost, name: str, work: Work, question: Question) -> dict[str, Any]:
    """A row for a server whose batch times were measured (`capacity.json`).

    Its figures under load are estimated as well.
    """
    server = work.server(cost)
    offline = server.offline().per_second
    result: dict[str, Any] = {
        "hardware": name,
        "name": name,
        "precision": None,
        "outcome": "estimated",
        "basis": "pace",
        "rests_on": "batch times that a server measured"
        + (f", {work.slots} batches at a time" if work.slots > 1 else ""),
        "bounded_by": [],
        "parallel_batches": work.slots,
        "batch_tokens": work.batch_tokens,
        "fixed_ms": cost.fixed * 1000,
        "sustained_fraction": None,
        "offline_texts_per_s": _exact(offline * work.inputs),
        "single_ms": {f"p{q * 100:g}": _exact(server.single().percentile(q) * 1000) for q in (0.5, 0.9, 0.99)},
        "costs": [],
        "notes": ["no error band: docs/estimate.md shows the errors of two such predictions"],
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
    """Add to each row how it compares with the part `against`: throughput, and which of the two is cheaper per text.

    The precisions are equal where both parts have them. Otherwise the other part's only precision counts.
    """
    others = {one["precision"]: one for one in rows if one["hardware"] == against}
    for one in rows:
        other = others.get(one["precision"]) or (next(iter(others.values())) if len(others) == 1 else None)
        if other is None or other is one:
            continue
        mine, theirs = (each.get("highest_rate") or each["offline_texts_per_s"] for each in (one, other))
        if not (mine["high"] and theirs["high"]):
            continue
        ratio = _ratio(mine, theirs)
        one["against"] = {
            "hardware": against,
            "precision": other["precision"],
            "throughput": ratio,
            # A text costs the same on both parts at this multiple of the other part's price.
            "break_even": ratio,
            "whole_gpu_break_even": _per_share(ratio, slice_of(one["hardware"])),
            "prices": _verdicts(one, other, ratio),
        }


def _ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How many times the other throughput this one is.

    Of an upper bound only `high` is known, and against an upper bound only `low`. `of_bounds` is the ratio of the two
    fast ends: the break-even price if both parts reach them.
    """
    value = mine["value"] / theirs["value"] if mine["value"] and theirs["value"] else None
    low = mine["low"] / theirs["high"] if mine["low"] else None
    high = mine["high"] / theirs["low"] if theirs["low"] else None
    bound = None
    if value is None and (low or high):
        bound = "at most" if low is None else "at least"
    return {"value": value, "low": low, "high": high, "bound": bound, "of_bounds": mine["high"] / theirs["high"]}


def _per_share(ratio: dict[str, Any], share: float) -> dict[str, Any]:
    return {key: one / share if isinstance(one, float) else one for key, one in ratio.items()}


def _verdicts(one: dict[str, Any], other: dict[str, Any], ratio: dict[str, Any]) -> list[dict[str, Any]]:
    """For each provider that sells both parts: the ratio of prices, and which part is cheaper per text."""
    theirs = {price["provider"]: price["usd_per_hour"] for price in other["costs"]}
    low, high = ratio["low"], ratio["high"]
    found = []
    for price in one["costs"]:
        if (base := theirs.get(price["provider"])) is None:
            continue
        times = price["usd_per_hour"] / base
        if low is not None and times < low:
            verdict, reason = "cheaper", "below the break-even price and its band"
        elif high is not None and times > high:
            verdict, reason = "more expensive", "above the break-even price and its band"
        else:
            known = low is not None and high is not None
            verdict, reason = "undecided", "flips inside the band" if known else "only bounds are known"
        found.append({"provider": price["provider"], "price_ratio": times, "verdict": verdict, "reason": reason})
    return found


def slice_of(key: str) -> float:
    """Share of its GPU's price that a part takes; 1 for a whole one."""
    from inferctl.estimate.forecast import slice_share

    return slice_share(catalog.hardware(key))


def _exact(value: float | None) -> dict[str, Any]:
    return asdict(Range.exactly(float(value or 0.0)))


def _load(load: Load) -> dict[str, Any]:
    return {"mode": load.mode, "users": load.users, "rate": load.rate, "arrivals": load.arrivals}
