"""The figures of one run, or of several runs pooled, from exact records. This module alone defines them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.judge.streams import Streams
from inferctl.bench.judge.summary_types import Counts, GenerationSummary, Goodput, Interval, LatencyOverTime, Summary
from inferctl.bench.load import records
from inferctl.bench.plan.shape import Load
from inferctl.receipts.receipt import JsonObject

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
LATE_MS = 1.0
# How much later than the end of the measured window a response may come, as a share of the window.
GRACE = 0.05
_MOST_WINDOWS = 240  # of the latency over time


@dataclass(frozen=True)
class RunRecords:
    """The records of one run in the order of their intended sends.

    The measured window is [start_ns, end_ns) on CLOCK_MONOTONIC. `offered` is the number of requests that an open loop
    offered in it; None for a closed loop. Those of generation have `events`, and the `bounds` of a good response in ms
    (`Generation.bounds`). `inputs_by_name` has the inputs per request of each name, if they use several.
    """

    rows: records.Rows
    start_ns: int
    end_ns: int
    inputs_per_request: int
    offered: int | None = None
    events: records.Rows | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    inputs_by_name: Sequence[int] = ()

    def of_name(self, number: int) -> RunRecords:
        """Return the requests of one name. All sent and dropped requests of an open loop were offered."""
        rows = self.rows[self.rows["name"] == number]
        offered = None if self.offered is None else int(np.sum(rows["phase"] == records.MEASURED))
        return replace(
            self, rows=rows, offered=offered, inputs_per_request=self.inputs_by_name[number], inputs_by_name=()
        )

    @cached_property
    def streams(self) -> Streams | None:
        """The streams of all requests; None if the load was not of generation."""
        return None if self.events is None else Streams(self.rows, self.events)

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def measured(self) -> records.Rows:
        """Return the requests of the measured window by intended send: without warm-up, with late responses."""
        measured: records.Rows = self.rows[self.rows["phase"] == records.MEASURED]
        return measured

    @property
    def latencies(self) -> npt.NDArray[np.float64]:
        """Return the latencies (ms) of good responses to measured requests, in the order of the intended sends."""
        return records.latency_ms(self.measured[self.measured["error"] == records.OK])

    @property
    def latencies_of_all(self) -> npt.NDArray[np.float64]:
        """Return the latencies (ms) of all measured requests; infinite for those without a good response."""
        rows = self.measured
        return np.where(rows["error"] == records.OK, records.latency_ms(rows), np.inf)

    @property
    def answered(self) -> int:
        """Return the number of good responses to measured requests that came within the window and its grace period.

        A server that keeps up has requests in flight when the window ends, so a response may come later by the time
        that a request takes: the p90 of the requests sent in the first fifth of the window, before a slow server is far
        behind. The grace period is at least 5% of the window: a stall at its end is in the latencies, and does not mean
        that the server fell behind.
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
        """Return the good responses that arrived within the window, at whatever time they were sent."""
        rows = self.rows[self.rows["error"] == records.OK]
        inside: records.Rows = rows[(rows["end_ns"] >= self.start_ns) & (rows["end_ns"] < self.end_ns)]
        return inside


def summarize(runs: Sequence[RunRecords]) -> Summary:
    """Return the figures of one or more runs of the same configuration.

    Latency (ms) is from the intended send to the end of the response, of good responses to measured requests.
    Throughput counts the good responses that arrived within the measured windows. Intervals are two-sided, 95%. Those
    of latencies are over all responses together, widened for the autocorrelation within each run.
    """
    measured = np.concatenate([run.measured for run in runs])
    completed = np.concatenate([run.completed for run in runs])
    seconds = math.fsum(run.seconds for run in runs)
    good = measured[measured["error"] == records.OK]
    requests_per_s = len(completed) / seconds
    offered = sum(run.offered for run in runs if run.offered is not None) if runs[0].offered is not None else None
    counts = count(measured)
    generated = _generation(runs, seconds) if runs[0].streams else GenerationSummary()
    per_request: float = runs[0].inputs_per_request
    if by_name := runs[0].inputs_by_name:
        per_request = float(np.mean(np.take(by_name, completed["name"]))) if len(completed) else 0.0
    return {
        **counts,
        "runs": len(runs),
        "seconds": round(seconds, 3),
        "rejected_percent": round(100 * counts["rejected"] / max(1, len(measured)), 4),
        "offered": offered,
        "answered": None if offered is None else sum(run.answered for run in runs),
        "requested_per_s": None if offered is None else round(offered / seconds, 3),
        "requests_per_s": round(requests_per_s, 3),
        "requests_per_s_interval": throughput_interval(runs),
        "texts_per_s": generated.get("output_tokens_per_s", round(requests_per_s * per_request, 3)),
        "tokens_per_s": round(float(np.sum(completed["tokens"], dtype=np.int64)) / seconds, 1)
        if np.any(completed["tokens"])
        else None,
        "tokens_per_request": round(float(np.mean(completed["tokens"])), 2) if np.any(completed["tokens"]) else None,
        "latency_ms": {**latency_summary([run.latencies for run in runs]), **_p99_of_all(runs)},
        "server_ms": {
            name: median
            for name in ("queue", "tokenize", "inference")
            if (median := _median(good[f"{name}_ms"])) is not None
        },
        "response_bytes": int(np.median(good["bytes"])) if len(good) else None,
        **generated,
    }


