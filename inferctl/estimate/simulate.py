"""The server's own batcher on a virtual clock: requests come, batches take what the latency model says, nothing runs.

Batches go to engines as the dispatcher sends them: one that runs, and a second ahead of time only when it is full already. What HTTP and
tokenising cost is not in here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from inferctl.estimate.cost import Cost
from inferctl.serve.batcher import Batcher, Limits, RefusedError, Work

_AHEAD = 2
# An estimate of what a server can do must not be what its queue limit lets it do.
UNBOUNDED = 1 << 60


@dataclass
class Answers:
    """What came out: `latencies` (seconds) in order of arrival, without refused ones; `seconds` from the first arrival to the last answer."""

    latencies: list[float]
    seconds: float
    sequences: int
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


@dataclass
class _Engine:
    """`sent`: batches with it, the running one first; `ends`: when that one is done."""

    sent: deque[tuple[list[Work], int, float]] = field(default_factory=deque)
    ends: float = math.inf

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.sent)


class Simulation:
    """One server with `engines` equal engines. `requests[i]` are the lengths (tokens) of the sequences of request i."""

    def __init__(self, cost: Cost, limits: Limits, requests: Sequence[Sequence[int]], engines: int = 1) -> None:
        self.batcher = Batcher(limits, engines=engines)
        self._cost, self._requests = cost, requests
        self._engines = [_Engine() for _ in range(engines)]
        self._left = [len(one) for one in requests]
        self._arrived = [0.0] * len(requests)
        self._predicted = [0.0] * len(requests)
        self._latency = [math.nan] * len(requests)
        self._batches, self._busy, self._refused, self._last = 0, 0.0, 0, 0.0

    def open(self, arrivals: Sequence[float]) -> Answers:
        """Requests come at `arrivals` (seconds, ascending) whatever the server does."""
        return self._run(list(enumerate(arrivals)), lambda now: None)

    def closed(self, users: int) -> Answers:
        """`users` send one request each, and the next as soon as they have the answer."""
        waiting = iter(range(min(users, len(self._requests)), len(self._requests)))
        return self._run(
            [(request, 0.0) for request in range(min(users, len(self._requests)))], lambda now: next(waiting, None)
        )

    def _run(self, coming: list[tuple[int, float]], answered: Callable[[float], int | None]) -> Answers:
        first = coming[0][1] if coming else 0.0
        arrivals, position = coming, 0
        again: list[tuple[float, int]] = []
        while True:
            due = arrivals[position][1] if position < len(arrivals) else math.inf
            if again and again[0][0] < due:
                due = again[0][0]
            engine = min(self._engines, key=lambda one: one.ends)
            if due == engine.ends == math.inf:
                break
            if due <= engine.ends:
                if again and again[0][0] == due:
                    request = heappop(again)[1]
                else:
                    request, position = arrivals[position][0], position + 1
                self._arrive(request, due)
                self._pump(due)
                continue
            now = engine.ends
            for _ in range(self._finish(engine, now)):
                if (following := answered(now)) is not None:
                    heappush(again, (now, following))
            # A user's next request is there before the next batch is formed.
            while again and again[0][0] <= now:
                self._arrive(heappop(again)[1], now)
            self._pump(now)
        good = [seconds for seconds in self._latency if not math.isnan(seconds)]
        sequences = sum(
            len(one) for one, seconds in zip(self._requests, self._latency, strict=True) if not math.isnan(seconds)
        )
        return Answers(good, self._last - first, sequences, self._batches, self._busy, self._refused)

    def _arrive(self, request: int, now: float) -> None:
        self._arrived[request] = now
        running = 0.0
        if self.batcher.limits.slo is not None:
            running = min(self._until_free(engine, now) for engine in self._engines)
        try:
            self._predicted[request] = self.batcher.submit(request, self._requests[request], now, running=running)
        except RefusedError:
            self._refused += 1

    def _until_free(self, engine: _Engine, now: float) -> float:
        if not engine.sent:
            return 0.0
        return engine.ends - now + sum(seconds for _, _, seconds in list(engine.sent)[1:])

    def _pump(self, now: float) -> None:
        engines = self._engines if len(self._engines) == 1 else sorted(self._engines, key=lambda engine: engine.tokens)
        for engine in engines:
            while not engine.sent or (len(engine.sent) < _AHEAD and self.batcher.has_full_batch()):
                works = self.batcher.next_batch(now)
                if not works:
                    break
                seconds = self._cost.batch([work.tokens for work in works])
                engine.sent.append((works, sum(work.tokens for work in works), seconds))
                if len(engine.sent) == 1:
                    engine.ends = now + seconds

    def _finish(self, engine: _Engine, now: float) -> int:
        """The running batch of an engine is done; returns how many requests that completed."""
        works, tokens, seconds = engine.sent.popleft()
        engine.ends = now + engine.sent[0][2] if engine.sent else math.inf
        self._batches, self._busy, self._last = self._batches + 1, self._busy + seconds, now
        self.batcher.pace.observe(tokens, seconds)
        done = 0
        for work in works:
            self._left[work.request] -= 1
            if not self._left[work.request]:
                done += 1
                self._latency[work.request] = now - self._arrived[work.request]
                self.batcher.answered(self._predicted[work.request], self._latency[work.request])
        return done
