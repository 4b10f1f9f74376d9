"""Sends batches to the engines, returns the results to the requests, and retries what an engine could not compute.

An engine gets as many batches as it runs at a time. One more is prefetched, and only if it is full: a partial batch can
still grow until the engine is free.

A batch that raised is retried in halves, until the sequence that causes the failure is alone. When an engine ends, the
batches that had not started go back to the front of the queue. Each request of a batch that was running is retried
once, in isolation.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import NamedTuple, TypeAlias

import numpy as np

from inferctl.batching.batcher import AdmissionError, Batcher, QueuedSequence
from inferctl.batching.device_share import DeviceShare, Load, Turn
from inferctl.reading.rows import Rows, Tokens, Vectors
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, EngineInfo, EngineProcess
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.scheduling.engine_queue import BatchAttempt, EngineQueue
from inferctl.serve.scheduling.engine_use import EngineUse
from inferctl.serve.work import ENGINE_UNAVAILABLE, RejectedError

# Gets the index of a sequence in its request, its row, and whether that has neither NaN nor infinity.
OnVector: TypeAlias = Callable[[int, Vectors, bool], None]

# Admission asks for each request how long the engines are busy. With eight engines, the answer takes 5 us.
_BUSY_AGE_S = 0.001


def _unavailable(message: str) -> RejectedError:
    """No engine is ready, engines crashed while running this request, or memory is insufficient for it."""
    return RejectedError(ENGINE_UNAVAILABLE, message, 1)


class RequestResult(NamedTuple):
    """The rows of one request and its times (s).

    `non_finite`: the indices of the rows with NaN or infinity. `inference_seconds`: from the start of its first
    batch to its last row.
    """

    rows: Rows
    non_finite: Sequence[int]
    queue_seconds: float
    inference_seconds: float


@dataclass
class _Request:
    """A request in flight. Times are in seconds."""

    sequences: Sequence[Tokens]
    marks: Sequence[int] | None
    future: asyncio.Future[RequestResult]
    arrived: float
    predicted: float
    remaining: int  # sequences without a row
    use: EngineUse
    on_vector: OnVector | None = None
    first_start: float = float("inf")
    rows: Rows | None = None
    non_finite: list[int] = field(default_factory=list)


class Dispatcher:
    """All requests in flight, and one `EngineQueue` per ready engine. Runs on the event loop.

    It is the `Listener` of the engines' supervisors. `share`: of models that share a device, with the `weight` of this
    one; it is then a `SharingModel`.
    """

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        share: DeviceShare | None = None,
        weight: float = 1.0,
    ) -> None:
        self.out_of_memory = 0  # batches
        self._batcher, self._metrics, self._clock = batcher, metrics, clock
        self._engines: dict[EngineProcess, EngineQueue] = {}  # the ready ones
        self._requests: dict[int, _Request] = {}
        self._retries: deque[Sequence[QueuedSequence]] = deque()  # each runs in isolation
        self._ids = count()
        self._busy_s, self._busy_at = 0.0, -math.inf  # seconds until an engine is free, and when this was computed
        self._scheduled = False  # `_dispatch` will run in this turn of the event loop
        self._places: dict[EngineProcess, int] = {}  # that of an engine is the same in each model
        self._turn: Turn | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._slots: Callable[..., int] = EngineQueue.free_slots
        if share is not None:
            self._turn = turn = Turn(share, self, weight)
            self._slots = self._shared_slots
            share.turns.append(turn)
            batcher.elapsed = turn.elapsed
        metrics.watch_queue(
            lambda: batcher.waiting_tokens, lambda: batcher.waiting_requests, lambda: len(self._requests)
        )
        metrics.engine_up.set_function(lambda: len(self._engines))
        metrics.batch_limit.set_function(lambda: batcher.limits.batch_tokens)

    @property
    def ready(self) -> bool:
        """Whether any engine accepts batches."""
        return bool(self._engines)

    def submit(
        self,
        sequences: Sequence[Tokens],
        marks: Sequence[int] | None = None,
        *,
        bulk: bool = False,
        tenant: str | None = None,
        on_vector: OnVector | None = None,
        use: EngineUse | None = None,
    ) -> asyncio.Future[RequestResult]:
        """Queue a request and return the future of its result. Cancelling the future cancels the request.

        `marks`: as in `Batch`. `tenant`: as in `Batcher.submit`.
        `on_vector` gets each row when its batch completes. `use` counts what engines compute. Raises
        `RejectedError`, and so does the future.
        """
        lengths = [len(s) for s in sequences]
        self._metrics.offer(sum(lengths))
        if not self.ready:
            raise _unavailable("the engine is not ready")
        number, now = next(self._ids), self._clock()
        busy_s = self._seconds_until_free()
        try:
            predicted = self._batcher.submit(number, lengths, now, bulk=bulk, busy_s=busy_s, tenant=tenant)
        except AdmissionError as error:
            raise RejectedError(error.reason, str(error), error.retry_after) from None
        future: asyncio.Future[RequestResult] = asyncio.get_running_loop().create_future()
        use = use or EngineUse()
        request = _Request(sequences, marks, future, now, predicted, len(sequences), use, on_vector)
        self._requests[number] = request
        use.begin()
        future.add_done_callback(partial(self._request_done, number, use))
        if not self._scheduled:  # the other requests of this turn of the event loop join the same batch
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)
        return future

    def _request_done(self, number: int, use: EngineUse, _: object) -> None:
        use.end()
        if self._requests.pop(number, None) is not None:  # it was cancelled
            self._batcher.cancel(number)

    def check_admission(self, *, bulk: bool = False, tenant: str | None = None) -> None:
        """Raise `RejectedError` if even a request of one token would be rejected. Called before the body is read."""
        try:
            self._batcher.predict_latency(1, bulk=bulk, busy_s=self._seconds_until_free(), tenant=tenant)
        except AdmissionError as error:
            raise RejectedError(error.reason, str(error), error.retry_after) from None

    def _seconds_until_free(self) -> float:
        """Return the seconds until any engine can start another batch, at most 1 ms old."""
        if (now := self._clock()) - self._busy_at > _BUSY_AGE_S:
            self._busy_s = min(map(self._until_free, self._engines.values()), default=0.0)
            self._busy_at = now
        return self._busy_s

    def _until_free(self, queue: EngineQueue) -> float:
        if self._turn is None:
            return queue.seconds_until_free(self._batcher.latency)
        return 0.0 if self._slots(queue) else self._turn.device.remaining_s(queue.place, self._clock())

    def fail_all(self, message: str) -> None:
        """Fail all requests in flight, because there is no engine."""
        for number in list(self._requests):
            self._fail(number, _unavailable(message))

    def engine_ready(self, engine: EngineProcess, info: EngineInfo) -> None:
        """Send batches to this engine from now on. Part of `Listener`."""
        place = self._places.setdefault(engine, len(self._places))
        if self._turn is not None:
            self._turn.device.loads.setdefault(place, Load())
        self._engines[engine] = EngineQueue(engine, info, self._clock, place)
        self._engines_changed()
        self._dispatch()

    def engine_lost(self, engine: EngineProcess) -> None:
        """Requeue the batches of an engine that ended. Part of `Listener`."""
        self._metrics.engine_deaths.inc()
        for attempt in self._engines.pop(engine).close():
            if attempt.started is None:  # the prefetched one
                self._batcher.requeue(self._wanted(attempt.sequences))
                continue
            requests: dict[int, list[QueuedSequence]] = {}
            for item in attempt.sequences:
                requests.setdefault(item.request, []).append(item)
            if attempt.isolated and len(requests) == 1:
                error = _unavailable("the engine crashed while running this request in isolation")
                self._fail(attempt.sequences[0].request, error)
            else:
                self._retries.extend(requests.values())
        self._engines_changed()
        self._dispatch()

    def batch_done(self, engine: EngineProcess, result: BatchResult) -> None:
        """Store the rows of a batch. Part of `Listener`."""
        queue = self._engines[engine]
        attempt, seconds = queue.finish(result.id)
        now = self._clock()
        # What a batch for idle cores waited for others says nothing. Batches may have several cores, these have one.
        seconds = result.seconds * queue.slots / queue.idle_slots if attempt.idle else max(seconds, result.seconds)
        if self._turn is not None and not attempt.idle:
            self._turn.charge(seconds / queue.slots - attempt.charged)
        self._batcher.latency.observe(attempt.tokens, seconds)
        self._metrics.count_batch(len(attempt.sequences), attempt.tokens, result.seconds, result.flops)
        queue.raise_batch_limit(attempt.tokens)
        self._engines_changed()
        per_token = result.seconds / attempt.tokens
        for row, (item, use) in enumerate(zip(attempt.sequences, attempt.uses, strict=True)):
            use.add(item.tokens, per_token * item.tokens)
            if request := self._requests.get(item.request):
                request.first_start = min(request.first_start, now - result.seconds)
                self._store(request, item, result.rows[row], bool(result.ok[row]), now)
        self._dispatch()

    def batch_failed(self, engine: EngineProcess, number: int, message: str, out_of_memory: bool) -> None:
        """Retry a batch that raised, in halves, until a failing sequence runs in isolation. Part of `Listener`."""
        queue = self._engines[engine]
        attempt, _ = queue.finish(number)
        self._metrics.batch_failures.inc()
        if out_of_memory:
            self.out_of_memory += 1
            self._metrics.out_of_memory.inc()
            queue.lower_batch_limit(attempt)
            self._engines_changed()
        if attempt.isolated and len(attempt.sequences) == 1:
            insufficient = _unavailable(f"insufficient memory for this request: {message}")
            self._fail(
                attempt.sequences[0].request,
                insufficient
                if out_of_memory
                else RejectedError("engine_failed", f"the engine could not compute this request: {message}"),
            )
        else:  # also one sequence, because a batch that ran at the same time may have caused the failure
            middle = len(attempt.sequences) // 2
            self._retries.extend(half for half in (attempt.sequences[:middle], attempt.sequences[middle:]) if half)
        self._dispatch()

    def _engines_changed(self) -> None:
        """Update what the batcher knows of the ready engines and their batch limits."""
        if queues := self._engines.values():
            self._batcher.slots = sum(queue.slots for queue in queues)
            self._batcher.idle_slots = all(queue.idle_slots for queue in queues)
            tokens = min(queue.batch_tokens for queue in queues)
            self._batcher.limits = replace(self._batcher.limits, batch_tokens=tokens)

    def _dispatch(self) -> None:
        """Send as many batches as the engines accept. A batch is prefetched only if no engine has a free slot."""
        self._scheduled, self._busy_at = False, -math.inf
        if self._batcher.idle_slots:
            self._send_idle()
        if self._turn is None:
            self.send(prefetch=False)
            self.send(prefetch=True)
            return
        if self._timer is not None:
            self._timer.cancel()
        wait = self._turn.device.dispatch(self._clock())
        self._timer = asyncio.get_running_loop().call_later(wait, self._dispatch) if wait < math.inf else None

    def waits(self) -> bool:
        """Return whether something is queued that an engine accepts. Part of `SharingModel`."""
        return self.queued() and any(queue.free_slots(prefetch=True) for queue in self._engines.values())

    def send(self, *, prefetch: bool) -> bool:
        """Send as many batches as the engines accept, to the least loaded engine first. Part of `SharingModel`.

        Of several models on a device only one batch, because another model may be next.
        """
        for queue in sorted(self._engines.values(), key=lambda queue: queue.tokens):
            while attempt := self._next(queue, prefetch=prefetch):
                queue.send(self._batch(attempt), attempt)
                if self._turn is not None:
                    attempt.charged = self._batcher.latency.seconds(attempt.tokens) / queue.slots
                    self._turn.charge(attempt.charged)
                    return True
        return False

    def _send_idle(self) -> None:
        """Send as many batches for idle cores as the engines accept."""
        bulk = self._batcher.next_queue(idle=True)
        for queue in sorted(self._engines.values(), key=lambda queue: queue.tokens) if bulk.count else ():
            most = queue.batch_tokens * queue.slots // queue.idle_slots  # on one core each
            while bulk.count and (free := queue.free_slots(idle=True, prefetch=bulk.tokens >= most)):
                if self._retries:  # they wait until the engine runs nothing
                    return
                attempt = BatchAttempt(self._batcher.next_batch(self._clock(), free, most, idle=True), idle=True)
                queue.send(self._batch(attempt), attempt)

    def load(self, place: int) -> Load:
        """Return the load of the batches in flight. Part of `SharingModel`."""
        queues = (queue for queue in self._engines.values() if queue.place == place)
        return next((queue.load(self._batcher.latency) for queue in queues), Load())

    @property
    def slo_s(self) -> float | None:
        """The longest latency of its requests (s). Part of `SharingModel`."""
        return self._batcher.limits.slo_s

    def queued(self) -> bool:
        """Return whether something is queued. Part of `SharingModel`."""
        return bool(self._retries or self._batcher.next_queue().count)

    def _shared_slots(self, queue: EngineQueue, *, prefetch: bool = False) -> int:
        """Return how many more batches the engine and its device accept."""
        assert self._turn is not None
        if slots := queue.free_slots():
            return min(slots, self._turn.device.loads[queue.place].accepted(queue.slots))
        return queue.free_slots(prefetch=prefetch)

    def _batch(self, attempt: BatchAttempt) -> Batch:
        found = [(self._requests[item.request], item.position) for item in attempt.sequences]
        attempt.uses = [request.use for request, _ in found]
        parts = [request.sequences[position] for request, position in found]
        lengths = np.array([len(part) for part in parts], dtype=np.int32)
        marks = None
        if any(of_request := [request.marks for request, _ in found]):  # a list has an entry
            given = zip(of_request, found, strict=True)
            marks = np.array([each[at] if each else 0 for each, (_, at) in given], dtype=np.int32)
        return Batch(next(self._ids), np.concatenate(parts), lengths, marks, attempt.idle)

    def _next(self, queue: EngineQueue, *, prefetch: bool) -> BatchAttempt | None:
        """Return what to send to the engine now: a retry if it is idle, else the next batch of the queue."""
        while self._retries and not queue.in_flight and self._slots(queue):
            if items := self._wanted(self._retries.popleft()):
                return BatchAttempt(items, isolated=True)
        if self._retries or not self._slots(queue, prefetch=prefetch and self._batcher.has_full_batch()):
            return None
        free_slots = sum(self._slots(other) for other in self._engines.values())
        most = math.inf if self._turn is None else self._batcher.latency.tokens(self._turn.longest_batch_s)
        items = self._batcher.next_batch(self._clock(), max(1, free_slots), most)
        return BatchAttempt(items) if items else None

    def _wanted(self, items: Sequence[QueuedSequence]) -> list[QueuedSequence]:
        """Return the sequences whose requests still wait for a result."""
        return [item for item in items if item.request in self._requests]

    def _store(self, request: _Request, item: QueuedSequence, row: Vectors, ok: bool, now: float) -> None:
        """Store the row of a sequence; the last one completes the request."""
        rows, count, index = request.rows, len(request.sequences), item.position
        if rows is None:
            rows = request.rows = np.empty((count, len(row)), dtype=np.float32)
        elif not isinstance(rows, list) and rows.shape[1] != len(row):
            rows = request.rows = list(rows)  # the widths differ
        rows[index] = row
        if not ok:
            request.non_finite.append(index)
            self._metrics.non_finite.inc()
        if request.on_vector:
            request.on_vector(index, row, ok)
        request.remaining -= 1
        if not request.remaining and not request.future.done():
            del self._requests[item.request]
            self._batcher.observe(request.predicted, now - request.arrived)
            queued, inference = max(0.0, request.first_start - request.arrived), now - request.first_start
            request.future.set_result(RequestResult(rows, request.non_finite, queued, inference))

    def _fail(self, number: int, error: Exception) -> None:
        """Fail a request, unless it is complete or cancelled."""
        request = self._requests.pop(number, None)
        self._batcher.cancel(number)
        if request is not None and not request.future.done():
            request.future.set_exception(error)
