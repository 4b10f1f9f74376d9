"""Figures of one run, or of several pooled, out of exact records. Definitions stand here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.load import records

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
LATE_MS = 1.0
# A response may come so much later than the end of the measured window, as a share of its length.
GRACE = 0.05
# The server rejects a request that it could not answer in time: an outcome of its own, not a failure.
REJECTED = 429


@dataclass(frozen=True)
class Part:
    """One run: its records in the order of their intended sends, its measured window [start_ns, end_ns) on CLOCK_MONOTONIC, requests offered in it (open loop)."""

    rows: records.Rows
    start_ns: int
    end_ns: int
    inputs_per_request: int
    offered: int | None = None

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def measured(self) -> records.Rows:
        """Requests of the measured window, by intended send: warm-up is out, the drain's answers to them are in."""
        measured: records.Rows = self.rows[self.rows["phase"] == records.MEASURED]
        return measured

    @property
    def latencies(self) -> npt.NDArray[np.float64]:
        """Latency of good answers to measured requests, ms, in the order in which these should have left."""
        return records.latency_ms(self.measured[self.measured["error"] == records.OK])

    @property
    def answered(self) -> int:
        """Good responses to measured requests that came within the window, or after it no later than a request takes.

        That is the p90 of those sent in the window's first fifth, before a slow server has fallen far behind, and at
        least 5 % of the window: a stall at its end is in the latencies, and does not mean that the server fell behind.
        A server that keeps up always has requests in flight at the end; one that does not has more and more of them.
        """
        rows = self.measured[self.measured["error"] == records.OK]
        first = np.sort(
            records.latency_ms(rows[rows["intended_ns"] < self.start_ns + (self.end_ns - self.start_ns) / 5])
        )
        usual_ms = first[stats.rank(len(first), 0.9) - 1] if len(first) else 0.0
        grace_ms = max(usual_ms, GRACE * 1e3 * self.seconds)
        return int(np.sum(rows["end_ns"] < self.end_ns + grace_ms * 1e6))

    @property
    def completed(self) -> records.Rows:
        """Good answers that arrived within the window, whenever they were sent: what throughput counts."""
        rows = self.rows[self.rows["error"] == records.OK]
        inside: records.Rows = rows[(rows["end_ns"] >= self.start_ns) & (rows["end_ns"] < self.end_ns)]
        return inside


def summarise(parts: Sequence[Part]) -> dict[str, Any]:
    """Summary of one or more runs of the same configuration.

    Latency, ms, from the intended send to the end of the answer, over good answers to measured requests. Throughput counts good answers that
    arrived within the measured windows, over the length of those windows. Intervals are two-sided, 95 %; those of latencies are of all answers
    together, widened by how much answers of one run depend on each other.
    """
    measured = np.concatenate([part.measured for part in parts])
    completed = np.concatenate([part.completed for part in parts])
    seconds = math.fsum(part.seconds for part in parts)
    good = measured[measured["error"] == records.OK]
    sent = measured[measured["error"] != records.DROPPED]
    late = (sent["sent_ns"].astype(np.int64) - sent["intended_ns"].astype(np.int64)) / 1e6 > LATE_MS
    requests_per_s = len(completed) / seconds
    offered = sum(part.offered for part in parts if part.offered is not None) if parts[0].offered is not None else None
    return {
        "runs": len(parts),
        "seconds": round(seconds, 3),
        "requests": len(measured),
        "errors": {
            name: count
            for code, name in records.ERROR_NAMES.items()
            if (count := int(np.sum(measured["error"] == code)))
        },
        "rejected": (rejected := int(np.sum(measured["status"] == REJECTED))),
        "rejected_percent": _percent(rejected, len(measured)),
        "late": int(np.sum(late)),
        "dropped": int(np.sum(measured["error"] == records.DROPPED)),
        "offered": offered,
        "answered": None if offered is None else sum(part.answered for part in parts),
        "requested_per_s": None if offered is None else round(offered / seconds, 3),
        "requests_per_s": round(requests_per_s, 3),
        "requests_per_s_interval": throughput_interval(parts),
        "texts_per_s": round(requests_per_s * parts[0].inputs_per_request, 3),
        "tokens_per_s": round(float(np.sum(completed["tokens"], dtype=np.int64)) / seconds, 1)
        if np.any(completed["tokens"])
        else None,
        "tokens_per_request": round(float(np.mean(completed["tokens"])), 2) if np.any(completed["tokens"]) else None,
        "latency_ms": latency_summary([part.latencies for part in parts]),
        "server_ms": {
            name: median
            for name in ("queue", "tokenize", "inference")
            if (median := _median(good[f"{name}_ms"])) is not None
        },
        "response_bytes": int(np.median(good["bytes"])) if len(good) else None,
    }


