"""Simulates a server: the real batcher runs on a virtual clock, and the latency model gives the duration of batches.

Requests pass the front end (HTTP, JSON, tokenization) one after the other, each for `front` seconds, as in one API
process. Batches go to the engine as in the dispatcher: as many as the engine runs at a time, and one more only if it is
already full.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from inferctl.batching.batcher import AdmissionError, Batcher, QueuedSequence, QueueLimits
from inferctl.estimate.cost import Cost

# The queue limit of a server must not limit its estimated throughput.
UNBOUNDED = 1 << 60


@dataclass
class SimulationResult:
    """The result of a simulation.

    `latencies` (seconds) are in order of arrival, without rejected requests. `seconds`: from the first arrival to the
    last response. `busy`: seconds of all batches.
    """

    latencies: list[float]
    seconds: float
    batches: int
    busy: float
    rejected: int

    def percentile(self, q: float) -> float:
        """Return the latency in seconds at the quantile `q` (0 to 1), as an order statistic."""
        return percentile(self.latencies, q)

    @property
    def per_second(self) -> float:
        """Completed requests per second."""
        return len(self.latencies) / self.seconds


def percentile(values: Sequence[float], q: float) -> float:
    """Return the value at the quantile `q` (0 to 1), as an order statistic."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


class Simulation:
    """A simulated server whose engine runs `slots` batches at a time. Its front end takes `front` seconds per request.

    `requests[i]` are the lengths (tokens) of the sequences of request i.
    """

    def __init__(
        self, cost: Cost, limits: QueueLimits, requests: Sequence[Sequence[int]], slots: int = 1, front: float = 0.0
    ) -> None:
        self.batcher = Batcher(limits, slots=slots)
        self._front, self._front_free = front, 0.0
        self._in_front: deque[tuple[float, int]] = deque()  # requests in the front end: end time, request
        self._cost, self._requests, self._slots = cost, requests, slots
        self._running: list[tuple[float, int, _Batch]] = []  # heap: end time, number, batch
        self._prefetched: deque[_Batch] = deque()
        self._remaining = [len(sequences) for sequences in requests]
        self._arrived = [0.0] * len(requests)
        self._predicted = [0.0] * len(requests)
        self._latency = [math.nan] * len(requests)
        self._batches, self._busy, self._rejected, self._last = 0, 0.0, 0, 0.0

    def open(self, arrivals: Sequence[float]) -> SimulationResult:
        """Run an open loop: requests arrive at `arrivals` (seconds, ascending) regardless of the responses."""
        return self._run(deque((now, request) for request, now in enumerate(arrivals)), lambda: None)

    def closed(self, users: int) -> SimulationResult:
        """Run a closed loop: each of `users` sends a request as soon as the previous one is complete."""
        waiting = iter(range(len(self._requests)))
        first = [next(waiting) for _ in range(min(users, len(self._requests)))]
        return self._run(deque((0.0, request) for request in first), lambda: next(waiting, None))

    def _run(self, arrivals: deque[tuple[float, int]], next_request: Callable[[], int | None]) -> SimulationResult:
        """Simulate the requests. `arrivals`: (time, request), ascending. `next_request`: called after a completion."""
        first = arrivals[0][0] if arrivals else 0.0
        while arrivals or self._in_front or self._running:
            now = min(queue[0][0] for queue in (self._running, arrivals, self._in_front) if queue)
            # As in the dispatcher, all events at one time are processed before the next batch is formed.
            while self._running and self._running[0][0] <= now:
                for _ in range(self._finish(now)):
                    if (request := next_request()) is not None:
                        arrivals.append((now, request))
            while arrivals and arrivals[0][0] <= now:
                self._arrive(arrivals.popleft()[1], now)
            while self._in_front and self._in_front[0][0] <= now:
                self._submit(self._in_front.popleft()[1], now)
            self._start_batches(now)
        latencies = [seconds for seconds in self._latency if not math.isnan(seconds)]
        return SimulationResult(latencies, self._last - first, self._batches, self._busy, self._rejected)

    def _arrive(self, request: int, now: float) -> None:
        self._arrived[request] = now
        self._front_free = max(now, self._front_free) + self._front
        self._in_front.append((self._front_free, request))

    def _submit(self, request: int, now: float) -> None:
        try:
            self._predicted[request] = self.batcher.submit(
                request, self._requests[request], now, busy_s=self._until_free(now)
            )
        except AdmissionError:
            self._rejected += 1

    def _until_free(self, now: float) -> float:
        """Return the seconds until the engine can start another batch; 0 if admission does not use it."""
        limits = self.batcher.limits
        if limits.slo_s is limits.max_wait_s is None or len(self._running) < self._slots:
            return 0.0
        remaining = sum(end - now for end, _, _ in self._running) + sum(batch.seconds for batch in self._prefetched)
        return remaining / self._slots

    def _start_batches(self, now: float) -> None:
        while len(self._running) + len(self._prefetched) < self._slots + self.batcher.has_full_batch():
            sequences = self.batcher.next_batch(now, free_slots=max(1, self._slots - len(self._running)))
            if not sequences:
                break
            batch = _Batch(
                sequences,
                sum(sequence.tokens for sequence in sequences),
                self._cost.batch([sequence.tokens for sequence in sequences]),
            )
            if len(self._running) < self._slots:
                self._start(batch, now)
            else:
                self._prefetched.append(batch)

    def _start(self, batch: _Batch, now: float) -> None:
        self._batches += 1
        heappush(self._running, (now + batch.seconds, self._batches, batch))

    def _finish(self, now: float) -> int:
        """Complete the batch that ends first. Return the number of requests that it completes."""
        batch = heappop(self._running)[2]
        if self._prefetched:
            self._start(self._prefetched.popleft(), now)
        self._busy, self._last = self._busy + batch.seconds, now
        self.batcher.latency.observe(batch.tokens, batch.seconds)
        completed = 0
        for sequence in batch.sequences:
            self._remaining[sequence.request] -= 1
            if not self._remaining[sequence.request]:
                completed += 1
                self._latency[sequence.request] = now - self._arrived[sequence.request]
                self.batcher.observe(self._predicted[sequence.request], self._latency[sequence.request])
        return completed


@dataclass(frozen=True)
class _Batch:
    sequences: list[QueuedSequence]
    tokens: int
    seconds: float
