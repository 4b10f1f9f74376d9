"""The server's own batcher on a virtual clock: requests come, batches take what the latency model says, nothing runs.

Requests pass the front end (HTTP, JSON, tokenization) one after the other, each for `front` seconds, as in one API
process. Batches go to the engine as the dispatcher sends them: those that run, and one ahead of time only if it is
full already.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from inferctl.estimate.cost import Cost
from inferctl.serve.batcher import Batcher, Limits, RefusedError, Work

# An estimate of what a server can do must not be what its queue limit lets it do.
UNBOUNDED = 1 << 60


@dataclass
class Answers:
    """What came out.

    `latencies` (seconds) in order of arrival, without refused ones; `seconds` from the first arrival to the last
    answer.
    """

    latencies: list[float]
    seconds: float
    batches: int
    busy: float
    refused: int

    def percentile(self, q: float) -> float:
        """The order statistic at `q` (0 to 1), seconds."""
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    @property
    def per_second(self) -> float:
        """Answered requests a second."""
        return len(self.latencies) / self.seconds


class Simulation:
    """One server whose engine runs `slots` batches at a time and whose front end takes `front` seconds per request.

    `requests[i]` are the lengths (tokens) of the sequences of request i.
    """

    def __init__(
        self, cost: Cost, limits: Limits, requests: Sequence[Sequence[int]], slots: int = 1, front: float = 0.0
    ) -> None:
        self.batcher = Batcher(limits, engines=slots)
        self._front, self._front_free = front, 0.0
        self._read: deque[tuple[float, int]] = deque()  # requests in the front end: when each leaves it, its number
        self._cost, self._requests, self._slots = cost, requests, slots
        self._running: list[tuple[float, int, _Batch]] = []  # a heap: when it ends, a number, the batch
        self._ahead: deque[_Batch] = deque()
        self._left = [len(one) for one in requests]
        self._arrived = [0.0] * len(requests)
        self._predicted = [0.0] * len(requests)
        self._latency = [math.nan] * len(requests)
        self._batches, self._busy, self._refused, self._last = 0, 0.0, 0, 0.0

    def open(self, arrivals: Sequence[float]) -> Answers:
        """Requests come at `arrivals` (seconds, ascending) whatever the server does."""
        return self._run(deque((now, request) for request, now in enumerate(arrivals)), lambda: None)

    def closed(self, users: int) -> Answers:
        """`users` send one request each, and the next as soon as they have the answer."""
        waiting = iter(range(len(self._requests)))
        first = [next(waiting) for _ in range(min(users, len(self._requests)))]
        return self._run(deque((0.0, request) for request in first), lambda: next(waiting, None))

    def _run(self, coming: deque[tuple[float, int]], following: Callable[[], int | None]) -> Answers:
        """`coming`: time and number of requests, ascending. `following`: what whoever was answered sends at once."""
        first = coming[0][0] if coming else 0.0
        while coming or self._read or self._running:
            now = min(queue[0][0] for queue in (self._running, coming, self._read) if queue)
            # All that comes or ends at one time is known before the next batch is formed, as in the dispatcher.
            while self._running and self._running[0][0] <= now:
                for _ in range(self._finish(now)):
                    if (request := following()) is not None:
                        coming.append((now, request))
            while coming and coming[0][0] <= now:
                self._arrive(coming.popleft()[1], now)
            while self._read and self._read[0][0] <= now:
                self._submit(self._read.popleft()[1], now)
            self._pump(now)
        good = [seconds for seconds in self._latency if not math.isnan(seconds)]
        return Answers(good, self._last - first, self._batches, self._busy, self._refused)

    def _arrive(self, request: int, now: float) -> None:
        self._arrived[request] = now
        self._front_free = max(now, self._front_free) + self._front
        self._read.append((self._front_free, request))

    def _submit(self, request: int, now: float) -> None:
        try:
            self._predicted[request] = self.batcher.submit(
                request, self._requests[request], now, running=self._until_free(now)
            )
        except RefusedError:
            self._refused += 1

    def _until_free(self, now: float) -> float:
        """Seconds until the engine can begin another batch, where admission asks for it."""
        if self.batcher.limits.slo is None or len(self._running) < self._slots:
            return 0.0
        left = sum(ends - now for ends, _, _ in self._running) + sum(batch.seconds for batch in self._ahead)
        return left / self._slots

    def _pump(self, now: float) -> None:
        while len(self._running) + len(self._ahead) < self._slots + self.batcher.has_full_batch():
            works = self.batcher.next_batch(now, share=max(1, self._slots - len(self._running)))
            if not works:
                break
            batch = _Batch(works, sum(work.tokens for work in works), self._cost.batch([work.tokens for work in works]))
            if len(self._running) < self._slots:
                self._begin(batch, now)
            else:
                self._ahead.append(batch)

    def _begin(self, batch: _Batch, now: float) -> None:
        self._batches += 1
        heappush(self._running, (now + batch.seconds, self._batches, batch))

    def _finish(self, now: float) -> int:
        """The batch that ends first is done; returns how many requests that completed."""
        batch = heappop(self._running)[2]
        if self._ahead:
            self._begin(self._ahead.popleft(), now)
        self._busy, self._last = self._busy + batch.seconds, now
        self.batcher.pace.observe(batch.tokens, batch.seconds)
        done = 0
        for work in batch.works:
            self._left[work.request] -= 1
            if not self._left[work.request]:
                done += 1
                self._latency[work.request] = now - self._arrived[work.request]
                self.batcher.answered(self._predicted[work.request], self._latency[work.request])
        return done


@dataclass(frozen=True)
class _Batch:
    works: list[Work]
    tokens: int
    seconds: float