def failures(summary: Mapping[str, Any]) -> dict[str, int]:
    """Return the requests that failed, by kind: without rejected ones (429), and without those that were not sent."""
    found = {name: count for name, count in summary["errors"].items() if name != "dropped"}
    found["HTTP status"] = found.get("HTTP status", 0) - summary.get("rejected", 0)
    return {name: count for name, count in found.items() if count > 0}


def lost_share(summary: Mapping[str, Any]) -> float:
    """Return the share of requests without a good response: failed, rejected or dropped. They have no latency."""
    return sum(summary["errors"].values()) / summary["requests"] if summary["requests"] else 0.0


def latency_summary(series: Sequence[npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Mean, extremes and percentiles of latencies, run by run in the order of their intended sends.

    A percentile that n does not support has the value None. `dependence` is what its interval was widened by (`stats.dependence`).
    """
    ascending = np.sort(np.concatenate(series))
    summary: dict[str, Any] = {"n": len(ascending)}
    if len(ascending):
        summary |= {"min": _ms(ascending[0]), "mean": _ms(ascending.mean()), "max": _ms(ascending[-1])}
    for q in QUANTILES:
        found = stats.quantile(ascending, q, series=series)
        figures = {"value": found.value, "low": found.low, "high": found.high}
        summary[f"p{q * 100:g}"] = {name: None if value is None else _ms(value) for name, value in figures.items()} | {
            "needed": found.needed,
            "dependence": None if found.dependence is None else round(found.dependence, 2),
        }
    return summary


def throughput_interval(parts: Sequence[Part]) -> dict[str, Any] | None:
    """95 % interval of requests/s: over runs when there are at least five, else over one-second windows (which knows less); None if too few."""
    if len(parts) >= 5:
        found, over = stats.mean_interval([len(part.completed) / part.seconds for part in parts]), "runs"
    else:
        found, over = stats.mean_interval([rate for part in parts for _, rate, _ in timeline(part)]), "windows"
    if found is None:
        return None
    mean, half = found
    return {"low": round(mean - half, 3), "high": round(mean + half, 3), "over": over}


def timeline(part: Part, window_s: float = 1.0) -> list[tuple[float, float, float | None]]:
    """(seconds since the start, requests/s, median latency in ms) of each whole window."""
    rows = part.completed
    slots = ((rows["end_ns"] - np.uint64(part.start_ns)) / (window_s * 1e9)).astype(int)
    latency = records.latency_ms(rows)
    points: list[tuple[float, float, float | None]] = []
    for slot in range(int(part.seconds / window_s + 1e-9)):
        inside = latency[slots == slot]
        points.append((slot * window_s, len(inside) / window_s, _ms(np.median(inside)) if len(inside) else None))
    return points


def over_time(part: Part, windows: int = 240) -> dict[str, Any]:
    """Latency by intended send: `points` of (seconds since the start, answers, median, highest, failures), one a window of `window_s`.

    Windows are half seconds or a multiple of them, at most `windows` of them. Median and highest are of the sample, no more is claimed.
    """
    window_s = max(0.5, math.ceil(2 * part.seconds / windows) / 2)
    rows = part.measured
    slots = ((rows["intended_ns"].astype(np.int64) - part.start_ns) / (window_s * 1e9)).astype(int)
    good, latency = rows["error"] == records.OK, records.latency_ms(rows)
    points = []
    for slot in range(math.ceil(part.seconds / window_s - 1e-9)):
        inside = latency[(slots == slot) & good]
        figures = (_ms(np.median(inside)), _ms(inside.max())) if len(inside) else (None, None)
        points.append((slot * window_s, len(inside), *figures, int(np.sum((slots == slot) & ~good))))
    return {"window_s": window_s, "points": points}


def latency_curve(parts: Sequence[Part]) -> list[tuple[float, float]]:
    """Points (share, ms) of the latency distribution of all good answers to measured requests."""
    ascending = np.sort(np.concatenate([part.latencies for part in parts]))
    return [(share, _ms(value)) for share, value in stats.curve(ascending)]


def client_cpu_percent(state: Mapping[str, Any]) -> float | None:
    """CPU time of the load generator over the measured window, per cent of one core."""
    wall = state.get("cpu_wall_ns")
    return round(100 * state["cpu_ns"] / wall, 1) if wall else None


def _percent(count: int, total: int) -> float:
    return round(100 * count / total, 4) if total else 0.0


def _median(values: npt.NDArray[Any]) -> float | None:
    known = values[~np.isnan(values)]
    return _ms(np.median(known)) if len(known) else None


def _ms(value: float | np.floating[Any]) -> float:
    # A microsecond is finer than anything here can be trusted to.
    return round(float(value), 3)
