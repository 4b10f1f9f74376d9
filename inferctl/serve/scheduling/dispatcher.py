"""Sends batches to the engines, returns the results to the requests, and retries what an engine could not compute.

An engine gets as many batches as it runs at a time. One more is prefetched, and only if it is full: a partial batch can
still grow until the engine is free.

What failed is retried in isolation, so that only the request that causes the failure is rejected. A batch that raised
is retried in halves. A batch that was running when its engine crashed is retried request by request. A vector with NaN
or infinity is computed again in fp32. If the engine then also fails on a health-check batch, the engine is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

import numpy as np

from inferctl.serve.engine_process import memory
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, Tokens, Vectors
from inferctl.serve.metrics import Metrics
from inferctl.serve.scheduling.batcher import Batcher
from inferctl.serve.scheduling.engine_queue import BatchAttempt, EngineQueue

log = logging.getLogger("inferctl.dispatcher")

_MAX_CRASHES = 2
# After at most this many batches near the lowered limit that fit into memory, the batch limit is back at its start
# value. If memory stays insufficient, that costs one retry per about this many batches.
_RECOVERY_BATCHES = 256
# More than one token: a single token uses other attention kernels, in which the suspect request may have failed.
_HEALTH_CHECK_TOKENS = np.full(8, 5, dtype=np.int32)


class EngineUnavailableError(Exception):
    """No engine is ready, engines crashed while running this request, or memory is insufficient for it."""


class EngineFailedError(Exception):
    """The engine could not compute this request. The message says why."""


@dataclass(frozen=True)
class RequestResult:
    """The vectors of one request ([sequences, dimensions]) and its times (s).

    `non_finite`: the indices of the vectors with NaN or infinity.
    """

    vectors: Vectors
    non_finite: Sequence[int]
    queue_seconds: float
    inference_seconds: float


@dataclass
class _Request:
    """A request in flight. Times are in seconds."""

    sequences: Sequence[Tokens]
    future: asyncio.Future[RequestResult]
    arrived: float
    predicted: float
    remaining: int  # sequences without a vector
    crashes: int = 0  # engines in a row that crashed while running it in isolation
    first_start: float = float("inf")
    vectors: Vectors | None = None
    non_finite: list[int] = field(default_factory=list)


class Dispatcher:
    """All requests in flight, and one `EngineQueue` per engine. Runs on the event loop."""

    def __init__(self, batcher: Batcher, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.engines: list[EngineQueue] = []
        self.ready = False  # whether any engine accepts batches
        self.out_of_memory = 0  # batches
        self._batcher, self._metrics, self._clock = batcher, metrics, clock
        self._requests: dict[int, _Request] = {}
        self._retries: deque[BatchAttempt] = deque()
        self._ids = count()
        self._scheduled = False  # `dispatch` will run in this turn of the event loop
        # Cached for one turn of the event loop: the seconds until an engine is free, and the priorities (bulk or not)
        # that passed `check`.
        self._busy_s: float | None = None
        self._admitted: set[bool] = set()
        metrics.queue_tokens.set_function(lambda: batcher.waiting_tokens)
        metrics.in_flight.set_function(lambda: len(self._requests))

    def add_engine(self) -> EngineQueue:
        """Return the queue of one more engine."""
        self.engines.append(EngineQueue(self, self._clock))
        return self.engines[-1]

    def submit(self, sequences: Sequence[Tokens], *, bulk: bool = False) -> asyncio.Future[RequestResult]:
        """Queue a request and return the future of its result. Cancelling the future cancels the request.

        Raises `AdmissionError`, or `EngineUnavailableError` if no engine is ready. The future raises
        `EngineUnavailableError` or `EngineFailedError`.
        """
        if not self.ready:
            raise EngineUnavailableError("the engine is not ready")
        number, now = next(self._ids), self._clock()
        lengths = [len(s) for s in sequences]
        predicted = self._batcher.submit(number, lengths, now, bulk=bulk, busy_s=self._seconds_until_free())
        request = _Request(sequences, asyncio.get_running_loop().create_future(), now, predicted, len(sequences))
        self._requests[number] = request
        request.future.add_done_callback(lambda _: self._request_done(number))
        self._schedule()
        return request.future

    def _request_done(self, number: int) -> None:
        if self._requests.pop(number, None) is not None:
            self._batcher.cancel(number)

    def check(self, *, bulk: bool = False) -> None:
        """Raise `AdmissionError` if even a request of one token would be rejected. Called before the body is read."""
        if bulk not in self._admitted:
            self._batcher.check(1, bulk=bulk, busy_s=self._seconds_until_free())
            self._admitted.add(bulk)

    @property
    def batch_tokens(self) -> int:
        """The batch limit (tokens) in use."""
        return self._batcher.limits.batch_tokens

    @property
    def slo_ms(self) -> float | None:
        """The latency SLO of interactive requests (ms)."""
        slo = self._batcher.limits.slo_s
        return None if slo is None else slo * 1000

    @property
    def latency_model(self) -> dict[str, float | None]:
        """The batch latency model, with the keys of a `--capacity` file."""
        model = self._batcher.latency
        rate = 1 / model.per_token if model.per_token else None
        return {"fixed_s": round(model.fixed, 6), "tokens_per_s": rate and round(rate, 1)}

    def batch_timeout(self, minimum: float, longest: int = 0) -> float:
        """Return the seconds after which a batch counts as hung: 20 times the largest batch, at least `minimum`.

        `longest`: tokens of the longest sequence, which can exceed the batch limit.
        """
        return max(minimum, 20 * self._batcher.latency.seconds(max(self.batch_tokens, longest)))

    def engines_changed(self) -> None:
        """Update the state that depends on which engines are ready and on their batch limits."""
        ready = [engine for engine in self.engines if engine.ready]
        self.ready = bool(ready)
        self._batcher.engines = sum(engine.slots for engine in ready)
        self._metrics.engine_up.set(len(ready))
        if ready:
            self._set_batch_limit(min(engine.batch_tokens for engine in ready))

    def engine_crashed(
        self, running: Sequence[BatchAttempt], prefetched: Sequence[BatchAttempt], *, after_failure: bool
    ) -> None:
        """Requeue the batches of a crashed engine that had not started. Retry the running ones in isolation.

        `after_failure`: the batch before had failed; it may have corrupted the engine and caused the crash.
        """
        self._metrics.engine_deaths.inc()
        self._batcher.requeue(
            [item for attempt in prefetched for item in attempt.sequences if item.request in self._requests]
        )
        sole_suspect = len(running) == 1 and not after_failure
        self._retries.extendleft(
            retry for attempt in running for retry in self._split_by_request(attempt, sole_suspect=sole_suspect)
        )
        for probe_for in [attempt.probe_for for attempt in running if attempt.probe_for]:
            # Health-check batches are never prefetched. So most likely the suspect corrupted the engine.
            suspect = probe_for[0]
            self._count_crash(suspect.sequences[0].request, "engines crash after running this request")
            self._retries.append(suspect)

    def batch_done(self, engine: EngineQueue, attempt: BatchAttempt, result: BatchResult, seconds: float) -> None:
        """Store the vectors of a batch, `seconds` after the engine could start it."""
        if attempt.probe_for:
            suspect, error = attempt.probe_for
            self._fail(suspect.sequences[0].request, error)
            self.dispatch()
            return
        now, tokens = self._clock(), attempt.tokens
        if not attempt.exact:
            self._batcher.latency.observe(tokens, max(seconds, result.seconds))
        self._metrics.count_batch(len(attempt.sequences), tokens, result.seconds)
        self._raise_batch_limit(engine, tokens)
        for row, item in enumerate(attempt.sequences):
            request = self._requests.get(item.request)
            if request is None:
                continue
            request.first_start = min(request.first_start, now - result.seconds)
            request.crashes = 0 if attempt.isolated else request.crashes
            if not result.ok[row] and not attempt.exact:
                self._metrics.fp32_retries.inc()
                self._retries.append(BatchAttempt([item], exact=True))
            else:
                self._store(request, item.position, result.vectors[row], bool(result.ok[row]), now)
        self.dispatch()

    def batch_failed(self, engine: EngineQueue, attempt: BatchAttempt, message: str, out_of_memory: bool) -> None:
        """Retry a batch that raised, in halves, until a failing sequence runs in isolation."""
        self._metrics.batch_failures.inc()
        if attempt.probe_for:
            log.error("the engine fails on a health-check batch: %s; replacing the engine", message)
            suspect = attempt.probe_for[0]
            if engine.batches_run == 2:  # the suspect was the first batch of this engine
                reason = f"engines fail after running this request: {message}"
                self._fail(suspect.sequences[0].request, EngineUnavailableError(reason))
            else:
                self._retries.appendleft(suspect)
            engine.replace()
            return
        if out_of_memory:
            self.out_of_memory += 1
            self._metrics.out_of_memory.inc()
            largest = max(attempt.tokens, engine.largest)
            engine.batch_tokens = max(memory.SMALLEST_BATCH, min(engine.batch_tokens, largest // 2))
            self.engines_changed()
        items = [item for item in attempt.sequences if item.request in self._requests]
        if not attempt.isolated and len(items) == 1:
            # A batch that ran at the same time may have used up the memory or corrupted the engine.
            self._retries.append(BatchAttempt(items, exact=attempt.exact))
        elif items and len(attempt.sequences) == 1:
            insufficient = EngineUnavailableError(f"insufficient memory for this request: {message}")
            error = insufficient if out_of_memory else EngineFailedError(message)
            suspect = BatchAttempt(items, exact=attempt.exact)
            self._send(engine, BatchAttempt([], isolated=True, probe_for=(suspect, error)))
        elif items:
            middle = len(items) // 2
            self._retries.extend(
                BatchAttempt(half, exact=attempt.exact) for half in (items[:middle], items[middle:]) if half
            )
        self.dispatch()

    def dispatch(self) -> None:
        """Send as many batches as the engines accept, to the least loaded engine first.

        A batch is prefetched only if no engine has a free slot.
        """
        self._clear_cache()
        for prefetch in (False, True):
            for engine in sorted((engine for engine in self.engines if engine.ready), key=lambda engine: engine.tokens):
                while (attempt := self._next(engine, prefetch=prefetch)) is not None:
                    self._send(engine, attempt)

    def _schedule(self) -> None:
        """Run `dispatch` after the other requests of this turn of the event loop are queued."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._run_scheduled)

    def _run_scheduled(self) -> None:
        self._scheduled = False
        self.dispatch()

    def _send(self, engine: EngineQueue, attempt: BatchAttempt) -> None:
        parts = [self._requests[item.request].sequences[item.position] for item in attempt.sequences]
        parts = parts or [_HEALTH_CHECK_TOKENS]
        lengths = np.array([len(part) for part in parts], dtype=np.int32)
        engine.send(Batch(next(self._ids), np.concatenate(parts), lengths, attempt.exact), attempt)

    def _next(self, engine: EngineQueue, *, prefetch: bool) -> BatchAttempt | None:
        """Return what to send to the engine now: a retry if it is idle, else the next batch of the queue."""
        while self._retries and not engine.busy:
            retry = self._retries.popleft()
            if items := [item for item in retry.sequences if item.request in self._requests]:
                return BatchAttempt(items, isolated=True, exact=retry.exact)
        if self._retries or not engine.accepts(prefetch=prefetch and self._batcher.has_full_batch()):
            return None
        free_slots = sum(other.free_slots for other in self.engines)
        items = self._batcher.next_batch(self._clock(), slots=max(1, free_slots))
        return BatchAttempt(items) if items else None

    def _split_by_request(self, attempt: BatchAttempt, *, sole_suspect: bool) -> list[BatchAttempt]:
        """Split a batch that was running when its engine crashed into one attempt per request.

        If the batch is the sole suspect and has one request, the crash counts against that request.
        """
        items = sorted(attempt.sequences, key=lambda item: item.request)
        groups = [list(group) for _, group in groupby(items, key=lambda item: item.request)]
        if sole_suspect and len(groups) == 1:
            self._count_crash(items[0].request, "the engine crashed twice while running this request in isolation")
        return [BatchAttempt(group, exact=attempt.exact) for group in groups]

    def _count_crash(self, number: int, message: str) -> None:
        """Count a crash against a request, and fail it after `_MAX_CRASHES`. Its retries are then skipped."""
        request = self._requests.get(number)
        if request is not None:
            request.crashes += 1
            if request.crashes >= _MAX_CRASHES:
                self._fail(number, EngineUnavailableError(message))

    def _store(self, request: _Request, index: int, vector: Vectors, ok: bool, now: float) -> None:
        """Store one vector; the last one completes the request."""
        if len(request.sequences) == 1:
            request.vectors = vector[None]
        else:
            if request.vectors is None:
                request.vectors = np.empty((len(request.sequences), len(vector)), dtype=np.float32)
            request.vectors[index] = vector
        if not ok:
            request.non_finite.append(index)
        request.remaining -= 1
        if not request.remaining and not request.future.done():
            self._batcher.observe(request.predicted, now - request.arrived)
            queued = max(0.0, request.first_start - request.arrived)
            inference = now - request.first_start
            request.future.set_result(RequestResult(request.vectors, request.non_finite, queued, inference))

    def _fail(self, number: int, error: Exception) -> None:
        request = self._requests.pop(number, None)
        self._batcher.cancel(number)
        if request is not None and not request.future.done():
            request.future.set_exception(error)

    def _seconds_until_free(self) -> float:
        """Return the seconds until any engine can start another batch."""
        if self._busy_s is None:
            model = self._batcher.latency
            seconds = (
                engine.seconds_until_free(lambda attempt: model.seconds(attempt.tokens))
                for engine in self.engines
                if engine.ready
            )
            self._busy_s = min(seconds, default=0.0)
            asyncio.get_running_loop().call_soon(self._clear_cache)
        return self._busy_s

    def _clear_cache(self) -> None:
        self._busy_s = None
        self._admitted.clear()

    def _raise_batch_limit(self, engine: EngineQueue, tokens: int) -> None:
        """Raise a lowered batch limit by one step after a batch of at least half that size fitted into memory."""
        full = engine.info.batch_tokens if engine.info else 0
        if engine.batch_tokens < full and 2 * tokens > engine.batch_tokens:
            engine.batch_tokens = min(full, engine.batch_tokens + max(1, full // _RECOVERY_BATCHES))
            self.engines_changed()

    def _set_batch_limit(self, tokens: int) -> None:
        self._batcher.limits = self._batcher.limits.with_batch_tokens(tokens)
        self._metrics.batch_limit.set(tokens)
