"""The findings of a result, in words. The first one names the best configuration (`ranking.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from inferctl.bench.judge import slo, summary
from inferctl.bench.measure import concurrency
from inferctl.bench.report import ranking, search_findings
from inferctl.bench.report.rows import MEASURED, MeasuredRow, Row
from inferctl.receipts.receipt import JsonObject


def describe(rows: Sequence[Row], error_budget_percent: float) -> list[str]:
    """Return what the benchmark found, the most important first."""
    with_receipt = [row for row in rows if isinstance(row, MeasuredRow)]
    measured = [row for row in with_receipt if row.outcome == MEASURED and row.valid]
    groups = comparable(measured)
    sentences = _winners(groups, error_budget_percent) or ["No valid measurement: see the reasons."]
    sentences += [
        f"{row.configuration} fails the quality check: {_failure(row.quality)}; it is not recommended."
        for row in with_receipt
        if row.quality.get("passes") is False
    ]
    sentences += _closed_loops(measured)
    sentences += saturation(measured)
    for row in measured:
        if row.search:
            sentences += search_findings.sentences(row.configuration, row.search)
    sentences += [text for row in measured if (text := _goodput(row))]
    sentences += _slo([row for row in measured if row.slo and not row.search])
    sentences += [text for row in measured if (text := _burst(row))]
    return list(dict.fromkeys(sentences + _compact(measured)))


def _winners(groups: dict[str, list[MeasuredRow]], error_budget_percent: float) -> list[str]:
    """Return the results of all groups, then what is to say about each."""
    eligible = {name: ranking.eligible(group, error_budget_percent) for name, group in groups.items()}
    pairs = sum(math.comb(len(group), 2) for group in eligible.values())
    winners = {
        name: ranking.winner(eligible[name], len(group), len(groups), pairs)
        if eligible[name]
        else [ranking.none_eligible(group)]
        for name, group in groups.items()
    }
    named = [[f"{name}: {text}" if len(groups) > 1 else text for text in texts] for name, texts in winners.items()]
    return [texts[0] for texts in named] + list(dict.fromkeys(text for texts in named for text in texts[1:]))


def comparable(rows: Sequence[MeasuredRow]) -> dict[str, list[MeasuredRow]]:
    """Return groups of rows with the same texts and load, by their description. Other rows cannot be compared."""
    groups: dict[str, list[MeasuredRow]] = {}
    for row in rows:
        corpus, changes = row.workload
        parts = {key: _shares(value) if key == "names" else value for key, value in (changes or {}).items()}
        load = ", ".join(f"{key} {value}" for key, value in parts.items())
        description = " with ".join(part for part in (f"texts {corpus}", load) if part)
        groups.setdefault(description, []).append(row)
    return groups


def _shares(names: dict[str, float] | str) -> str:
    return names if isinstance(names, str) else ", ".join(f"{name}={share:g}" for name, share in names.items())


def _failure(quality: JsonObject) -> str:
    if not (limits := quality.get("limits")):
        return str(quality["reason"])
    if "kl" in quality:
        return (
            f"KL divergence {quality['kl']['mean']:.4f} (limit {limits['kl']:g}), "
            f"top-1 agreement {quality['agreement']['share']:.3f} (limit {limits['top_1']:g})"
        )
    if difference := quality.get("score_difference"):
        low, high = difference["range"]
        order = (
            f"Kendall's tau {quality['kendall']:.3f} (limit {limits['kendall']:g})"
            if "kendall" in quality
            else f"same labels {quality['top_1']:.1%} (limit {limits['top_1']:.0%})"
        )
        return (
            f"score difference {difference['max']:.2g} of a range of {high - low:.2g} (limit "
            f"{limits['score_difference']:.0%}), {order}"
        )
    return (
        f"cosine p1 {quality['cosine']['p1']:.4f} (limit {limits['cosine_p1']:g}), "
        f"recall@10 {quality['recall_at_10']:.3f} (limit {limits['recall_at_10']:g})"
    )


def _closed_loops(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return requests/s of the closed loops with intervals, and the capacity that an open loop's rate is a share of."""
    loops = [(row.configuration, row.closed_loop) for row in rows if row.closed_loop]
    if not loops:
        return []
    first = loops[0][1]
    rates = ", ".join(f"{name} {loop['requests_per_s']:.1f}{_throughput_interval(loop)}" for name, loop in loops)
    return [
        f"Requests/s in a closed loop of {first['users']} users: {rates}. The rate of the open loop is a share of the "
        f"capacity that the first run measured: {first['reference_rps']:.1f} requests/s."
    ]


def _throughput_interval(loop: JsonObject) -> str:
    """Return the 95% interval and the number of runs that it is from."""
    runs = "1 run" if loop["runs"] == 1 else f"{loop['runs']} runs"
    if not (found := loop["requests_per_s_interval"]):
        return f" ({runs}, no interval)"
    within = "" if found.get("over", "runs") == "runs" else "within "
    return f" ({found['low']:.1f} to {found['high']:.1f}, {within}{runs})"


