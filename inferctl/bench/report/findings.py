"""What the numbers say, in words: which configuration wins, by how much, at what quality.

A winner needs five repeats and a verdict (`verdict.decide`) on each pair of configurations. The pairs share one error
rate: of equal configurations, one is said to win in fewer than 5 % of all results. With fewer repeats a sentence says
only which one was fastest in this run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.bench.judge import verdict
from inferctl.bench.measure import concurrency
from inferctl.bench.report import search_findings

# A smaller difference is no clear difference, however sure it is: the same system differs that much from run to run.
TIE = 0.05
# Fewer repeats say too little about how runs differ.
REPEATS = 5

# So many of those that were beaten are named in the finding; the table has them all.
NAMED = 4

Row = Mapping[str, Any]


def state(rows: Sequence[Row], mode: str, error_budget_percent: float = 0.1) -> list[str]:
    """What was found, the most important first. `mode` is that of the load: closed compares throughput, open compares p99."""
    measured = [row for row in rows if row["outcome"] == "measured" and row["valid"]]
    groups = alike(measured)
    fit = {name: _fit(members, error_budget_percent) for name, members in groups.items()}
    family = max(1, sum(math.comb(len(members), 2) for members in fit.values()))
    winners = {name: _winner(fit[name], _mode(members[0], mode), family) for name, members in groups.items()}
    sentences = [f"{name}: {one}" if len(groups) > 1 else one for name, one in winners.items()]
    sentences = sentences or ["Nothing was measured that can be used: see the reasons."]
    sentences += [one for members in groups.values() for one in _emulations(members, _mode(members[0], mode))]
    sentences += [
        f"{row['configuration']} fails on quality: {_failure(row['quality'])}; it cannot be recommended."
        for row in rows
        if row["receipt"] and row["quality"].get("passes") is False
    ]
    sentences += [_rejected(row) for row in measured if row.get("rejected")]
    if closed := [row for row in measured if row.get("closed_loop")]:
        sentences.append(_closed_loops(closed))
    sentences += concurrency.sentences(measured)
    searched = [row for row in measured if row.get("search")]
    for row in searched:
        sentences += search_findings.sentences(row["configuration"], row["search"])
    if judged := [row for row in measured if row.get("slo") and not row.get("search")]:
        sentences.append(_slo(judged))
    sentences += [sentence for row in measured if (sentence := _burst(row))]
    sentences += [_beside(row) for row in measured if row.get("neighbours")]
    return sentences + _memory(measured)


def _fit(members: Sequence[Row], error_budget_percent: float) -> list[Row]:
    """Return the configurations that can win: of sufficient quality, and not by rejecting requests."""
    good = [row for row in members if row["quality"].get("passes") is not False]
    accepting = [row for row in good if (row.get("rejected_percent") or 0) <= error_budget_percent]
    return accepting or good


def _closed_loops(rows: Sequence[Row]) -> str:
    """Requests/s in the closed loops, and the capacity that the rate of the open loops is a share of."""
    first = rows[0]["closed_loop"]
    said = ", ".join(f"{row['configuration']} {row['closed_loop']['requests_per_s']:.1f}" for row in rows)
    return (
        f"Requests/s in a closed loop of {first['users']} users: {said}; the rate of the open loop is a share of "
        f"{first['reference_rps']:.1f}, which the first run measured."
    )


def _rejected(row: Row) -> str:
    return (
        f"{row['configuration']} rejected {row['rejected_percent']:.2g} % of the requests (429): "
        "its latencies are those of accepted requests."
    )


def _emulations(members: Sequence[Row], mode: str) -> list[str]:
    """Why what is emulated is slow here, with what that cost: against fp32, which every device has."""
    native = {row["precision"].get("effective"): row for row in members if row["precision"].get("level") == "native"}
    plain = native.get("fp32")
    found = []
    for row in members:
        if plain and row["precision"].get("level") == "emulated" and math.isfinite(cost(row, mode)):
            reason = str(row["precision"].get("reason") or "the device lacks it").partition(":")[0]
            how = _ratio(plain, row, mode)
            found.append(f"{row['configuration']} is emulated here, since {reason}: {how} of {plain['configuration']}.")
    return found


def alike(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that were asked the same, by what they were asked: others cannot be compared."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        corpus, changes = row.get("workload") or (None, None)
        asked = ", ".join(f"{key} {value}" for key, value in (changes or {}).items())
        groups.setdefault(" with ".join(part for part in (f"texts {corpus}", asked) if part), []).append(row)
    return groups


def _mode(row: Row, mode: str) -> str:
    """The loop that a row ran under: its own where the plan gives it one."""
    changes = (row.get("workload") or (None, None))[1] or {}
    implied = "open" if "rate" in changes else "closed" if "users" in changes else mode
    return str(changes.get("mode", implied))


def _burst(row: Row) -> str | None:
    """What a stage with more load than the first did to the latency."""
    first, *others = row.get("stages") or [None]
    level = "rate" if first and first["rate"] else "users"
    peak = max(others, key=lambda stage: stage[level] or 0, default=None)
    if not first or not peak or not (peak[level] or 0) > (first[level] or 0) > 0:
        return None
    times = f"{peak[level] / first[level]:g} times the {'rate' if level == 'rate' else 'users'}"
    quiet, busy = (stage["latency_ms"] for stage in (first, peak))
    key = "p99" if quiet["p99"]["value"] and busy["p99"]["value"] else "p50"
    if not quiet[key]["value"] or not busy[key]["value"]:
        return f"{row['configuration']}: n too small to say what {times} did."
    failed = sum(peak["errors"].values())
    lost = f", {failed} of {peak['requests']} requests failed" if failed else ""
    return (
        f"{row['configuration']} under {times}: {key} {quiet[key]['value']:.1f} ms before, "
        f"{busy[key]['value']:.1f} ms in {peak['name']}{lost}{_recovered(row.get('recovery') or [])}."
    )


def _recovered(runs: Sequence[Mapping[str, Any]]) -> str:
    """How long the slowest of the runs took until its latency was what it had been."""
    if not runs:
        return ""
    if lacking := next((one for one in runs if one["seconds"] is None), None):
        return f"; when it was over: {lacking['reason']}"
    slowest = max(runs, key=lambda one: one["seconds"])
    if slowest["seconds"] == 0:
        return f"; back at once (to within {slowest['resolution_s']:.1f} s)"
    return f"; back {slowest['seconds']:.1f} s after it (to within {slowest['resolution_s']:.1f} s)"


def _beside(row: Row) -> str:
    """What busy neighbours did to the latency."""
    found = row["neighbours"]
    whom = "1 busy neighbour" if found["count"] == 1 else f"{found['count']} busy neighbours"
    key = next((key for key in ("p99", "p90", "p50") if found["percentiles"][key]["factor"] is not None), None)
    if key is None:
        return f"{row['configuration']} beside {whom}: n too small to say what they cost."
    figures = found["percentiles"][key]
    rates = found["neighbour_requests_per_s"]
    each = f"{rates['min']:.1f}" if rates["min"] == rates["max"] else f"{rates['min']:.1f} to {rates['max']:.1f}"
    open_ = "; the interval contains 1, so this is not settled" if figures["low"] <= 1 <= figures["high"] else ""
    return (
        f"{row['configuration']} beside {whom}: {key} {figures['without_ms']:.1f} -> {figures['with_ms']:.1f} ms, "
        f"{figures['factor']:.2f}x ({figures['low']:.2f} to {figures['high']:.2f}); "
        f"{'it' if found['count'] == 1 else 'each'} did {each} requests/s itself{open_}."
    )


def _failure(quality: Mapping[str, Any]) -> str:
    if "cosine" not in quality:
        return str(quality["reason"])
    limits = quality["limits"]
    return (
        f"cosine p1 {quality['cosine']['p1']:.4f} (limit {limits['cosine_p1']:g}), "
        f"recall@10 {quality['recall_at_10']:.3f} (limit {limits['recall_at_10']:g})"
    )


def _slo(judged: Sequence[Row]) -> str:
    """Which configurations meet the SLO at this load, which do not, and which are inconclusive and why."""
    met = {row["configuration"]: (row["slo"]["met"], row["slo"]["reason"]) for row in judged}
    said = [
        f"{verb} {', '.join(names)}"
        for verb, which in (("is met by", True), ("is not met by", False))
        if (names := [name for name, (found, _) in met.items() if found is which])
    ]
    if unknown := [f"{name} ({reason})" for name, (found, reason) in met.items() if found is None]:
        said.append(f"is inconclusive for {', '.join(unknown)}")
    return f"At this load the SLO (p99 {judged[0]['slo']['p99_ms']:g} ms) {'; '.join(said)}."


def caveats(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(kind, sentence) of everything to know before reading a number, the gravest first.

    Kinds: `invalid`, `absent` (not run, not measured here), `estimated`, `emulated`, `unchecked` (quality), `caution`.
    """
    found = [
        ("invalid", f"{row['configuration']}: {reason}") for row in rows if row["receipt"] for reason in row["reasons"]
    ]
    found += [
        ("absent", f"{row['configuration']} did not run: {row['reason']}")
        for row in rows
        if row["outcome"] == "not run"
    ]
    for reason, names in _grouped(
        (row["reason"], row["configuration"]) for row in rows if row["outcome"] == "not measured here"
    ):
        found.append(("absent", f"not measured here: {names}; {reason}. No figures are made up."))
    found += [("estimated", text) for text in _of_estimates([row for row in rows if row["outcome"] == "estimated"])]
    emulated = (
        (row["precision"].get("reason"), row["configuration"])
        for row in rows
        if row["precision"].get("level") == "emulated"
    )
    found += [("emulated", f"{names}: {reason}") for reason, names in _grouped(emulated)]
    unchecked = (
        (row["quality"]["reason"], row["configuration"])
        for row in rows
        if row["receipt"] and not row["quality"]["checked"]
    )
    found += [("unchecked", f"{names}: quality not checked, {reason}") for reason, names in _grouped(unchecked)]
    cautions = ((caution, row["configuration"]) for row in rows for caution in row["cautions"])
    return found + [("caution", f"{names}: {caution}") for caution, names in _grouped(cautions)]


