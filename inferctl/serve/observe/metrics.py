"""The Prometheus metrics of one server, in their own registry."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inferctl.config.spec import Slo
from inferctl.serve.edge.request_context import CLIENT_DISCONNECTED, OTHER
from inferctl.tenancy.metering.recorder import UNAVAILABLE, EventRecorder
from inferctl.tenancy.metering.usage_event import UsageEvent

# The native ids of threads so far, and how many there can be.
Threads: TypeAlias = tuple[Sequence[int], int]
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Codes of rejections that more servers would avoid. Not among them: limits of keys.
AT_CAPACITY = frozenset(
    {
        "queue_full",
        "key_share",
        "max_wait",
        "slo",
        "too_many_requests",
        "too_many_bytes",
        "tokenizer_full",
        "not_ready",
    }
)
# Codes of rejections with 503.
_UNAVAILABLE = frozenset({"not_ready", UNAVAILABLE, "access_unavailable"})
# Before requests complete: tokens of a request, and bytes of a body per token.
_INPUT_TOKENS, _BYTES_PER_TOKEN = 100, 4
# Each completed request multiplies the weight of earlier ones by this, so that about the last 1000 count.
_DECAY = 0.999
# A body that was not read counts as at most so many mean requests, so no header can ask for more servers.
_MOST_UNREAD = 4


def objectives(slo: Slo) -> dict[str, float]:
    """Return the SLO of a spec in seconds, by objective."""
    found = {"request_p99": slo.p99_ms, "first_token": slo.ttft_ms, "token_gap": slo.itl_ms}
    return {name: ms / 1000 for name, ms in found.items() if ms is not None}


class RequestSize:
    """Estimates the tokens of a request from the size of its body, by the requests that completed.

    `answer_tokens`: assumed per request until requests complete.
    """

    def __init__(self, answer_tokens: int = 0) -> None:
        self._requests, self._outputs = 1.0, float(answer_tokens)
        self._inputs, self._bytes = float(_INPUT_TOKENS), float(_INPUT_TOKENS * _BYTES_PER_TOKEN)

    @property
    def mean(self) -> float:
        """The mean tokens of a request: of its inputs and its answers."""
        return (self._inputs + self._outputs) / self._requests

    def estimate(self, size: int) -> float:
        """Return the estimated tokens of a request with a body of `size` bytes."""
        return size * self._inputs / self._bytes + self._outputs / self._requests

    def observe(self, size: int, input_tokens: int, output_tokens: int) -> None:
        """Count a completed request."""
        self._requests = self._requests * _DECAY + 1
        self._bytes = self._bytes * _DECAY + size
        self._inputs = self._inputs * _DECAY + input_tokens
        self._outputs = self._outputs * _DECAY + output_tokens


class RequestMetrics:
    """The metrics of requests, for every task. Names follow Prometheus' conventions: base units, `_total` on counters.

    `other`: more registries to expose. `slo`: seconds by objective, from `objectives`. `answer_tokens`: as in
    `RequestSize`. `model`: of a server with several, the label of all series.
    """

    def __init__(
        self,
        *other: CollectorRegistry,
        slo: Mapping[str, float] | None = None,
        answer_tokens: int = 0,
        model: str | None = None,
    ) -> None:
        self.registry = CollectorRegistry() if model is None else _OfModel(model)
        self._registries = (self.registry, *other)
        self.size = RequestSize(answer_tokens)
        slo = slo or {}
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._requests = counter("requests", "Requests by HTTP status; 499: disconnected.", "endpoint", "status")
        self._duration = histogram(
            "request_duration_seconds",
            "Time from the last byte of a request to its successful response.",
            _with_bound(slo.get("request_p99")),
            "endpoint",
            "priority",
        )
        self._phase = histogram(
            "phase_duration_seconds",
            "Time of a successful request by phase.",
            _with_bound(slo.get("first_token")),
            "phase",
        )
        self._tokens = counter("tokens", "Input tokens of successful requests.")
        self._output_tokens = counter("output_tokens", "Generated tokens, also of streams that did not complete.")
        self._broken = counter("broken_streams", "Streams that ended with an error event.", "reason")
        self._inputs = counter("inputs", "Inputs of successful requests.")
        self._rejected = counter("rejected", "Requests rejected before any work.", "reason")
        self._cancelled = counter("cancelled", "Requests whose client disconnected.")
        offered = counter(
            "offered_tokens",
            "Tokens for the engines, also of requests rejected for lack of capacity; estimated if not tokenized here.",
            "basis",
        )
        self._offered_counted, self._offered_estimated = offered.labels("counted"), offered.labels("estimated")
        self._queue_tokens = gauge("queue_tokens", "Tokens in the queue; estimated for generation.", "basis")
        self._waiting = gauge("requests_waiting", "Requests in the queue.")
        self._in_flight = gauge("requests_in_flight", "Accepted requests without a response.")
        self.engine_up = gauge("engine_up", "Engines that accept batches.")
        self.engine_restarts = gauge("engine_restarts", "Engine processes restarted since the server started.")
        self._model = gauge(
            "model_info", "The served model, always 1.", "model", "task", "sha256", "precision", "hardware"
        )
        self._space = gauge("space_info", "The vector spaces of the served model, always 1.", "output", "space")
        objective = gauge("slo_seconds", "Service level objective of the server.", "objective")
        for name, seconds in slo.items():
            objective.labels(name).set(seconds)

    def count_event(self, event: UsageEvent) -> None:
        """Count a finished request. Only successful ones count in the histograms, because rejections are fast."""
        self._requests.labels(event.endpoint or "none", event.status).inc()
        self._output_tokens.inc(event.output_tokens)
        if event.status < 400 and event.code:
            self._broken.labels(event.code).inc()
        elif event.status < 400:
            # Clients choose the header of the priority, so other values must not become labels.
            priority = "bulk" if event.priority == "bulk" else "interactive"
            self._duration.labels(event.endpoint, priority).observe(event.seconds)
            for name, seconds in event.phases.items():
                self._phase.labels(name).observe(seconds)
            self._tokens.inc(event.input_tokens)
            self._inputs.inc(event.inputs)
            if event.inputs:
                computed = event.input_tokens - event.cached_tokens
                self.size.observe(event.body_bytes, computed, event.output_tokens)
        elif event.status == CLIENT_DISCONNECTED:
            self._cancelled.inc()
        elif event.status == 429 or event.code in _UNAVAILABLE or not event.endpoint:
            self._rejected.labels(event.code).inc()
            # The others were offered before they were rejected.
            # Not those above the share of a key, which another server would not accept either.
            known = event.code in AT_CAPACITY and event.code != "key_share"
            if known and not event.inputs and event.endpoint not in ("", OTHER, "tokenize"):
                # What was not read, only the header tells.
                unread = min(self.size.estimate(event.content_length), _MOST_UNREAD * self.size.mean)
                self._offered_estimated.inc(
                    max(self.size.estimate(event.body_bytes) if event.body_bytes else 0, unread)
                )

    def offer(self, tokens: int) -> None:
        """Count tokens for the engines, before the queue accepts or rejects them."""
        self._offered_counted.inc(tokens)

    def offer_body(self, size: int) -> None:
        """Count the estimated tokens of a request with a body of `size` bytes that was not tokenized here."""
        self._offered_estimated.inc(self.size.estimate(size))

    def watch_queue(
        self,
        tokens: Callable[[], float],
        waiting: Callable[[], float],
        in_flight: Callable[[], float],
        *,
        estimated: bool = False,
    ) -> None:
        """Report the queue: its tokens, its requests, and all requests in flight."""
        self._queue_tokens.labels("estimated" if estimated else "counted").set_function(tokens)
        self._waiting.set_function(waiting)
        self._in_flight.set_function(in_flight)

    def watch_threads(self, process: Literal["api", "backend"], *tokenizers: Threads) -> None:
        """Report the times of the event loop, which runs on the calling thread, and of threads that tokenize."""
        event_loop: Threads = [threading.get_native_id()], 1
        self.registry.register(_ThreadTimes(process, {"event_loop": [event_loop], "tokenizer": tokenizers}))

    def watch_budgets(self, reached: Callable[[int, float], int]) -> None:
        """Report how many budgets have reached 80 and 100 percent of their limit."""
        gauge = self._gauge("budgets_reached", "Budgets that have reached this percentage of their limit.", "percent")
        for level in (80, 100):
            gauge.labels(level).set_function(functools.partial(lambda at: reached(at, time.time()), level))

    def describe_model(self, info: Mapping[str, Any]) -> None:
        """Report the served model. `info`: the document of `GET /info`."""
        self._model.clear()  # an engine may start again with another precision
        device = info["device"]
        self._model.labels(
            info["name"],
            info["task"],
            info["model"]["sha256"][:12],
            info["precision"]["effective"],
            device.get("hardware") or device["name"],
        ).set(1)
        self._space.clear()
        for output, space in info["model"].get("spaces", {}).items():
            self._space.labels(output, space["name"]).set(1)

    def watch_outbox(self, recorder: EventRecorder) -> None:
        """Add the metrics of the outbox."""
        depth = self._gauge("outbox_events", "Usage events that the ledger does not have.")
        depth.set_function(lambda: recorder.depth)
        age = self._gauge("outbox_age_seconds", "Age of the oldest usage event that the ledger does not have.")
        age.set_function(lambda: recorder.age)
        dropped = self._gauge("outbox_dropped_events", "Usage events lost because the outbox could not be written.")
        dropped.set_function(lambda: recorder.dropped)

    def exposition(self) -> tuple[bytes, str]:
        """Return the text that Prometheus scrapes, and its media type."""
        return b"".join(map(generate_latest, self._registries)), CONTENT_TYPE_LATEST

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"inferctl_{name}", description, labels, registry=self.registry)

    def _gauge(self, name: str, description: str, *labels: str) -> Gauge:
        return Gauge(f"inferctl_{name}", description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"inferctl_{name}", description, labels, buckets=bounds, registry=self.registry)


class Metrics(RequestMetrics):
    """The metrics of requests, queue and engines of an encoder model."""

    def __init__(self, slo: Mapping[str, float] | None = None, model: str | None = None) -> None:
        super().__init__(slo=slo, model=model)
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.truncated = counter("inputs_truncated", "Inputs truncated to the longest input of the model.")
        self.non_finite = counter("non_finite", "Inputs for which the model returned NaN or infinity; never sent.")
        self.engine_deaths = counter("engine_deaths", "Engine processes that crashed.")
        self.batch_failures = counter("batch_failures", "Batches that the engine could not compute.")
        self.out_of_memory = counter("out_of_memory", "Batches for which the memory of the engine was insufficient.")
        self.batch_limit = gauge("batch_limit_tokens", "Largest batch in tokens; lowered after running out of memory.")
        self.cache_hits = counter("cache_hits", "Inputs whose vectors the cache had.")
        self.cache_misses = counter("cache_misses", "Inputs computed because the cache did not have their vectors.")
        self.cache_coalesced = counter("cache_coalesced", "Inputs that were equal to one in flight.")
        self.cache_bytes = gauge("cache_bytes", "Memory of the cached vectors.")
        self._batch_tokens = histogram("batch_tokens", "Tokens in a batch.", _TOKENS)
        self._batch_sequences = histogram("batch_sequences", "Sequences in a batch.", _SEQUENCES)
        self._batch_seconds = histogram("batch_duration_seconds", "Time of a batch in the engine.", _SECONDS)

        flops = "Floating-point operations that completed batches needed: of matrix products, without padding."
        self._flops = counter("engine_flops", flops)
        limit = "Floating-point operations per second of matrix products that all engines can do, by source."
        self.matrix_rate = gauge("matrix_flops_per_second", limit, "source")

    def count_batch(self, sequences: int, tokens: int, seconds: float, flops: float) -> None:
        """Count a completed batch, its seconds in the engine and the floating-point operations that it needed."""
        self._flops.inc(flops)
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def watch_capacity(self, rate: Callable[[], float | None]) -> None:
        """Report the tokens per second of this server in full batches."""
        self.registry.register(_Capacity(rate))


class _OfModel(CollectorRegistry):
    """Adds the label `model` to all samples, at the scrape: what counts does not know it."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        for metric in super().collect():
            metric.samples = [each._replace(labels={"model": self._model, **each.labels}) for each in metric.samples]
            yield metric


