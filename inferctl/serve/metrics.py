"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = CONTENT_TYPE_LATEST

PHASES = ("tokenize", "queue", "inference")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _Distribution:
    """Observations in buckets, all made on one thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        """Make a sample of it."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)


class Metrics(Collector):
    """What the server counts. Names follow Prometheus' conventions: base units, `_total` on counters.

    What each request and each batch counts is kept in plain numbers of the event loop until somebody asks for it (`collect`): the library's own
    counters and histograms take a lock and walk their buckets at each observation, which was a tenth of what a request costs.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._statuses: Tally[int] = Tally()
        self._tokens = self._inputs = 0
        self._duration = _Distribution(_SECONDS)
        self._phases = [_Distribution(_SECONDS) for _ in PHASES]
        self._batch_tokens, self._batch_sequences = _Distribution(_TOKENS), _Distribution(_SEQUENCES)
        self._batch_seconds = _Distribution(_SECONDS)
        registry.register(self)
        self.truncated = Counter(
            "inferctl_inputs_truncated", "Inputs cut to the longest that the model takes.", registry=registry
        )
        self.rejected = Counter("inferctl_rejected", "Requests refused before any work.", ["reason"], registry=registry)
        self.cancelled = Counter("inferctl_cancelled", "Requests whose client went away.", registry=registry)
        self.non_finite = Counter(
            "inferctl_non_finite", "Inputs whose vectors were not finite in fp32 either; never sent.", registry=registry
        )
        self.fp32_retries = Counter(
            "inferctl_fp32_retries", "Inputs computed again in fp32: not finite at first.", registry=registry
        )
        self.queue_tokens = Gauge("inferctl_queue_tokens", "Tokens waiting for the engine.", registry=registry)
        self.in_flight = Gauge(
            "inferctl_requests_in_flight", "Requests accepted and not answered yet.", registry=registry
        )
        self.engine_up = Gauge("inferctl_engine_up", "Engines that take batches.", registry=registry)
        self.engine_deaths = Counter("inferctl_engine_deaths", "Engine processes that died.", registry=registry)
        self.engine_restarts = Gauge(
            "inferctl_engine_restarts", "Engine processes started again since the server started.", registry=registry
        )
        self.batch_failures = Counter(
            "inferctl_batch_failures", "Batches that the engine could not compute.", registry=registry
        )
        self.out_of_memory = Counter(
            "inferctl_out_of_memory", "Batches that did not fit into the engine's memory.", registry=registry
        )
        self.batch_limit = Gauge(
            "inferctl_batch_limit_tokens",
            "Tokens of a batch at most; less after running out of memory.",
            registry=registry,
        )

    def ended(self, status: int, seconds: float) -> None:
        """Count a request for embeddings, `seconds` after its body was there."""
        self._statuses[status] += 1
        self._duration.observe(seconds)

    def answered(self, tokens: int, inputs: int, phases: Sequence[float]) -> None:
        """Count what an answered request held, and where its time went (seconds, as in `PHASES`)."""
        self._tokens += tokens
        self._inputs += inputs
        for distribution, seconds in zip(self._phases, phases, strict=True):
            distribution.observe(seconds)

    def batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count a finished batch."""
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        requests = CounterMetricFamily(
            "inferctl_requests", "Requests answered, by HTTP status.", labels=["endpoint", "status"]
        )
        for status, count in sorted(self._statuses.items()):
            requests.add_metric(["embeddings", str(status)], count)
        duration = HistogramMetricFamily(
            "inferctl_request_duration_seconds", "From the last byte of a request to its answer.", labels=["endpoint"]
        )
        self._duration.add_to(duration, "embeddings")
        phase = HistogramMetricFamily(
            "inferctl_phase_duration_seconds", "Where a request's time goes.", labels=["phase"]
        )
        for name, distribution in zip(PHASES, self._phases, strict=True):
            distribution.add_to(phase, name)
        yield from (requests, duration, phase)
        yield CounterMetricFamily("inferctl_tokens", "Tokens of the requests answered.", self._tokens)
        yield CounterMetricFamily("inferctl_inputs", "Inputs of the requests answered.", self._inputs)
        for name, said, distribution in (
            ("tokens", "Tokens in a batch.", self._batch_tokens),
            ("sequences", "Sequences in a batch.", self._batch_sequences),
            ("duration_seconds", "Time of a batch in the engine.", self._batch_seconds),
        ):
            family = HistogramMetricFamily(f"inferctl_batch_{name}", said)
            distribution.add_to(family)
            yield family

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