def _of_estimates(rows: Sequence[Row]) -> Iterator[str]:
    """What to know of estimated rows; what holds for all of them names none."""
    named = [
        (note, f"{row['configuration']} on {row['hardware']['key']}")
        for row in rows
        for note in row["estimate"].get("notes", [])
    ]
    for note, names in _grouped(named):
        everywhere = all(note in row["estimate"].get("notes", []) for row in rows)
        yield f"{'all of them' if everywhere and len(rows) > 1 else names}: {note}"


def _grouped(pairs: Iterable[tuple[str | None, str]]) -> Iterator[tuple[str | None, str]]:
    """(text, names) of (text, name) pairs: each text once, with everyone it is true of."""
    groups: dict[str | None, list[str]] = {}
    for text, name in pairs:
        groups.setdefault(text, []).append(name)
    for text, names in groups.items():
        yield text, ", ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class _Against:
    """The best configuration against another: `beaten` or not, and how many repeats would settle what is inconclusive.

    `span` is the interval of the ratio, in words; empty where it comes from one run.
    """

    row: Row
    beaten: bool
    span: str = ""
    inconclusive: bool = False
    repeats_needed: int | None = None


def _winner(fit: Sequence[Row], mode: str, family: int) -> str:
    if not fit:
        return "No configuration keeps the quality of fp32, so none is recommended."
    ranked = sorted(fit, key=lambda row: cost(row, mode))
    best, others = ranked[0], ranked[1:]
    if not others:
        return f"{best['configuration']} ran alone: {_figure(best, mode)}, {_quality(best)}."
    repeats = _common_repeats(fit, mode)
    judged = repeats >= REPEATS and not any(row.get("search") for row in fit)
    found = [_against(best, row, mode, family) if judged else _in_this_run(best, row, mode) for row in others]
    beaten = [one for one in found if one.beaten]
    behind = ", ".join(f"{_ratio(one.row, best, mode)} of {_named(one.row)}{one.span}" for one in beaten[:NAMED])
    if rest := beaten[NAMED:]:
        behind += f", further ahead of {len(rest)} more"
    open_ = [one for one in found if one.inconclusive]
    tied = [one.row for one in found if not one.beaten and not one.inconclusive]
    said = []
    if beaten and judged:
        verb = "wins" if len(beaten) == len(others) else "is faster"
        said.append(f"{best['configuration']} {verb}: {behind}, {_at(best)}.")
    elif beaten:
        said.append(f"{best['configuration']} is fastest in {_these(repeats)}: {behind}, {_at(best)}.")
    if tied:
        said.append(_no_difference(best, tied, mode, "" if judged or len(fit) == 1 else f" in {_these(repeats)}"))
    said += [_inconclusive(best, one) for one in open_]
    if not judged and not any(row.get("search") for row in fit):
        said.append(f"{REPEATS} repeats are needed to say which one wins.")
    return " ".join(said)


