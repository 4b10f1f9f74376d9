"""Prometheus metrics of one server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

PHASES = ("tokenize", "queue", "inference")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """What the server counts. Names follow Prometheus' conventions: base units, `_total` on counters."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "inferctl_requests", "Requests answered, by HTTP status.", ["endpoint", "status"], registry=registry
        )
        self.duration = Histogram(
            "inferctl_request_duration_seconds",
            "From the last byte of a request to its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.phase = Histogram(
            "inferctl_phase_duration_seconds",
            "Where a request's time goes.",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter("inferctl_tokens", "Tokens of the requests answered.", registry=registry)
        self.texts = Counter("inferctl_inputs", "Inputs of the requests answered.", registry=registry)
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
        self.batch_tokens = Histogram("inferctl_batch_tokens", "Tokens in a batch.", buckets=_TOKENS, registry=registry)
        self.batch_sequences = Histogram(
            "inferctl_batch_sequences", "Sequences in a batch.", buckets=_SEQUENCES, registry=registry
        )
        self.batch_seconds = Histogram(
            "inferctl_batch_duration_seconds", "Time of a batch in the engine.", buckets=_SECONDS, registry=registry
        )

        # Looking children up by their labels costs as much as counting in them.
        self._phases = [self.phase.labels(phase) for phase in PHASES]
        self._duration = self.duration.labels("embeddings")
        self._by_status: dict[int, Counter] = {}

    def ended(self, status: int, seconds: float) -> None:
        """Count a request for embeddings, `seconds` after its body was there."""
        if status not in self._by_status:
            self._by_status[status] = self.requests.labels("embeddings", str(status))
        self._by_status[status].inc()
        self._duration.observe(seconds)

    def answered(self, tokens: int, texts: int, phases: Sequence[float]) -> None:
        """Count what an answered request held, and where its time went (seconds, as in `PHASES`)."""
        self.tokens.inc(tokens)
        self.texts.inc(texts)
        for child, seconds in zip(self._phases, phases, strict=True):
            child.observe(seconds)

    def batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count a finished batch."""
        self.batch_sequences.observe(sequences)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
