"""Between requests and engines: queues what requests bring, sends batches, hands results back, tries again what an engine could not do.

An engine gets as many batches as it runs at a time; one more is sent ahead only when it is full already, as a partial one can still grow until
the engine is free.
What went wrong is tried again alone, nothing else beside it, so that only the request at fault is given up: a batch that raised in halves, a
batch that its engine died of by request, a vector that is not finite in fp32. An engine that then fails at a harmless batch too is at fault
itself, and is replaced.
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

from inferctl.serve import memory
from inferctl.serve.batcher import Batcher
from inferctl.serve.lane import Lane, Sent
from inferctl.serve.metrics import Metrics
from inferctl.serve.types import Batch, BatchResult, Tokens, Vectors

log = logging.getLogger("inferctl.dispatcher")

_ATTEMPTS = 2
# After this many batches near the limit that did fit into memory, the limit is what it was, wherever it had been.
# Memory that stays insufficient costs a retry in about that many batches.
_REGAINED_AFTER = 256
# More than one token: attention over a single token has kernels of its own, in which a suspect request may have failed.
_HARMLESS = np.full(8, 5, dtype=np.int32)


class EngineUnavailableError(Exception):
    """There is no engine, or it died twice under this request, or its memory does not suffice."""


class EngineFailedError(Exception):
    """The engine could not compute this request; the message says why."""


@dataclass(frozen=True)
class Answer:
    """Vectors of one request ([sequences, dimensions]), which of them are not finite (indices), and where the time went (seconds)."""

    vectors: Vectors
    bad: Sequence[int]
    queue_seconds: float
    inference_seconds: float


@dataclass
class _Request:
    sequences: Sequence[Tokens]
    future: asyncio.Future[Answer]
    arrived: float
    predicted: float  # seconds
    left: int
    deaths: int = 0  # engines that died, one after the other, while they ran it alone
    first_start: float = float("inf")
    vectors: Vectors | None = None
    bad: list[int] = field(default_factory=list)


class Dispatcher:
    """All requests, over one lane for each engine. Lives on the event loop."""

    def __init__(self, batcher: Batcher, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.lanes: list[Lane] = []
        self.up = False  # whether any engine takes batches
        self.out_of_memory = 0  # batches
        self._batcher, self._metrics, self._clock = batcher, metrics, clock
        self._requests: dict[int, _Request] = {}
        self._again: deque[Sent] = deque()
        self._ids = count()
        self._pumping = False  # is about to be called
        # What was found out in this turn of the event loop, for all requests that it brought: `_running()`, and for whom `check` passed.
        self._running_now: float | None = None
        self._passed: set[bool] = set()
        metrics.queue_tokens.set_function(lambda: batcher.waiting_tokens)
        metrics.in_flight.set_function(lambda: len(self._requests))

    def lane(self) -> Lane:
        """A lane for one more engine."""
        self.lanes.append(Lane(self, self._clock))
        return self.lanes[-1]

    def begin(self, sequences: Sequence[Tokens], *, bulk: bool = False) -> asyncio.Future[Answer]:
        """Vectors of all sequences, to be awaited; cancelling it drops the work. Raises `RefusedError`, and `EngineUnavailableError` where there is no engine now.

        The future raises `EngineUnavailableError` or `EngineFailedError`.
        """
        if not self.up:
            raise EngineUnavailableError("the engine is not ready")
        number, now = next(self._ids), self._clock()
        predicted = self._batcher.submit(number, [len(s) for s in sequences], now, bulk=bulk, running=self._running())
        request = _Request(sequences, asyncio.get_running_loop().create_future(), now, predicted, len(sequences))
        self._requests[number] = request
        request.future.add_done_callback(lambda _: self._over(number))
        self._pump_soon()
        return request.future

    def _over(self, number: int) -> None:
        if self._requests.pop(number, None) is not None:
            self._batcher.cancel(number)

    def check(self, *, bulk: bool = False) -> None:
        """Raises `RefusedError` when not even the smallest request would be taken now: before any work is spent on it."""
        if bulk not in self._passed:
            self._batcher.check(1, bulk=bulk, running=self._running())
            self._passed.add(bulk)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch at most, now."""
        return self._batcher.limits.batch_tokens

    @property
    def slo_ms(self) -> float | None:
        """Latency that admission holds interactive requests to (ms)."""
        slo = self._batcher.limits.slo
        return None if slo is None else slo * 1000

    @property
    def pace(self) -> dict[str, float | None]:
        """The fit that predictions come from, in the words of a `--capacity` file."""
        pace = self._batcher.pace
        rate = 1 / pace.per_token if pace.per_token else None
        return {"fixed_s": round(pace.fixed, 6), "tokens_per_s": rate and round(rate, 1)}

    def patience(self, least: float, longest: int = 0) -> float:
        """Seconds after which a batch means that the engine hangs: twenty times what the largest takes, and `least` at least.

        `longest`: tokens of the longest sequence, which may be more than a batch holds.
        """
        return max(least, 20 * self._batcher.pace.seconds(max(self.batch_tokens, longest)))

    def lanes_changed(self) -> None:
        """An engine came or went."""
        up = [lane for lane in self.lanes if lane.up]
        self.up = bool(up)
        self._batcher.engines = sum(lane.slots for lane in up)
        self._metrics.engine_up.set(len(up))
        if up:
            self._limit_batches(min(lane.batch_tokens for lane in up))

    def lost(self, running: Sequence[Sent], ahead: Sequence[Sent], *, spoilt: bool) -> None:
        """An engine died while it ran these; what was sent ahead of time is as good as new. `spoilt`: the batch before had failed, and may be what it died of."""
        self._metrics.engine_deaths.inc()
        self._batcher.requeue([w for sent in ahead for w in sent.works if w.request in self._requests])
        self._again.extendleft(
            again for sent in running for again in self._suspects(sent, len(running) == 1 and not spoilt)
        )
        for doubt in [sent.doubt for sent in running if sent.doubt]:
            # The harmless batch is never sent ahead. An engine that dies of it was left in that state by the suspect, as far as anyone can tell.
            self._died_of(doubt[0].works[0].request, "engines die after this")
            self._again.append(doubt[0])

    def done(self, lane: Lane, sent: Sent, result: BatchResult, seconds: float) -> None:
        """A batch came back, `seconds` after the engine could begin it."""
        if sent.doubt:
            at_fault, error = sent.doubt
            self._fail(at_fault.works[0].request, error)
            self.pump()
            return
        now, tokens = self._clock(), sent.tokens
        if not sent.exact:
            self._batcher.pace.observe(tokens, max(seconds, result.seconds))
        self._metrics.batch(len(sent.works), tokens, result.seconds)
        self._regain(lane, tokens)
        for row, work in enumerate(sent.works):
            request = self._requests.get(work.request)
            if request is None:
                continue
            request.first_start = min(request.first_start, now - result.seconds)
            request.deaths = 0 if sent.alone else request.deaths
            if not result.ok[row] and not sent.exact:
                self._metrics.fp32_retries.inc()
                self._again.append(Sent([work], exact=True))
            else:
                self._fill(request, work.sequence, result.vectors[row], bool(result.ok[row]), now)
        self.pump()

    def failed(self, lane: Lane, sent: Sent, message: str, out_of_memory: bool) -> None:
        """A batch raised. Halves are tried again until the sequence that cannot be computed stands alone."""
        self._metrics.batch_failures.inc()
        if sent.doubt:
            log.error("the engine fails at anything: %s; replacing it", message)
            suspect = sent.doubt[0]
            if lane.ran == 2:  # it was the first that this engine ran
                self._fail(suspect.works[0].request, EngineUnavailableError(f"engines break over this: {message}"))
            else:
                self._again.appendleft(suspect)
            lane.replace()
            return
        if out_of_memory:
            self.out_of_memory += 1
            self._metrics.out_of_memory.inc()
            largest = max(sent.tokens, lane.largest)
            lane.batch_tokens = max(memory.SMALLEST_BATCH, min(lane.batch_tokens, largest // 2))
            self.lanes_changed()
        works = [work for work in sent.works if work.request in self._requests]
        if not sent.alone and len(works) == 1:
            # What ran beside it may have taken the memory, or spoilt the engine.
            self._again.append(Sent(works, exact=sent.exact))
        elif works and len(sent.works) == 1:
            insufficient = EngineUnavailableError(f"the engine's memory does not suffice for this: {message}")
            error = insufficient if out_of_memory else EngineFailedError(message)
            self._send(lane, Sent([], alone=True, doubt=(Sent(works, exact=sent.exact), error)))
        elif works:
            middle = len(works) // 2
            self._again.extend(Sent(half, exact=sent.exact) for half in (works[:middle], works[middle:]) if half)
        self.pump()

    def pump(self) -> None:
        """Send what can be sent, to the engine with the least to do first, and nothing ahead of time while any is free."""
        self._look_again()
        for ahead in (False, True):
            for lane in sorted((lane for lane in self.lanes if lane.up), key=lambda lane: lane.tokens):
                while (sent := self._next(lane, ahead)) is not None:
                    self._send(lane, sent)

    def _pump_soon(self) -> None:
        """`pump`, once what else arrived by now is queued as well."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pumping = False
        self.pump()

    def _send(self, lane: Lane, sent: Sent) -> None:
        parts = [self._requests[work.request].sequences[work.sequence] for work in sent.works] or [_HARMLESS]
        lengths = np.array([len(part) for part in parts], dtype=np.int32)
        lane.send(Batch(next(self._ids), np.concatenate(parts), lengths, sent.exact), sent)

    def _next(self, lane: Lane, ahead: bool) -> Sent | None:
        """What to send to this engine now: a retry once it is idle, else the next batch; `ahead`: also one that will wait for it."""
        while self._again and not lane.busy:
            again = self._again.popleft()
            if works := [work for work in again.works if work.request in self._requests]:
                return Sent(works, alone=True, exact=again.exact)
        if self._again or not lane.takes(ahead=ahead and self._batcher.has_full_batch()):
            return None
        idle = sum(other.free for other in self.lanes)
        works = self._batcher.next_batch(self._clock(), share=max(1, idle))
        return Sent(works) if works else None

    def _suspects(self, sent: Sent, alone: bool) -> list[Sent]:
        """The batch that an engine died of, by request; `alone`: of nothing else. Who was alone there is tried once more, then given up."""
        works = sorted(sent.works, key=lambda work: work.request)
        groups = [list(group) for _, group in groupby(works, key=lambda work: work.request)]
        if alone and len(groups) == 1:
            self._died_of(works[0].request, "the engine died twice while it ran this alone")
        return [Sent(group, exact=sent.exact) for group in groups]

    def _died_of(self, number: int, said: str) -> None:
        """Count a death against a request, and give it up at the last one; what it has in `_again` is skipped then."""
        request = self._requests.get(number)
        if request is not None:
            request.deaths += 1
            if request.deaths >= _ATTEMPTS:
                self._fail(number, EngineUnavailableError(said))

    def _fill(self, request: _Request, index: int, vector: Vectors, ok: bool, now: float) -> None:
        if len(request.sequences) == 1:
            request.vectors = vector[None]
        else:
            if request.vectors is None:
                request.vectors = np.empty((len(request.sequences), len(vector)), dtype=np.float32)
            request.vectors[index] = vector
        if not ok:
            request.bad.append(index)
        request.left -= 1
        if not request.left and not request.future.done():
            self._batcher.answered(request.predicted, now - request.arrived)
            queued = max(0.0, request.first_start - request.arrived)
            request.future.set_result(Answer(request.vectors, request.bad, queued, now - request.first_start))

    def _fail(self, number: int, error: Exception) -> None:
        request = self._requests.pop(number, None)
        self._batcher.cancel(number)
        if request is not None and not request.future.done():
            request.future.set_exception(error)

    def _running(self) -> float:
        """Seconds until some engine has done what it has."""
        if self._running_now is None:
            pace = self._batcher.pace
            left = (lane.left(lambda sent: pace.seconds(sent.tokens)) for lane in self.lanes if lane.up)
            self._running_now = min(left, default=0.0)
            asyncio.get_running_loop().call_soon(self._look_again)
        return self._running_now

    def _look_again(self) -> None:
        self._running_now = None
        self._passed.clear()

    def _regain(self, lane: Lane, tokens: int) -> None:
        """A batch fitted into memory: where the limit is lower than it was and this came near it, the next may be larger."""
        full = lane.info.batch_tokens if lane.info else 0
        if lane.batch_tokens < full and 2 * tokens > lane.batch_tokens:
            lane.batch_tokens = min(full, lane.batch_tokens + max(1, full // _REGAINED_AFTER))
            self.lanes_changed()

    def _limit_batches(self, tokens: int) -> None:
        self._batcher.limits = self._batcher.limits.with_batch_tokens(tokens)
        self._metrics.batch_limit.set(tokens)