def _these(repeats: int) -> str:
    return "this run" if repeats <= 1 else f"these {repeats} runs"


def _no_difference(best: Row, tied: Sequence[Row], mode: str, where: str) -> str:
    """Name configurations without a clear difference, the one with the best quality first."""
    group, closest = [best, *tied], ""
    if all(row["quality"].get("checked") for row in group):
        group.sort(key=lambda row: (-row["cosine_mean"], -row["recall_at_10"]))
        if len({_quality(row) for row in group}) > 1:
            closest = f"; {group[0]['configuration']} has the better quality: {_quality(group[0])}"
    names = " and ".join(row["configuration"] for row in group)
    return f"No clear difference between {names}{where} ({_figure(best, mode)}){closest}."


def _inconclusive(best: Row, one: _Against) -> str:
    needed = (
        f"needs {one.repeats_needed} repeats"
        if one.repeats_needed
        else f"over {verdict.MOST_REPEATS} repeats would be needed"
    )
    return f"{best['configuration']} against {one.row['configuration']} is inconclusive: {needed}."


def _common_repeats(rows: Sequence[Row], mode: str) -> int:
    return min((len(_costs(row, mode)) for row in rows), default=0)


def _costs(row: Row, mode: str) -> dict[int, float]:
    """Return what is compared, smaller is better, of each run by its repeat: as `cost`, without a search."""
    runs = row.get("runs") or []
    if mode == "closed":
        return {run["repeat"]: 1 / run["requests_per_s"] for run in runs if run["requests_per_s"]}
    key = "p99_ms" if all(run["p99_ms"] for run in runs) else "p50_ms"
    return {run["repeat"]: float(run[key]) for run in runs if run[key]}


