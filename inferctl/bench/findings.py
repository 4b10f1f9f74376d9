"""What the numbers say, in words: which configuration wins, by how much, at what quality; a difference within the noise is a tie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from inferctl.bench import goodput, stats

# Less than this between two configurations is called a tie even when the intervals part: the same system differs that much from run to run.
TIE = 0.05

# So many of those that were beaten are named in the finding; the table has them all.
NAMED = 4

Row = Mapping[str, Any]


def state(rows: Sequence[Row], mode: str, slo_p99_ms: float | None = None) -> list[str]:
    """What was found, the most important first. `mode` is that of the load: closed compares throughput, open compares p99."""
    measured = [row for row in rows if row["outcome"] == "measured" and row["valid"]]
    groups = alike(measured)
    winners = {name: _winner(members, _mode(members[0], mode)) for name, members in groups.items()}
    sentences = [f"{name}: {one}" if len(groups) > 1 else one for name, one in winners.items()]
    sentences = sentences or ["Nothing was measured that can be used: see the reasons."]
    sentences += [one for members in groups.values() for one in _emulations(members, _mode(members[0], mode))]
    sentences += [
        f"{row['configuration']} fails on quality: {_failure(row['quality'])}; it cannot be recommended."
        for row in rows
        if row["receipt"] and row["quality"].get("passes") is False
    ]
    searched = [row for row in measured if row.get("search")]
    for row in searched:
        sentences += goodput.sentences(row["configuration"], row["search"])
    if slo_p99_ms and measured and not searched:
        sentences.append(f"At this load the SLO (p99 {slo_p99_ms:g} ms) {_slo(measured, slo_p99_ms)}.")
    sentences += [sentence for row in measured if (sentence := _burst(row))]
    sentences += [_beside(row) for row in measured if row.get("neighbours")]
    return sentences + _memory(measured)


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


def _slo(measured: Sequence[Row], limit: float) -> str:
    """Where the p99 holds `limit`, where not, and where its interval leaves that open."""
    holds, fails, unknown = [], [], []
    for row in measured:
        low, high = row["p99_interval_ms"]
        if low is None or high is None:
            unknown.append(f"{row['configuration']} (n too small: {row['n']} of {stats.needed(0.99)} answers)")
        elif high <= limit:
            holds.append(row["configuration"])
        elif low > limit:
            fails.append(row["configuration"])
        else:
            unknown.append(f"{row['configuration']} (the interval {low:.1f} - {high:.1f} ms contains it)")
    said = (("holds for", holds), ("does not hold for", fails), ("cannot be judged for", unknown))
    return "; ".join(f"{verb} {', '.join(names)}" for verb, names in said if names)


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


def _winner(measured: Sequence[Row], mode: str) -> str:
    fit = [row for row in measured if row["quality"].get("passes") is not False]
    if not fit:
        return "No configuration keeps the quality of fp32, so none is recommended."
    ranked = sorted(fit, key=lambda row: cost(row, mode))
    best, others = ranked[0], ranked[1:]
    tied = [row for row in others if tie(best, row, mode)]
    beaten = [row for row in others if row not in tied]
    if not others:
        return f"{best['configuration']} ran alone: {_figure(best, mode)}, {_quality(best)}."
    behind = ", ".join(f"{_ratio(row, best, mode)} of {_named(row)}" for row in beaten[:NAMED])
    if rest := beaten[NAMED:]:
        behind += f", further ahead of {len(rest)} more"
    if not tied:
        return f"{best['configuration']} wins: {behind}, {_at(best)}."
    group, closest = [best, *tied], ""
    if all(row["quality"].get("checked") for row in group):
        group.sort(key=lambda row: (-row["cosine_mean"], -row["recall_at_10"]))
        if len({_quality(row) for row in group}) > 1:
            closest = f"; {group[0]['configuration']} has the better quality: {_quality(group[0])}"
    names = " and ".join(row["configuration"] for row in group)
    if not beaten:
        return f"{names} are a tie, the difference is within the noise ({_figure(best, mode)}){closest}."
    return f"{names} lead in a tie: {behind}{closest}."


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
    """Whether two configurations cannot be told apart: under 5 % between them, or intervals that overlap."""
    if one.get("search") and other.get("search"):
        # Each is known to within its resolution.
        near = max(TIE, one["search"]["resolution"], other["search"]["resolution"])
        return cost(one, mode) == cost(other, mode) or abs(cost(other, mode) / cost(one, mode) - 1) < near
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
