"""Simulates a server: the real batcher runs on a virtual clock, and the latency model gives the duration of batches.

Requests pass the front end (HTTP, JSON, tokenization) one after the other, each for `front` seconds, as in one API
process. Batches go to the engine as in the dispatcher: one at a time, and one more only if it is already full.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from inferctl.batching.batcher import Batcher, QueuedSequence, QueueLimits
from inferctl.estimate.cost import Cost

# The queue limit of a server must not limit its estimated throughput.
UNBOUNDED = 1 << 60


@dataclass
class SimulationResult:
    """The result of a simulation.

    `latencies` (seconds) are in order of arrival. `seconds`: from the first arrival to the last response.
    """

    latencies: list[float]
    seconds: float

    @property
    def per_second(self) -> float:
        """Completed requests per second."""
        return len(self.latencies) / self.seconds


def percentile(values: Sequence[float], q: float) -> float:
    """Return the value at the quantile `q` (0 to 1), as an order statistic."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


class Simulation:
    """A simulated server whose engine runs one batch at a time. Its front end takes `front` seconds per request.

    `requests[i]` are the lengths (tokens) of the sequences of request i. No request is rejected.
    """

    def __init__(self, cost: Cost, limits: QueueLimits, requests: Sequence[Sequence[int]], front: float = 0.0) -> None:
        self.batcher = Batcher(limits)
        self._front, self._front_free = front, 0.0
        self._in_front: deque[tuple[float, int]] = deque()  # requests in the front end: end time, request
        self._cost, self._requests = cost, requests
        self._running: tuple[float, _Batch] | None = None  # end time, batch
        self._prefetched: _Batch | None = None
        self._remaining = [len(sequences) for sequences in requests]
        self._arrived = [0.0] * len(requests)
        self._latency = [math.nan] * len(requests)
        self._last = 0.0

    def open(self, arrivals: Sequence[float]) -> SimulationResult:
        """Run an open loop: requests arrive at `arrivals` (seconds, ascending) regardless of the responses."""
        waiting = deque((now, request) for request, now in enumerate(arrivals))
        while waiting or self._in_front or self._running:
            times = [queue[0][0] for queue in (waiting, self._in_front) if queue]
            now = min([*times, self._running[0]] if self._running else times)
            # As in the dispatcher, all events at one time are processed before the next batch is formed.
            while self._running and self._running[0] <= now:
                self._finish(self._running[1], now)
            while waiting and waiting[0][0] <= now:
                self._arrive(waiting.popleft()[1], now)
            while self._in_front and self._in_front[0][0] <= now:
                request = self._in_front.popleft()[1]
                self.batcher.submit(request, self._requests[request], now)
            self._start_batches(now)
        return SimulationResult(self._latency, self._last - (arrivals[0] if arrivals else 0.0))

    def _arrive(self, request: int, now: float) -> None:
        self._arrived[request] = now
        self._front_free = max(now, self._front_free) + self._front
        self._in_front.append((self._front_free, request))

    def _start_batches(self, now: float) -> None:
        while self._running is None or (self._prefetched is None and self.batcher.has_full_batch()):
            if not (sequences := self.batcher.next_batch(now)):
                break
            lengths = [sequence.tokens for sequence in sequences]
            batch = _Batch(sequences, sum(lengths), self._cost.batch(lengths))
            if self._running is None:
                self._running = (now + batch.seconds, batch)
            else:
                self._prefetched = batch

    def _finish(self, batch: _Batch, now: float) -> None:
        following, self._prefetched = self._prefetched, None
        self._running = (now + following.seconds, following) if following else None
        self._last = now
        self.batcher.latency.observe(batch.tokens, batch.seconds)
        for sequence in batch.sequences:
            self._remaining[sequence.request] -= 1
            if not self._remaining[sequence.request]:
                self._latency[sequence.request] = now - self._arrived[sequence.request]


@dataclass(frozen=True)
class _Batch:
    sequences: list[QueuedSequence]
    tokens: int
    seconds: float