def _against(best: Row, other: Row, mode: str, family: int) -> _Against:
    """Judge two configurations over their repeats, which were measured in alternating order."""
    if mode == "open" and not all(run["p99_ms"] for row in (best, other) for run in row["runs"]):
        best, other = ({**row, "runs": [{**run, "p99_ms": None} for run in row["runs"]]} for row in (best, other))
    one, two = _costs(best, mode), _costs(other, mode)
    repeats = sorted(one.keys() & two.keys())
    effect = verdict.paired([one[key] for key in repeats], [two[key] for key in repeats])
    base = math.exp(math.fsum(math.log(one[key]) for key in repeats) / len(repeats))
    found = verdict.decide(effect, base, True, verdict.Limits(TIE), family)
    low, high = 1 + found.low, 1 + found.high
    ends = f"{low:.2f}x to {high:.2f}x" if mode == "closed" else f"{1 / high:.0%} to {1 / low:.0%}"
    return _Against(
        other,
        found.outcome == "regression",
        f" ({ends}, {len(repeats)} repeats)",
        found.outcome == "not enough evidence",
        found.repeats_needed,
    )


def _in_this_run(best: Row, other: Row, mode: str) -> _Against:
    return _Against(other, not tie(best, other, mode))


def _named(row: Row) -> str:
    return (
        f"{row['configuration']} (emulated here)"
        if row["precision"].get("level") == "emulated"
        else str(row["configuration"])
    )