def of_names(runs: Sequence[RunRecords], load: Load) -> list[JsonObject]:
    """Return the figures of each name of the load, over all `runs` together; empty for a load without names."""
    names = load.names if isinstance(load.names, dict) else {}
    return [
        {"name": name, "task": load.of_name(name).task, **summarize([run.of_name(number) for run in runs])}
        for number, name in enumerate(names)
    ]


def _generation(runs: Sequence[RunRecords], seconds: float) -> GenerationSummary:
    """Return the figures of generation.

    Latencies are those of good responses to measured requests. Tokens/s are the tokens of good responses that arrived
    in the measured windows, whenever their requests were sent.
    """
    chosen = [(run.rows, run.streams, _is_good(run) & _is_measured(run)) for run in runs if run.streams]
    ttft = [_known(streams.ttft_ms[use]) for _, streams, use in chosen]
    tpot = [_known(streams.tpot_ms[use]) for _, streams, use in chosen]
    gaps = [streams.gaps["ms"][use[streams.gaps["owner"]]] for _, streams, use in chosen]
    tokens = np.concatenate([streams.tokens[use] for _, streams, use in chosen])
    good = np.concatenate([rows[use] for rows, _, use in chosen])
    events = sum(map(len, gaps)) + sum(map(len, ttft))
    known = good[(good["cached_tokens"] != records.NOT_REPORTED) & (good["tokens"] > 0)]
    return {
        "ttft_ms": latency_summary(ttft),
        "itl_ms": latency_summary(gaps),
        "tpot_ms": latency_summary(tpot),
        "output_tokens_per_s": round(sum(float(np.sum(_tokens(run))) for run in runs) / seconds, 2),
        "output_tokens_per_s_interval": _interval(
            [float(np.sum(_tokens(run))) / run.seconds for run in runs],
            [_tokens(run)[: int(run.seconds + 1e-9)].tolist() for run in runs],
        ),
        "output_tokens_per_request": round(float(np.mean(tokens)), 2) if len(tokens) else None,
        "tokens_per_event": round(float(np.sum(tokens)) / events, 3) if events else None,
        "counted_percent": round(100 * float(np.mean(good["counted"])), 2) if len(good) else 0.0,
        "cached_percent": round(100 * float(np.sum(known["cached_tokens"]) / np.sum(known["tokens"])), 3)
        if len(known)
        else None,
        "finish": {
            name: int(np.sum(good["finish"] == code))
            for code, name in enumerate(records.FINISH_NAMES)
            if np.any(good["finish"] == code)
        },
        "goodput": goodput(runs, seconds) if runs[0].bounds else None,
    }


def goodput(runs: Sequence[RunRecords], seconds: float) -> Goodput:
    """Return the rate of responses within the bounds, and how close to them all responses are."""
    bounds = dict(runs[0].bounds)
    shares = [run.streams.bounds_percent(bounds) for run in runs if run.streams]
    within = [share <= 100 for share in shares]
    completed = sum(int(np.sum(good & _in_window(run))) for run, good in zip(runs, within, strict=True))
    tokens = sum(float(np.sum(_tokens(run, good))) for run, good in zip(runs, within, strict=True))
    measured = [share[_is_measured(run)] for run, share in zip(runs, shares, strict=True)]
    every = np.concatenate(measured)
    finite = latency_summary([share[np.isfinite(share)] for share in measured])
    inflation = stats.variance_inflation(measured, 100.0)
    of_all = {} if np.isfinite(every).all() else {"p99_of_all": _percentile(np.sort(every), 0.99, measured)}
    return {
        "ttft_ms": bounds.get("ttft"),
        "itl_ms": bounds.get("itl"),
        "requests_per_s": round(completed / seconds, 3),
        "output_tokens_per_s": round(tokens / seconds, 2),
        "percent": round(100 * float(np.mean(every <= 100)), 3) if len(every) else 0.0,
        "dependence": None if inflation is None else round(inflation, 2),
        "bounds_percent": {**finite, **of_all},
    }


