"""The metrics that `inferctl compare` judges, and their values in the runs of two receipts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inferctl.bench.judge.comparable import ReceiptPair
from inferctl.bench.judge.verdict import MIN_RUNS
from inferctl.receipts.receipt import JsonObject, Receipt

_MEBIBYTE = 2**20
_VECTORS, _GENERATE = ("embed", "rerank", "classify"), ("generate",)
_TASKS = (*_VECTORS, *_GENERATE)
# Judged by the difference and not by the ratio, so it is not in `METRICS`.
REJECTED = "rejected"


@dataclass(frozen=True)
class Missing:
    """Why a run has no value. `seconds_needed` is the length of a run that would have one, if that is the cause."""

    reason: str
    seconds_needed: int = 0


@dataclass(frozen=True)
class Metric:
    """A figure of each run.

    - `threshold`: the smallest change that counts by default, as a share.
    - `read`: returns the figure of a run, or the reason why the run has none.
    - `required`: without enough values, the result is inconclusive, even if the metric was not requested.
    - `tasks`: the tasks whose receipts have this figure.
    - `one_per_server`: a figure of the server process, so the runs of a server that stays up share one value.
    """

    name: str
    unit: str
    higher_is_worse: bool
    threshold: float
    read: Callable[[JsonObject], float | Missing]
    required: bool = True
    one_per_server: bool = False
    tasks: tuple[str, ...] = _TASKS


@dataclass(frozen=True)
class RunValues:
    """A metric in the runs of both receipts, in the order of the repeats.

    `missing` is why there are no values, and `seconds_needed` the length of runs that would have values, if known.
    """

    old: Sequence[float]
    new: Sequence[float]
    missing: str = ""
    seconds_needed: int | None = None

    @property
    def fewest(self) -> int:
        """Return the number of runs of the side that has fewer."""
        return min(len(self.old), len(self.new))


def _percentile(key: str, figure: str = "latency_ms") -> Callable[[JsonObject], float | Missing]:
    def read(run: JsonObject) -> float | Missing:
        latency = run["summary"][figure]
        figures = latency.get(key) or {}
        if figures.get("value"):
            return float(figures["value"])
        n, needed = latency["n"], figures.get("needed")
        seconds = run["summary"].get("seconds") or 0
        seconds_needed = math.ceil(1.1 * seconds * needed / n) if n and needed else 0
        advice = f"; measure {seconds_needed} s per run" if seconds_needed else ""
        samples = "gaps" if figure == "itl_ms" else "responses"
        return Missing(f"not enough samples: {n} of {needed} {samples} per run{advice}", seconds_needed)

    return read


def _rate(run: JsonObject) -> float | Missing:
    """Return requests/s, from the closed loop if the run has one: an open loop receives what it sends."""
    summary = (run.get("closed_loop") or run)["summary"]
    return float(summary["requests_per_s"]) or Missing("no request was answered")


def _output_tokens(run: JsonObject) -> float | Missing:
    """Return output tokens/s, from the closed loop if the run has one."""
    summary = (run.get("closed_loop") or run)["summary"]
    return float(summary["output_tokens_per_s"]) or Missing("no tokens arrived")


def _memory(run: JsonObject) -> float | Missing:
    peak = (run.get("resources") or {}).get("server_peak_bytes")
    return peak / _MEBIBYTE if peak else Missing("not measured: server process not found")


# All that `inferctl compare` knows about a metric, including its help and completion, comes from this table. The p99
# depends on the slowest 1% of a run, and memory on how a process started: both vary more than other metrics.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("p50", "ms", True, 0.05, _percentile("p50"), tasks=_VECTORS),
        Metric("p90", "ms", True, 0.05, _percentile("p90"), tasks=_VECTORS),
        Metric("p99", "ms", True, 0.10, _percentile("p99"), tasks=_VECTORS),
        Metric("requests_per_s", "/s", False, 0.05, _rate, tasks=_VECTORS),
        Metric("ttft_p50", "ms", True, 0.05, _percentile("p50", "ttft_ms"), tasks=_GENERATE),
        Metric("ttft_p90", "ms", True, 0.05, _percentile("p90", "ttft_ms"), tasks=_GENERATE),
        Metric("ttft_p99", "ms", True, 0.10, _percentile("p99", "ttft_ms"), required=False, tasks=_GENERATE),
        Metric("itl_p50", "ms", True, 0.05, _percentile("p50", "itl_ms"), tasks=_GENERATE),
        Metric("itl_p99", "ms", True, 0.10, _percentile("p99", "itl_ms"), tasks=_GENERATE),
        Metric("output_tokens_per_s", "/s", False, 0.05, _output_tokens, tasks=_GENERATE),
        Metric("memory", "MiB", True, 0.10, _memory, required=False, one_per_server=True),
    )
}


def values(pair: ReceiptPair, metric: Metric) -> RunValues:
    """Return the values of a metric. If the runs are interleaved, only of the repeats that both receipts have."""
    if pair.new is None:
        return RunValues((), (), "not measured again")
    read = [[metric.read(run) for run in runs] for runs in _runs(pair)]
    if missing := [value for side in read for value in side if isinstance(value, Missing)]:
        worst = max(missing, key=lambda value: value.seconds_needed)
        return RunValues((), (), worst.reason, worst.seconds_needed or None)
    old, new = ([value for value in side if not isinstance(value, Missing)] for side in read)
    return RunValues(old, new)


def rejected(pair: ReceiptPair) -> RunValues:
    """Return the percentage of rejected requests of each run; older receipts count none."""
    old, new = ([float(run["summary"].get("rejected_percent") or 0.0) for run in runs] for runs in _runs(pair))
    return RunValues(old, new)


def is_sample(pair: ReceiptPair, metric: Metric) -> bool:
    """Return whether there are enough runs whose values differ by chance."""
    return values(pair, metric).fewest >= MIN_RUNS and not is_single_value(pair, metric)


def is_single_value(pair: ReceiptPair, metric: Metric) -> bool:
    """Return whether all runs of a side share one value, as one server served all of them."""
    return metric.one_per_server and any(side.url for side in (pair.old, pair.new) if side)


def _runs(pair: ReceiptPair) -> tuple[list[JsonObject], list[JsonObject]]:
    """Return the runs of both receipts in the order of their repeats."""
    old, new = _by_repeat(pair.old), _by_repeat(pair.new)
    if pair.interleaved:
        common = old.keys() & new.keys()
        old, new = ({repeat: side[repeat] for repeat in common} for side in (old, new))
    return [old[repeat] for repeat in sorted(old)], [new[repeat] for repeat in sorted(new)]


def _by_repeat(sealed: Receipt | None) -> dict[int, JsonObject]:
    return {run["repeat"]: run for run in sealed.runs} if sealed else {}
