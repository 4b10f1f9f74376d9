"""The keys of the figures in a receipt, which `summary.py` computes."""

from __future__ import annotations

from typing import TypedDict

from inferctl.receipts.receipt import JsonObject


class Interval(TypedDict):
    """A 95% interval; `over` says what it was computed over: runs or one-second windows."""

    low: float
    high: float
    over: str


class Counts(TypedDict):
    """Numbers of requests, as in a receipt. `errors` counts those without a good response, by kind."""

    requests: int
    errors: dict[str, int]
    rejected: int
    late: int
    dropped: int


class Goodput(TypedDict):
    """Requests whose first token came within `ttft_ms`, and whose gaps were at most `itl_ms`.

    `percent` is their share of all measured requests. `bounds_percent` has percentiles, as `latency_ms`: of the larger
    of TTFT and worst gap, each in percent of its bound. `dependence` is the variance inflation factor of the share of
    requests that are not good, None with fewer than 40 requests.
    """

    ttft_ms: float | None
    itl_ms: float | None
    requests_per_s: float
    output_tokens_per_s: float
    percent: float
    dependence: float | None
    bounds_percent: JsonObject


class GenerationSummary(TypedDict, total=False):
    """The figures of generation. Percentiles of `ttft_ms` and `tpot_ms` are over requests, of `itl_ms` over gaps.

    `counted_percent` is the share of good responses with usage in each event. `cached_percent` is the share of the
    prompts' tokens that came from a cache, None if the server does not report it.
    """

    ttft_ms: JsonObject
    itl_ms: JsonObject
    tpot_ms: JsonObject
    output_tokens_per_s: float
    output_tokens_per_s_interval: Interval | None
    output_tokens_per_request: float | None
    tokens_per_event: float | None
    counted_percent: float
    cached_percent: float | None
    finish: dict[str, int]
    goodput: Goodput | None


class Summary(Counts, GenerationSummary):
    """The figures of one or more runs, as in a receipt. Rates are per second of the measured windows."""

    runs: int
    seconds: float
    rejected_percent: float
    offered: int | None
    answered: int | None
    requested_per_s: float | None
    requests_per_s: float
    requests_per_s_interval: Interval | None
    texts_per_s: float
    tokens_per_s: float | None
    tokens_per_request: float | None
    latency_ms: JsonObject
    server_ms: dict[str, float]
    response_bytes: int | None


class LatencyOverTime(TypedDict):
    """`points` of (seconds since the start, responses, median ms, maximum ms, failures), one per window."""

    window_s: float
    points: list[tuple[float, int, float | None, float | None, int]]