def bounds_of(goodput: JsonObject) -> dict[str, float]:
    """Return the bounds of a good response in ms, by `ttft` and `itl`."""
    return {key: goodput[f"{key}_ms"] for key in ("ttft", "itl") if goodput[f"{key}_ms"] is not None}


def curves(runs: Sequence[RunRecords]) -> dict[str, list[tuple[float, float]]]:
    """Return points (share, ms) of the distributions of latency, of generation also of TTFT and of ITL (over gaps)."""
    found = {"curve": [run.latencies for run in runs]}
    if pairs := [(run.streams, _is_good(run) & _is_measured(run)) for run in runs if run.streams]:
        found["ttft_curve"] = [_known(streams.ttft_ms[use]) for streams, use in pairs]
        found["itl_curve"] = [streams.gaps["ms"][use[streams.gaps["owner"]]] for streams, use in pairs]
    return {
        name: [(share, _ms(value)) for share, value in stats.curve(np.sort(np.concatenate(values)))]
        for name, values in found.items()
    }


def _is_good(run: RunRecords) -> npt.NDArray[np.bool_]:
    good: npt.NDArray[np.bool_] = run.rows["error"] == records.OK
    return good


def _is_measured(run: RunRecords) -> npt.NDArray[np.bool_]:
    measured: npt.NDArray[np.bool_] = run.rows["phase"] == records.MEASURED
    return measured


def _in_window(run: RunRecords) -> npt.NDArray[np.bool_]:
    """Return which responses of a run ended in its window."""
    ended: npt.NDArray[np.bool_] = (run.rows["end_ns"] >= run.start_ns) & (run.rows["end_ns"] < run.end_ns)
    return ended


def _tokens(run: RunRecords, requests: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float64]:
    """Return the output tokens of good responses, or of `requests`, that arrived in each second of the window."""
    assert run.streams  # only called for generation
    return run.streams.tokens_between(run.start_ns, run.end_ns, _is_good(run) if requests is None else requests)