def saturation(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return which servers the load saturates, for `users: auto`; empty if the plan sets the number of users."""
    every = [(row.configuration, row.concurrency) for row in rows if row.concurrency]
    found = [(name, section) for name, section in every if section["limited_by"] != concurrency.EMULATED]
    if not found:
        return []
    needed: dict[int, list[str]] = {}
    for name, section in found:
        if section["saturated"]:
            needed.setdefault(section["needed_users"], []).append(name)
    sentences: list[str] = []
    if needed:
        points = [f"{count} users for {ranking.enumerated(names)}" for count, names in sorted(needed.items())]
        sentences.append(
            f"No further gain seen above {', and above '.join(points)}: twice and four times as many users gained "
            f"under {concurrency.GROWTH:.0%} ({concurrency.REPEATS} measurements per number of users)."
        )
    users = " or ".join(dict.fromkeys(str(section["users"]) for _, section in every))
    sentences.append(f"{'All were' if len(every) > 1 else f'{found[0][0]} was'} measured with {users} users.")
    unsaturated = [(name, section) for name, section in found if not section["saturated"]]
    sentences += [f"{name} may not be saturated: {_why_unsaturated(section)}." for name, section in unsaturated]
    if unsaturated:
        sentences.append("Without saturation, configurations can show no difference although they differ.")
    return sentences


def _why_unsaturated(section: JsonObject) -> str:
    """Return why the last step of a search for the users did not show that the server is saturated."""
    last, limit = section["steps"][-1], section["limited_by"]
    if limit == concurrency.GENERATOR:
        used = f"the load generator used {last['client_cpu_percent']:.0f}% of its core"
        return f"with {last['users']} users {used}; increase its processes with `--workers`"
    if limit == concurrency.REJECTIONS:
        return f"it rejected {last['rejected_percent']:.0f}% of the requests of {last['users']} users (429)"
    if limit == concurrency.LATENCY:
        return f"with {2 * last['users']} users a request would take over {concurrency.MAX_LATENCY_S:g} s"
    if section["needed_users"] > section["users"]:
        faster = f"another configuration has over {1 / concurrency.FAR_SLOWER:g}x its requests/s"
        return f"its requests/s grew up to {section['needed_users']} users, but {faster} and sets the load"
    return f"requests/s still grew with {last['users']} users"


def _slo(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return which configurations meet the SLO at this load, which do not, and which are inconclusive and why."""
    judged = [(row.configuration, row.slo) for row in rows if row.slo]
    if not judged:
        return []
    parts = [
        f"{verb} {', '.join(names)}"
        for verb, met in (("met by", True), ("not met by", False))
        if (names := [name for name, found in judged if found.met is met])
    ]
    if inconclusive := [f"{name} ({found.reason})" for name, found in judged if found.met is None]:
        parts.append(f"inconclusive for {', '.join(inconclusive)}")
    return [f"SLO ({slo.describe(judged[0][1].p99_ms, judged[0][1].bounds_ms)}) at this load: {'; '.join(parts)}."]


def _goodput(row: MeasuredRow) -> str | None:
    """Return the rate of responses within the bounds of TTFT and ITL; None without bounds."""
    if not (row.generation and (found := row.generation["goodput"])):
        return None
    limits = " and ".join(f"{key.upper()} {value:g} ms" for key, value in summary.bounds_of(found).items())
    return (
        f"Goodput of {row.configuration} (within {limits}): {found['requests_per_s']:.2f} requests/s and "
        f"{found['output_tokens_per_s']:.1f} output tokens/s; {found['percent']:.1f}% of the requests are good."
    )


def _burst(row: MeasuredRow) -> str | None:
    """Return how the latency changed in the busiest stage of a load; None if no stage sends more than the first."""
    if not row.stages:
        return None
    first, *others = row.stages
    level = "rate" if first["rate"] else "users"
    peak = max(others, key=lambda stage: stage[level] or 0, default=None)
    if not peak or not (peak[level] or 0) > (first[level] or 0) > 0:
        return None
    times = f"{peak[level] / first[level]:g}x the {level}"
    before, during = (stage["latency_ms"] for stage in (first, peak))
    key = "p99" if before["p99"]["value"] and during["p99"]["value"] else "p50"
    if not before[key]["value"] or not during[key]["value"]:
        return f"{row.configuration} at {times}: not enough samples to compare it with the load before."
    runs = f"{len(row.runs)} repeats" if len(row.runs) > 1 else "1 repeat"
    overlap = _ends(before[key])[0] <= _ends(during[key])[1] and _ends(during[key])[0] <= _ends(before[key])[1]
    unclear = ", no clear difference" if overlap else ""
    counts = {
        "failed": sum(summary.failures(peak).values()),
        "were rejected (429)": peak.get("rejected", 0),
        "were dropped": peak["errors"].get("dropped", 0),
    }
    lost = "".join(f", {count} of {peak['requests']} requests {what}" for what, count in counts.items() if count)
    return (
        f"{row.configuration} at {times}: {key} {_milliseconds(before[key])} before, "
        f"{_milliseconds(during[key])} in {peak['name']} ({runs}){unclear}{lost}."
    )


def _milliseconds(found: JsonObject) -> str:
    """Return a percentile with its interval."""
    low, high = _ends(found)
    return f"{found['value']:.1f} ms ({low:.1f} to {high:.1f})"


def _ends(found: JsonObject) -> tuple[float, float]:
    """Return the interval of a percentile that has a value."""
    return float(found["low"]), float(found["high"])


def _compact(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return what each number format of vectors costs, for the first configuration that was compared with fp32."""
    for row in rows:
        if found := row.quality.get("compact"):
            figures = ", ".join(
                f"{one['output_dtype']} {one['recall_at_10']:.3f} at {one['bytes']:,} bytes" for one in found
            )
            return [f"Smaller vectors (`output_dtype`) of {row.configuration}, recall@10 to fp32: {figures}."]
    return []