def cost(row: Row, mode: str) -> float:
    """What is compared, smaller is better: seconds a request at the highest rate that held after a search, or for a closed loop;
    the p99 (else the p50) for an open one."""
    if row.get("search"):
        best = row["search"]["max_goodput_rps"]
        return 1 / best if best else float("inf")
    if mode == "closed":
        return 1 / row["requests_per_s"] if row["requests_per_s"] else float("inf")
    value = row["p99_ms"] or row["p50_ms"]
    return float(value) if value else float("inf")


def tie(one: Row, other: Row, mode: str) -> bool:
    """Return whether two configurations show no clear difference: under 5 % between them, or intervals that overlap."""
    if one.get("search") and other.get("search"):
        (low, high), (other_low, other_high) = (_band(row["search"]) for row in (one, other))
        return (high is None or other_low <= high) and (other_high is None or low <= other_high)
    if abs(cost(other, mode) / cost(one, mode) - 1) < TIE:
        return True
    if mode == "closed":
        spans = [row["requests_per_s_interval"] for row in (one, other)]
        return any(span is None for span in spans) or (
            spans[0]["low"] <= spans[1]["high"] and spans[1]["low"] <= spans[0]["high"]
        )
    key = "p99_interval_ms" if one["p99_ms"] and other["p99_ms"] else "p50_interval_ms"
    (low, high), (other_low, other_high) = one[key], other[key]
    return any(bound is None for bound in (low, high, other_low, other_high)) or (
        low <= other_high and other_low <= high
    )


def _band(search: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return the rates between which the highest rate within the SLO lies. Older receipts know probed rates only."""
    if band := search.get("band_rps"):
        return band[0], band[1]
    low = search["max_goodput_rps"] or 0.0
    return low, search["first_failing_rps"]


def _ratio(slower: Row, best: Row, mode: str) -> str:
    if best.get("search"):
        factor = cost(slower, mode) / cost(best, mode)
        return "requests/s within the SLO where there are none" if math.isinf(factor) else f"{factor:.2f}x the goodput"
    if mode == "closed":
        return f"{cost(slower, mode) / cost(best, mode):.2f}x the requests/s"
    return f"{cost(best, mode) / cost(slower, mode):.0%} of the {'p99' if slower['p99_ms'] else 'p50'}"


def _figure(row: Row, mode: str) -> str:
    if row.get("search"):
        best = row["search"]["max_goodput_rps"]
        return f"{best:.1f} requests/s within the SLO" if best else "no rate held the SLO"
    return (
        f"{row['requests_per_s']:.1f} requests/s"
        if mode == "closed" or not row["p99_ms"]
        else f"p99 {row['p99_ms']:.1f} ms"
    )


def _quality(row: Row) -> str:
    if not row["quality"].get("checked"):
        return f"quality not checked ({row['quality'].get('reason')})"
    return f"cosine {row['cosine_mean']:.5f} and recall@10 {row['recall_at_10']:.3f} to fp32"


def _at(row: Row) -> str:
    return f"at {_quality(row)}" if row["quality"].get("checked") else _quality(row)


def _memory(measured: Sequence[Row]) -> list[str]:
    """8-bit weights are about memory: say what they saved, or that they did not."""
    known = {row["precision"].get("effective"): row for row in measured if row.get("server_peak_bytes")}
    small, other = known.get("int8"), known.get("bf16") or known.get("fp16") or known.get("fp32")
    if not small or not other:
        return []
    ratio = small["server_peak_bytes"] / other["server_peak_bytes"]
    return [
        f"int8 held {small['server_peak_bytes'] / 1e6:.0f} MB at most, {ratio:.2f}x of {other['configuration']}'s "
        f"{other['server_peak_bytes'] / 1e6:.0f} MB (whole server processes)."
    ]
