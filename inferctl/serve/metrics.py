"""The Prometheus metrics of one server, in their own registry."""

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
    """A histogram without locks, for observations on one thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value in the first bucket whose bound is not below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        """Add the counts to a metric family."""
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)


class Metrics(Collector):
    """The metrics of the server. Names follow Prometheus' conventions: base units, `_total` on counters.

    Counts per request and per batch are plain numbers, which `collect` converts. The library's counters and histograms
    take a lock and search their buckets at each observation, which was a tenth of the time per request.
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
            "inferctl_inputs_truncated", "Inputs truncated to the longest input of the model.", registry=registry
        )
        self.rejected = Counter(
            "inferctl_rejected", "Requests rejected before any work.", ["reason"], registry=registry
        )
        self.cancelled = Counter("inferctl_cancelled", "Requests whose client disconnected.", registry=registry)
        self.non_finite = Counter(
            "inferctl_non_finite", "Inputs with NaN or infinity also in fp32; never sent.", registry=registry
        )
        self.fp32_retries = Counter(
            "inferctl_fp32_retries", "Inputs computed again in fp32 because of NaN or infinity.", registry=registry
        )
        self.queue_tokens = Gauge("inferctl_queue_tokens", "Tokens in the queue.", registry=registry)
        self.in_flight = Gauge(
            "inferctl_requests_in_flight", "Accepted requests without a response.", registry=registry
        )
        self.engine_up = Gauge("inferctl_engine_up", "Engines that accept batches.", registry=registry)
        self.engine_deaths = Counter("inferctl_engine_deaths", "Engine processes that crashed.", registry=registry)
        self.engine_restarts = Gauge(
            "inferctl_engine_restarts", "Engine processes restarted since the server started.", registry=registry
        )
        self.batch_failures = Counter(
            "inferctl_batch_failures", "Batches that the engine could not compute.", registry=registry
        )
        self.out_of_memory = Counter(
            "inferctl_out_of_memory", "Batches for which the memory of the engine was insufficient.", registry=registry
        )
        self.batch_limit = Gauge(
            "inferctl_batch_limit_tokens",
            "Largest batch in tokens; lowered after running out of memory.",
            registry=registry,
        )

    def count_request(self, status: int, seconds: float) -> None:
        """Count a request for embeddings, `seconds` after its body arrived."""
        self._statuses[status] += 1
        self._duration.observe(seconds)

    def count_response(self, tokens: int, inputs: int, phases: Sequence[float]) -> None:
        """Count the tokens, the inputs and the seconds per phase (as in `PHASES`) of a completed request."""
        self._tokens += tokens
        self._inputs += inputs
        for distribution, seconds in zip(self._phases, phases, strict=True):
            distribution.observe(seconds)

    def count_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count a completed batch and its seconds in the engine."""
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that are kept as plain numbers. Part of `Collector`."""
        requests = CounterMetricFamily(
            "inferctl_requests", "Completed requests by HTTP status.", labels=["endpoint", "status"]
        )
        for status, count in sorted(self._statuses.items()):
            requests.add_metric(["embeddings", str(status)], count)
        duration = HistogramMetricFamily(
            "inferctl_request_duration_seconds",
            "Time from the last byte of a request to its response.",
            labels=["endpoint"],
        )
        self._duration.add_to(duration, "embeddings")
        phase = HistogramMetricFamily(
            "inferctl_phase_duration_seconds", "Time of a request by phase.", labels=["phase"]
        )
        for name, distribution in zip(PHASES, self._phases, strict=True):
            distribution.add_to(phase, name)
        yield from (requests, duration, phase)
        yield CounterMetricFamily("inferctl_tokens", "Tokens of completed requests.", self._tokens)
        yield CounterMetricFamily("inferctl_inputs", "Inputs of completed requests.", self._inputs)
        for name, description, distribution in (
            ("tokens", "Tokens in a batch.", self._batch_tokens),
            ("sequences", "Sequences in a batch.", self._batch_sequences),
            ("duration_seconds", "Time of a batch in the engine.", self._batch_seconds),
        ):
            family = HistogramMetricFamily(f"inferctl_batch_{name}", description)
            distribution.add_to(family)
            yield family

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self.registry)