class _Capacity(Collector):
    """Collects the rate only if it is known: a sum over servers with a zero or NaN would be wrong."""

    def __init__(self, rate: Callable[[], float | None]) -> None:
        self._rate = rate

    def collect(self) -> Iterator[Metric]:
        """Yield the metric."""
        description = "Tokens per second in full batches, fitted to the last ones."
        family = GaugeMetricFamily("inferctl_capacity_tokens_per_second", description, labels=["source"])
        if (rate := self._rate()) is not None:
            family.add_metric(["fitted"], rate)
        yield family


class _ThreadTimes(Collector):
    """Collects the times of threads that Linux's scheduler counts; nothing where it does not.

    A thread that never sleeps is saturated, also if it waits for a core for a part of the time.
    """

    def __init__(self, process: str, threads: Mapping[str, Sequence[Threads]]) -> None:
        self._process, self._threads = process, threads

    def collect(self) -> Iterator[Metric]:
        """Yield the metric."""
        description = "Time of a thread, on average over those of its kind: running, or ready and waiting for a core."
        family = CounterMetricFamily("inferctl_thread_seconds", description, labels=["process", "thread", "state"])
        with contextlib.suppress(OSError):
            for name, pools in self._threads.items():
                ids, count = [number for each, _ in pools for number in each], sum(most for _, most in pools)
                times = [Path(f"/proc/self/task/{number}/schedstat").read_text().split() for number in ids]
                for column, state in enumerate(("running", "waiting") if count else ()):
                    total = sum(int(each[column]) for each in times)
                    family.add_metric([self._process, name, state], total / count / 1e9)
        yield family


def _with_bound(seconds: float | None) -> tuple[float, ...]:
    """Return the bounds of a histogram. With the SLO among them, a quantile is above the SLO only if it really is.

    A quantile above the last bound is reported as that bound, so one above the SLO is needed.
    """
    return _SECONDS if seconds is None else tuple(sorted({*_SECONDS, seconds, 2 * seconds}))