def _known(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    known: npt.NDArray[np.float64] = values[~np.isnan(values)]
    return known


def count(rows: records.Rows) -> Counts:
    """Return the numbers of requests in `rows`."""
    sent = rows[rows["error"] != records.DROPPED]
    late = (sent["sent_ns"].astype(np.int64) - sent["intended_ns"].astype(np.int64)) / 1e6 > LATE_MS
    kinds = {name: int(np.sum(rows["error"] == code)) for code, name in records.ERROR_NAMES.items()}
    return {
        "requests": len(rows),
        "errors": {name: number for name, number in kinds.items() if number},
        "rejected": int(np.sum(rows["status"] == records.REJECTED)),
        "late": int(np.sum(late)),
        "dropped": len(rows) - len(sent),
    }


def failures(summary: JsonObject) -> dict[str, int]:
    """Return the number of failed requests by kind, without rejected (429) and dropped ones."""
    kinds = {name: count for name, count in summary["errors"].items() if name != "dropped"}
    kinds["HTTP status"] = kinds.get("HTTP status", 0) - summary.get("rejected", 0)
    return {name: count for name, count in kinds.items() if count > 0}


def lost_requests(summary: JsonObject) -> int:
    """Return the number of requests without a good response: failed, rejected or dropped. They have no latency."""
    return sum(summary["errors"].values())


def latency_summary(series: Sequence[npt.NDArray[np.float64]]) -> JsonObject:
    """Return `n`, the mean, the extremes and the percentiles of latencies (ms) as in a receipt.

    `series` has one array per run, in the order of the intended sends. The value of a percentile is None if there are
    not enough samples. `dependence` is the variance inflation factor that widened its interval.
    """
    ascending = np.sort(np.concatenate(series))
    summary: dict[str, Any] = {"n": len(ascending)}
    if len(ascending):
        summary |= {"min": _ms(ascending[0]), "mean": _ms(ascending.mean()), "max": _ms(ascending[-1])}
    for q in QUANTILES:
        summary[f"p{q * 100:g}"] = _percentile(ascending, q, series)
    return summary


def _p99_of_all(runs: Sequence[RunRecords]) -> JsonObject:
    """Return `p99_of_all`: the p99 if requests without a good response count as infinite. Empty if there are none.

    A figure is None if it is infinite. An SLO is judged by this p99: otherwise the slowest 1% of the good responses and
    the lost requests could together be nearly 2% of the requests.
    """
    series = [run.latencies_of_all for run in runs]
    ascending = np.sort(np.concatenate(series))
    if not len(ascending) or np.isfinite(ascending[-1]):
        return {}
    return {"p99_of_all": _percentile(ascending, 0.99, series)}


def _percentile(
    ascending: npt.NDArray[np.float64], q: float, series: Sequence[npt.NDArray[np.float64]]
) -> dict[str, float | None]:
    quantile = stats.quantile(ascending, q, series=series)
    figures = {"value": quantile.value, "low": quantile.low, "high": quantile.high}
    inflation = quantile.variance_inflation
    return {name: None if value is None or math.isinf(value) else _ms(value) for name, value in figures.items()} | {
        "needed": quantile.needed,
        "dependence": None if inflation is None else round(inflation, 2),
    }


def throughput_interval(runs: Sequence[RunRecords]) -> Interval | None:
    """Return the 95% interval of requests/s; None if there are too few values, or too strongly correlated ones.

    It is computed over runs if there are at least three, else over windows of one second, widened for their
    autocorrelation. That of two runs is at least as wide as the difference of their means demands. That of one run
    does not show how runs differ.
    """
    means = [len(run.completed) / run.seconds for run in runs]
    return _interval(means, [[rate for _, rate, _ in timeline(run)] for run in runs])


def _interval(means: Sequence[float], windows: Sequence[Sequence[float]]) -> Interval | None:
    """Return the interval of a rate from its mean in each run, or of few runs from one-second windows."""
    if len(means) >= 3:
        found, over = stats.mean_interval(means), "runs"
    else:
        found, over = stats.windows_interval(windows), "windows"
    if found is None:
        return None
    mean, half_width = found
    return {"low": max(0.0, round(mean - half_width, 3)), "high": round(mean + half_width, 3), "over": over}


def timeline(run: RunRecords, window_s: float = 1.0) -> list[tuple[float, float, float | None]]:
    """Return (seconds since the start, requests/s, median latency in ms) of each whole window."""
    rows = run.completed
    slots = ((rows["end_ns"] - np.uint64(run.start_ns)) / (window_s * 1e9)).astype(int)
    latency = records.latency_ms(rows)
    points: list[tuple[float, float, float | None]] = []
    for slot in range(int(run.seconds / window_s + 1e-9)):
        inside = latency[slots == slot]
        points.append((slot * window_s, len(inside) / window_s, _ms(np.median(inside)) if len(inside) else None))
    return points


def over_time(run: RunRecords) -> LatencyOverTime:
    """Return the latency by intended send, in at most 240 windows of half a second or a multiple of it.

    Median and maximum are those of the sample, without an interval.
    """
    window_s = max(0.5, math.ceil(2 * run.seconds / _MOST_WINDOWS) / 2)
    rows = run.measured
    slots = ((rows["intended_ns"].astype(np.int64) - run.start_ns) / (window_s * 1e9)).astype(int)
    good, latency = rows["error"] == records.OK, records.latency_ms(rows)
    points = []
    for slot in range(math.ceil(run.seconds / window_s - 1e-9)):
        inside = latency[(slots == slot) & good]
        median, maximum = (_ms(np.median(inside)), _ms(inside.max())) if len(inside) else (None, None)
        points.append((slot * window_s, len(inside), median, maximum, int(np.sum((slots == slot) & ~good))))
    return {"window_s": window_s, "points": points}


def client_cpu_percent(state: JsonObject) -> float | None:
    """Return the CPU time of the load generator in the measured window, in percent of one core."""
    wall = state.get("cpu_wall_ns")
    return round(100 * state["cpu_ns"] / wall, 1) if wall else None


def _median(values: npt.NDArray[Any]) -> float | None:
    known = values[~np.isnan(values)]
    return _ms(np.median(known)) if len(known) else None


def _ms(value: float | np.floating[Any]) -> float:
    # Three decimals: nothing here is more exact than a microsecond.
    return round(float(value), 3)
