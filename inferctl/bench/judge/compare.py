"""Two receipts of the same work held against each other: what may be compared, what became worse, and how sure that is.

    find pairs ─► refuse what cannot be compared ─► judge each figure (verdict.py) and the quality ─► one document

Needs no numpy: a CI step compares with the core alone. docs/compare.md describes the document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inferctl.bench.judge import verdict
from inferctl.bench.judge.comparable import Pair, hardware, refused
from inferctl.bench.receipt import Receipt
from inferctl.errors import InferctlError, InvalidRunError, NotEnoughEvidenceError

SCHEMA = "inferctl.compare/1"
WANTED_REPEATS = 5
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Metric:
    """A figure that each run has: `read` gives it, or why the run has none."""

    name: str
    unit: str
    higher_is_worse: bool
    read: Callable[[Mapping[str, Any]], float | str]


def _percentile(key: str) -> Callable[[Mapping[str, Any]], float | str]:
    def read(run: Mapping[str, Any]) -> float | str:
        latency = run["summary"]["latency_ms"]
        found = latency.get(key) or {}
        if found.get("value"):
            return float(found["value"])
        seconds = run["summary"].get("seconds") or 0
        longer = (
            f": measure {math.ceil(1.1 * seconds * found['needed'] / latency['n'])} s a run" if latency["n"] else ""
        )
        return f"n too small: {latency['n']} of {found.get('needed')} answers in a run{longer}"

    return read


def _rate(run: Mapping[str, Any]) -> float | str:
    """Return requests/s, of the closed loop where the run has one: the open loop after it gets what it offers."""
    found = (run.get("closed_loop") or run)["summary"]
    return float(found["requests_per_s"]) or "no request was answered"


def _memory(run: Mapping[str, Any]) -> float | str:
    peak = (run.get("resources") or {}).get("server_peak_bytes")
    return peak / MEBIBYTE if peak else "not measured: the server's process was not found"


METRICS = {
    one.name: one
    for one in (
        Metric("p50", "ms", True, _percentile("p50")),
        Metric("p90", "ms", True, _percentile("p90")),
        Metric("p99", "ms", True, _percentile("p99")),
        Metric("requests_per_s", "/s", False, _rate),
        Metric("memory", "MiB", True, _memory),
    )
}


# Judged by the difference and not by the ratio, so it is none of `METRICS`.
REJECTED = "rejected"

# What differs more by itself gets more room: the p99 of a run rests on its last hundredth, memory on how a process happened to start.
DEFAULT_THRESHOLDS = {"p50": 0.05, "p90": 0.05, "p99": 0.10, "requests_per_s": 0.05, "memory": 0.10}


@dataclass(frozen=True)
class Options:
    """What counts. `thresholds` are shares, by metric; `metrics`: those to judge, empty for all that were measured.

    `cosine_drop` and `recall_drop`: by how much the 1st percentile of the cosine and the recall may fall; None: as
    `allowed_drop` says. `allow`: of `ALLOWABLE`.
    """

    thresholds: Mapping[str, float] = field(default_factory=lambda: DEFAULT_THRESHOLDS)
    floor_ms: float = 0.05
    floor_mib: float = 8.0
    floor_rejected: float = 0.1
    metrics: Sequence[str] = ()
    cosine_drop: float | None = None
    recall_drop: float | None = None
    allow: Sequence[str] = ()

    def limits(self, metric: Metric) -> verdict.Limits:
        floor = {"ms": self.floor_ms, "MiB": self.floor_mib}.get(metric.unit, 0.0)
        return verdict.Limits(self.thresholds[metric.name], floor)


def document(found: Sequence[Pair], notes: Sequence[str], options: Options) -> dict[str, Any]:
    """The whole verdict; `outcome` and `exit_code` are those of the worst part. All figures that are judged share one error rate."""
    refusals = [refused(pair, options.allow) for pair in found]
    judged = [pair for pair, reasons in zip(found, refusals, strict=True) if not reasons]
    family = max(
        1,
        sum(_is_sample(pair, metric) for pair in judged for metric in _wanted(options))
        + sum(_rejects(pair, options) for pair in judged),
    )
    parts = [
        _refused(pair, reasons) if reasons else configuration(pair, options, family)
        for pair, reasons in zip(found, refusals, strict=True)
    ]
    outcome, code = _worst([part["outcome"] for part in parts])
    needed = [metric["repeats_needed"] for part in parts for metric in part["metrics"] if metric.get("repeats_needed")]
    return {
        "schema": SCHEMA,
        "outcome": outcome,
        "exit_code": code,
        "confidence": verdict.CONFIDENCE,
        "family": family,
        "repeats_needed": max(needed, default=None),
        "notes": list(notes),
        "configurations": parts,
    }


def configuration(pair: Pair, options: Options, family: int) -> dict[str, Any]:
    """The verdict on one pair that may be compared."""
    assert pair.new is not None  # `refused` says so otherwise
    metrics = [judge(pair, metric, options, family) for metric in _wanted(options)]
    metrics += rejections(pair, options, family)
    metrics += quality(pair.old.data["quality"], pair.new.data["quality"], options, same_texts=pair.same_texts)
    outcomes = [metric["outcome"] for metric in metrics]
    outcome = next((one for one in ("regression", "not enough evidence") if one in outcomes), "no regression")
    if outcome == "no regression" and "improvement" in outcomes:
        outcome = "improvement"
    return {
        "name": pair.name,
        "old": _described(pair.old),
        "new": _described(pair.new),
        "outcome": outcome,
        "reasons": [],
        "interleaved": pair.together,
        "notes": list(_notes(pair, options)),
        "metrics": metrics,
    }


def judge(pair: Pair, metric: Metric, options: Options, family: int) -> dict[str, Any]:
    """The verdict on one figure."""
    before, after, why = _values(pair, metric)
    limits = options.limits(metric)
    row = {
        "name": metric.name,
        "unit": metric.unit,
        "higher_is_worse": metric.higher_is_worse,
        "threshold": limits.threshold,
        "floor": limits.floor,
    }
    if not why and _stayed_up(pair, metric):
        return row | _once(max(before), max(after), limits)
    if not _is_sample(pair, metric):
        # What nobody asked for and no server can tell is left out; everything else is owed an answer.
        blocks = metric.name in options.metrics or metric.name != "memory"
        few = f"{min(len(before), len(after))} runs say too little of how runs differ: {WANTED_REPEATS} repeats are wanted"
        return row | {
            **_blank(before, after),
            "outcome": "not enough evidence" if blocks else "not compared",
            "reason": why or few,
            "repeats_needed": None if why else WANTED_REPEATS,
        }
    effect = verdict.paired(before, after) if pair.together else verdict.unpaired(before, after)
    base = _centre(before)
    found = verdict.decide(effect, base, metric.higher_is_worse, limits, family)
    return row | {
        "old": round(base, 4),
        "new": round(base * (1 + found.change), 4),
        "old_runs": [round(value, 4) for value in before],
        "new_runs": [round(value, 4) for value in after],
        "change": round(found.change, 5),
        "interval": [round(found.low, 5), round(found.high, 5)],
        "worse_at_most": round(found.at_most, 5),
        "spread": round(effect.spread, 5),
        "outcome": found.outcome,
        "reason": found.reason,
        "repeats_needed": found.repeats_needed,
    }


def rejections(pair: Pair, options: Options, family: int) -> list[dict[str, Any]]:
    """Return the verdict on the share of rejected requests (429), as a list of one; empty where no side rejected any.

    It is judged by the difference in percentage points: a share of zero has no ratio.
    """
    if not _rejects(pair, options):
        return []
    before, after = ([share for _, share in sorted(one.items())] for one in _rejected(pair))
    row: dict[str, Any] = {
        "name": REJECTED,
        "unit": "%",
        "higher_is_worse": True,
        "threshold": 0.0,
        "floor": options.floor_rejected,
        "old": round(math.fsum(before) / len(before), 4),
        "new": round(math.fsum(after) / len(after), 4),
        "old_runs": before,
        "new_runs": after,
        "change": None,
        "interval": None,
        "worse_at_most": None,
        "spread": None,
    }
    if min(len(before), len(after)) < verdict.FEWEST_RUNS:
        few = f"requests were rejected, {WANTED_REPEATS} repeats are needed to judge that"
        return [row | {"outcome": "not enough evidence", "reason": few, "repeats_needed": WANTED_REPEATS}]
    found = verdict.decide_difference(before, after, pair.together, options.floor_rejected, family)
    return [
        row
        | {
            "difference": round(found.change, 4),
            "difference_interval": [round(found.low, 4), round(found.high, 4)],
            "difference_at_most": round(found.at_most, 4),
            "outcome": found.outcome,
            "reason": found.reason,
            "repeats_needed": found.repeats_needed,
        }
    ]


def _rejected(pair: Pair) -> tuple[dict[int, float], dict[int, float]]:
    """Return the percentage of rejected requests of each run of both sides, by repeat; older receipts know of none."""
    assert pair.new is not None
    old, new = (
        {run["repeat"]: float(run["summary"].get("rejected_percent") or 0.0) for run in one.data["runs"]}
        for one in (pair.old, pair.new)
    )
    if pair.together:
        both = old.keys() & new.keys()
        old, new = {key: old[key] for key in both}, {key: new[key] for key in both}
    return old, new


def _rejects(pair: Pair, options: Options) -> bool:
    """Return whether a share of rejected requests is to be judged: where it is asked for, or a side rejected any."""
    if options.metrics and REJECTED not in options.metrics:
        return False
    return bool(options.metrics) or any(share for side in _rejected(pair) for share in side.values())


def _is_sample(pair: Pair, metric: Metric) -> bool:
    """Whether there are runs enough that differ by chance."""
    before, after, _ = _values(pair, metric)
    return min(len(before), len(after)) >= verdict.FEWEST_RUNS and not _stayed_up(pair, metric)


def _stayed_up(pair: Pair, metric: Metric) -> bool:
    """Memory of a server that lived through all runs is one figure, however many runs there were."""
    sides = [one.data["configuration"].get("url") for one in (pair.old, pair.new) if one]
    return metric.name == "memory" and any(sides)


def _once(before: float, after: float, limits: verdict.Limits) -> dict[str, Any]:
    """A figure that there is one of on each side: held against its limits alone."""
    worse = after - before > max(limits.threshold * before, limits.floor)
    return {
        **_blank([before], [after]),
        "change": round(after / before - 1, 5),
        "outcome": "regression" if worse else "no regression",
        "reason": "one process of each: judged by the limit alone" if worse else "",
        "repeats_needed": None,
    }


def quality(
    old: Mapping[str, Any], new: Mapping[str, Any], options: Options, same_texts: bool = True
) -> list[dict[str, Any]]:
    """Quality against its limits and against the old one, exactly: vectors are computed, not sampled."""
    if not new.get("checked"):
        row = {"name": "quality", "unit": "", "repeats_needed": None, "old": None, "new": None}
        if old.get("checked"):
            reason = f"the new one was not checked ({new.get('reason')}), the old one was"
            return [row | {"outcome": "not enough evidence", "reason": reason}]
        return [row | {"outcome": "not compared", "reason": f"not checked: {new.get('reason')}"}]
    if "cosine" not in new:
        return [
            {
                "name": "quality",
                "unit": "",
                "repeats_needed": None,
                "old": None,
                "new": None,
                "outcome": "regression",
                "reason": f"broken: {new.get('reason')}",
            }
        ]
    same = same_texts and old.get("texts") == new.get("texts")
    known: Mapping[str, Any] = old if old.get("checked") and "cosine" in old and same else {}
    limits = new.get("limits") or {}
    return [
        _quality(
            "cosine_p1",
            (known.get("cosine") or {}).get("p1"),
            new["cosine"]["p1"],
            limits.get("cosine_p1"),
            options.cosine_drop,
            options,
        ),
        _quality(
            "recall_at_10",
            known.get("recall_at_10"),
            new["recall_at_10"],
            limits.get("recall_at_10"),
            options.recall_drop,
            options,
        ),
    ]


# The most that may be lost, and what always may: near-ties change places when texts are batched in another way.
MOST_DROP = {"cosine_p1": 0.005, "recall_at_10": 0.02}
_ALWAYS = {"cosine_p1": 0.0005, "recall_at_10": 0.005}


def allowed_drop(name: str, old: float | None, options: Options) -> float:
    """Return the default drop of a quality figure: its distance from 1 may double, between a least and a most drop.

    Precisions that differ, as allowed, differ in quality: the most drop counts.
    """
    if old is None or "precision" in options.allow:
        return MOST_DROP[name]
    return min(MOST_DROP[name], max(_ALWAYS[name], 1 - old))


def _quality(
    name: str, old: float | None, new: float, least: float | None, given: float | None, options: Options
) -> dict[str, Any]:
    drop = allowed_drop(name, old, options) if given is None else given
    reason = ""
    if least is not None and new < least:
        reason = f"under the plan's limit of {least:g}"
    # Both come rounded to a few decimals: a drop of exactly the limit must not fail for its last binary digit.
    elif old is not None and old - new > drop + 1e-9:
        reason = f"fell by {old - new:.4g}, {drop:g} are allowed"
    return {
        "name": name,
        "unit": "",
        "old": old,
        "new": new,
        "drop_allowed": drop,
        "least": least,
        "outcome": "regression" if reason else "no regression",
        "reason": reason or ("" if old is not None else "the old one has none on the same texts"),
        "repeats_needed": None,
    }


def _values(pair: Pair, metric: Metric) -> tuple[list[float], list[float], str]:
    """Figures of the runs of each side, by repeat, where both have that repeat if they are interleaved; or why there are none."""
    if pair.new is None:
        return [], [], "not measured again"
    old, new = ({run["repeat"]: run for run in one.data["runs"]} for one in (pair.old, pair.new))
    if pair.together:
        both = sorted(old.keys() & new.keys())
        old, new = {k: old[k] for k in both}, {k: new[k] for k in both}
    read = [[metric.read(side[repeat]) for repeat in sorted(side)] for side in (old, new)]
    if why := next((value for side in read for value in side if isinstance(value, str)), ""):
        return [], [], why
    return [float(value) for value in read[0]], [float(value) for value in read[1]], ""


def _wanted(options: Options) -> list[Metric]:
    return [METRICS[name] for name in METRICS if not options.metrics or name in options.metrics]


def _notes(pair: Pair, options: Options) -> list[str]:
    assert pair.new is not None
    old, new = pair.old.data, pair.new.data
    notes = []
    if "precision" in options.allow and old["precision"].get("effective") != new["precision"].get("effective"):
        notes.append(
            f"different precisions, as allowed: {old['precision'].get('effective')} and {new['precision'].get('effective')}"
        )
    if "hardware" in options.allow:
        notes += [f"as allowed: {reason}" for reason in hardware(old, new)]
    if old["model"].get("sha256") != new["model"].get("sha256"):
        notes.append("the weights differ (sha256): their quality is each against its own fp32")
    if closed := old.get("closed_loop"):
        load = old["plan"]["load"]
        notes.append(
            f"latencies: open loop at {load['rate']:g} requests/s, {load['capacity_percent']:g} % of the capacity "
            f"of the first target; requests/s: closed loop of {closed['users']} users"
        )
    least = min(len(old["runs"]), len(new["runs"]))
    if not pair.together and least >= verdict.FEWEST_RUNS:
        why, advice = "measured apart", "measure both in one bench"
        if pair.stretched:
            why = "the runs of a repeat lie too far apart in time"
            advice = "a quality check of fewer texts (`quality.texts`), or a bench that nothing interrupts, brings them together"
        notes.append(f"{why}: what changed on the machine in between counts as a change here; {advice}")
    if verdict.FEWEST_RUNS <= least < WANTED_REPEATS:
        notes.append(f"{least} repeats: {WANTED_REPEATS} or more are wanted")
    for side, one in (("old", old), ("new", new)):
        notes += [f"{side}: {caution}" for caution in one["validity"]["cautions"]]
    return notes


def _refused(pair: Pair, reasons: Sequence[str]) -> dict[str, Any]:
    return {
        "name": pair.name,
        "old": _described(pair.old),
        "new": _described(pair.new) if pair.new else None,
        "outcome": "invalid",
        "reasons": list(reasons),
        "interleaved": None,
        "notes": [],
        "metrics": [],
    }


def _described(one: Receipt) -> dict[str, Any]:
    data = one.data
    return {
        "path": str(one.path),
        "seal": data["seal"],
        "created": data["created"],
        "configuration": one.name,
        "precision": data["precision"].get("effective"),
        "hardware": data["hardware"].get("name"),
        "image": (data.get("image") or {}).get("digest"),
        "model_sha256": data["model"].get("sha256"),
        "repeats": len(data["runs"]),
    }


def _blank(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    shown = {"old": round(_centre(before), 4) if before else None, "new": round(_centre(after), 4) if after else None}
    return {
        **shown,
        "old_runs": list(before),
        "new_runs": list(after),
        "change": None,
        "interval": None,
        "worse_at_most": None,
        "spread": None,
    }


def _centre(values: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def _worst(outcomes: Sequence[str]) -> tuple[str, int]:
    """A regression that was found stays one whatever else could not be compared."""
    order = (
        ("regression", 1),
        ("invalid", InvalidRunError.exit_code),
        ("not enough evidence", NotEnoughEvidenceError.exit_code),
        ("no regression", 0),
    )
    return next((one for one in order if one[0] in outcomes), ("improvement", 0))


def problem(result: Mapping[str, Any]) -> InferctlError | None:
    """The error that the command ends with; None for no regression."""
    parts = [part for part in result["configurations"] if part["outcome"] == result["outcome"]]
    if result["outcome"] == "invalid":
        said = "; ".join(f"{part['name']}: {reason}" for part in parts for reason in part["reasons"])
        return InvalidRunError(
            f"cannot be compared ({said})",
            "measure both again, in one bench: `inferctl bench --url old=... --url new=...`",
        )
    found = [metric for part in parts for metric in part["metrics"] if metric["outcome"] == result["outcome"]]
    names = ", ".join(dict.fromkeys(metric["name"] for metric in found))
    if result["outcome"] == "regression":
        return InferctlError(f"regression: {names}", "the receipts name their records: every request is in them")
    if result["outcome"] == "not enough evidence":
        return NotEnoughEvidenceError(f"not enough evidence: {names}", advice(result))
    return None


def advice(result: Mapping[str, Any]) -> str:
    """What would settle what is not settled."""
    parts = [part for part in result["configurations"] if part["outcome"] == "not enough evidence"]
    left = [metric for part in parts for metric in part["metrics"] if metric["outcome"] == "not enough evidence"]
    said = [metric["reason"] for metric in left if metric.get("interval") is None and not metric["repeats_needed"]]
    if any(metric.get("interval") and not metric["repeats_needed"] for metric in left):
        said.append(
            f"over {verdict.MOST_REPEATS} repeats would be needed: measure longer runs on a quieter machine, "
            "or allow more with --threshold"
        )
    elif needed := max((metric["repeats_needed"] or 0 for metric in left), default=0):
        done = min(part[side]["repeats"] for part in parts for side in ("old", "new"))
        said.append(
            f"about {needed} repeats of each ({needed - done} more) would settle it: measure anew with `--repeats {needed}`"
        )
    return "; ".join(dict.fromkeys(said))
