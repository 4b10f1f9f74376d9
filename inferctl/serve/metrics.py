"""The Prometheus metrics of one server, in their own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from inferctl.metering.recorder import Recorder
from inferctl.serve.edge.usage import CLIENT_DISCONNECTED, UsageEvent

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class RequestMetrics:
    """The metrics of requests, for every task. Names follow Prometheus' conventions: base units, `_total` on counters.

    `other`: more registries to expose.
    """

    def __init__(self, *other: CollectorRegistry) -> None:
        self.registry = CollectorRegistry()
        self._registries = (self.registry, *other)
        counter, histogram = self._counter, self._histogram
        self._requests = counter("requests", "Requests by HTTP status; 499: disconnected.", "endpoint", "status")
        self._duration = histogram(
            "request_duration_seconds",
            "Time from the last byte of a request to its successful response.",
            _SECONDS,
            "endpoint",
        )
        self._phase = histogram("phase_duration_seconds", "Time of a successful request by phase.", _SECONDS, "phase")
        self._tokens = counter("tokens", "Input tokens of successful requests.")
        self._output_tokens = counter("output_tokens", "Generated tokens, also of streams that did not complete.")
        self._broken = counter("broken_streams", "Streams that ended with an error event.", "reason")
        self._inputs = counter("inputs", "Inputs of successful requests.")
        self._rejected = counter("rejected", "Requests rejected before any work.", "reason")
        self._cancelled = counter("cancelled", "Requests whose client disconnected.")

    def count_event(self, event: UsageEvent) -> None:
        """Count a finished request. Only successful ones count in the histograms, because rejections are fast."""
        self._requests.labels(event.endpoint or "none", event.status).inc()
        self._output_tokens.inc(event.output_tokens)
        if event.status < 400 and event.code:
            self._broken.labels(event.code).inc()
        elif event.status < 400:
            self._duration.labels(event.endpoint).observe(event.seconds)
            for name, seconds in event.phases.items():
                self._phase.labels(name).observe(seconds)
            self._tokens.inc(event.input_tokens)
            self._inputs.inc(event.inputs)
        elif event.status == CLIENT_DISCONNECTED:
            self._cancelled.inc()
        elif event.status == 429 or event.code == "not_ready" or not event.endpoint:
            self._rejected.labels(event.code).inc()

    def watch_outbox(self, recorder: Recorder) -> None:
        """Add the metrics of the outbox."""
        depth = self._gauge("outbox_events", "Usage events that the ledger does not have.")
        depth.set_function(lambda: recorder.depth)
        age = self._gauge("outbox_age_seconds", "Age of the oldest usage event that the ledger does not have.")
        age.set_function(lambda: recorder.age)
        dropped = self._gauge("outbox_dropped_events", "Usage events lost because the outbox could not be written.")
        dropped.set_function(lambda: recorder.dropped)

    def exposition(self) -> tuple[bytes, str]:
        """Return the text that Prometheus scrapes, and its media type."""
        return b"".join(generate_latest(registry) for registry in self._registries), CONTENT_TYPE_LATEST

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"inferctl_{name}", description, labels, registry=self.registry)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(f"inferctl_{name}", description, registry=self.registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"inferctl_{name}", description, labels, buckets=buckets, registry=self.registry)


class Metrics(RequestMetrics):
    """The metrics of requests, queue and engines of the encoder tasks."""

    def __init__(self) -> None:
        super().__init__()
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.truncated = counter("inputs_truncated", "Inputs truncated to the longest input of the model.")
        self.non_finite = counter("non_finite", "Inputs for which the model returned NaN or infinity; never sent.")
        self.queue_tokens = gauge("queue_tokens", "Tokens in the queue.")
        self.in_flight = gauge("requests_in_flight", "Accepted requests without a response.")
        self.engine_up = gauge("engine_up", "Engines that accept batches.")
        self.engine_deaths = counter("engine_deaths", "Engine processes that crashed.")
        self.engine_restarts = gauge("engine_restarts", "Engine processes restarted since the server started.")
        self.batch_failures = counter("batch_failures", "Batches that the engine could not compute.")
        self.out_of_memory = counter("out_of_memory", "Batches for which the memory of the engine was insufficient.")
        self.batch_limit = gauge("batch_limit_tokens", "Largest batch in tokens; lowered after running out of memory.")
        self.cache_hits = counter("cache_hits", "Inputs whose vectors the cache had, by level.", "level")
        self.cache_misses = counter("cache_misses", "Inputs computed because the cache did not have their vectors.")
        self.cache_coalesced = counter("cache_coalesced", "Inputs that were equal to one in flight.")
        self.cache_bytes = gauge("cache_bytes", "Memory of the cached vectors.")
        self.cache_shared_up = gauge("cache_shared_up", "1 if the shared level of the cache is used.")
        self.cache_shared_failures = counter("cache_shared_failures", "Failed calls of the shared level of the cache.")
        self._batch_tokens = histogram("batch_tokens", "Tokens in a batch.", _TOKENS)
        self._batch_sequences = histogram("batch_sequences", "Sequences in a batch.", _SEQUENCES)
        self._batch_seconds = histogram("batch_duration_seconds", "Time of a batch in the engine.", _SECONDS)

    def count_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count a completed batch and its seconds in the engine."""
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)
