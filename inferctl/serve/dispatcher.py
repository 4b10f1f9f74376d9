"""Between requests and the engine: queues what requests bring, sends batches, hands results back, retries what an engine took with it.

One batch runs; a second is sent ahead only when it is full already, as a partial one can still grow until the engine is free.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import numpy.typing as npt

from inferctl.serve.batcher import Batcher, Work
from inferctl.serve.metrics import Metrics
from inferctl.serve.types import Batch, BatchResult, EngineInfo, Tokens, Vectors

_AHEAD = 2
_ATTEMPTS = 2


class EngineUnavailableError(Exception):
    """There is no engine, or it died twice under this request."""


class EngineFailedError(Exception):
    """The engine could not compute this request; the message says why."""


@dataclass(frozen=True)
class Answer:
    """Vectors of one request ([sequences, dimensions]), which of them are finite, and where the time went (seconds)."""

    vectors: Vectors
    ok: npt.NDArray[np.bool_]
    queue_seconds: float
    inference_seconds: float


@dataclass
class _Request:
    sequences: Sequence[Tokens]
    future: asyncio.Future[Answer]
    arrived: float
    left: int
    first_start: float = float("inf")
    vectors: Vectors | None = None
    ok: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))


class Dispatcher:
    """All requests of one engine. Lives on the event loop; `send` is the supervisor's."""

    def __init__(self, batcher: Batcher, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.send: Callable[[Batch], None] | None = None
        self.on_ready: Callable[[EngineInfo], None] = lambda _: None
        self.on_lost: Callable[[], None] = lambda: None
        self.abandoned = 0  # requests that nobody waited for until they had their answer
        self._batcher, self._metrics, self._clock = batcher, metrics, clock
        self._requests: dict[int, _Request] = {}
        self._in_flight: dict[int, list[Work]] = {}
        self._again: deque[list[Work]] = deque()  # halves of failed batches
        self._ids = count()
        self._up = False

    async def embed(self, sequences: Sequence[Tokens]) -> Answer:
        """Vectors of all sequences. Raises `QueueFullError`, `EngineUnavailableError` or `EngineFailedError`; cancelling it drops the work."""
        if not self._up:
            raise EngineUnavailableError("the engine is not ready")
        number, now = next(self._ids), self._clock()
        self._batcher.submit(number, [len(s) for s in sequences], now)
        request = _Request(sequences, asyncio.get_running_loop().create_future(), now, len(sequences))
        self._requests[number] = request
        self._pump()
        try:
            return await request.future
        finally:
            self.abandoned += not request.future.done() or request.future.cancelled()
            if self._requests.pop(number, None) is not None:
                self._batcher.cancel(number)
                self._show_queue()

    @property
    def outstanding(self) -> int:
        """Requests that wait for an answer."""
        return len(self._requests)

    def engine_ready(self, info: EngineInfo) -> None:
        """See `Listener`."""
        self._up = True
        self._batcher.limits = self._batcher.limits.with_batch_tokens(info.batch_tokens)
        self._metrics.engine_up.set(1)
        self.on_ready(info)
        self._pump()

    def engine_lost(self) -> None:
        """See `Listener`. What was with the engine goes back to the front of the queue, once."""
        if self._up:
            self._metrics.engine_deaths.inc()
        self._up = False
        self._metrics.engine_up.set(0)
        lost = [work for batch in (*self._in_flight.values(), *self._again) for work in batch]
        self._in_flight.clear()
        self._again.clear()
        for work in lost:
            if work.attempt + 1 >= _ATTEMPTS:
                self._fail(work.request, EngineUnavailableError("the engine died twice while it ran this request"))
        self._batcher.requeue([work for work in lost if work.request in self._requests])
        self._show_queue()
        self.on_lost()

    def batch_done(self, result: BatchResult) -> None:
        """See `Listener`."""
        batch, now = self._in_flight.pop(result.id), self._clock()
        tokens = sum(work.tokens for work in batch)
        self._batcher.observe(tokens, result.seconds)
        self._metrics.batch(len(batch), tokens, result.seconds)
        for row, work in enumerate(batch):
            request = self._requests.get(work.request)
            if request is None:
                continue
            if request.vectors is None:
                request.vectors = np.empty((len(request.sequences), result.vectors.shape[1]), dtype=np.float32)
                request.ok = np.zeros(len(request.sequences), dtype=np.bool_)
            request.vectors[work.index] = result.vectors[row]
            request.ok[work.index] = result.ok[row]
            request.first_start = min(request.first_start, now - result.seconds)
            request.left -= 1
            if not request.left and not request.future.done():
                queued = max(0.0, request.first_start - request.arrived)
                request.future.set_result(Answer(request.vectors, request.ok, queued, now - request.first_start))
        self._pump()

    def batch_failed(self, number: int, message: str) -> None:
        """See `Listener`. Halves are tried again until the sequence that cannot be computed stands alone."""
        batch = [work for work in self._in_flight.pop(number) if work.request in self._requests]
        self._metrics.batch_failures.inc()
        if len(batch) == 1:
            self._fail(batch[0].request, EngineFailedError(message))
        elif batch:
            middle = len(batch) // 2
            self._again.extend((batch[:middle], batch[middle:]))
        self._pump()

    def _fail(self, number: int, error: Exception) -> None:
        request = self._requests.pop(number, None)
        self._batcher.cancel(number)
        if request is not None and not request.future.done():
            request.future.set_exception(error)

    def _pump(self) -> None:
        while self._up and self.send and len(self._in_flight) < _AHEAD:
            if self._in_flight and not self._again and not self._batcher.has_full_batch():
                break
            batch = self._again.popleft() if self._again else self._batcher.next_batch()
            batch = [work for work in batch if work.request in self._requests]
            if not batch:
                if self._again or len(self._batcher):
                    continue
                break
            parts = [self._requests[work.request].sequences[work.index] for work in batch]
            number = next(self._ids)
            self._in_flight[number] = batch
            self.send(Batch(number, np.concatenate(parts), np.array([work.tokens for work in batch], dtype=np.int32)))
        self._show_queue()

    def _show_queue(self) -> None:
        self._metrics.queue_tokens.set(self._batcher.waiting_tokens)
        self._metrics.in_flight.set(len(self._requests))
