"""Simulates load on a server: runs at a rate, and a search for the highest rate that meets a latency limit."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from inferctl.batching.batcher import QueueLimits
from inferctl.estimate.cost import Cost
from inferctl.estimate.simulate import Simulation, SimulationResult, percentile

# With this many requests, the error of the p99 is about 3%. The first tenth is a warm-up and is not counted.
REQUESTS = 20_000
# Near saturation, a run lasts 100 times the SLO, but has at most 3 times as many requests.
_RUN_SLOS, _MAX_REPEATS = 100, 3
_STEPS = 8
# A server that meets the SLO at this share of its saturation rate is not limited by the SLO.
_NEARLY = 0.99
_PERCENTILE = 0.99
# Between requests that are simulated alone: longer than any of them takes.
_APART_S = 10_000.0


@dataclass(frozen=True)
class SimulatedServer:
    """A server to simulate.

    `cost`: duration of a batch. `limits`: limits of the batcher. `requests`: lengths of the sequences of each request.
    `front`: seconds of the front end per request.
    """

    cost: Cost
    limits: QueueLimits
    requests: Sequence[Sequence[int]]
    front: float = 0.0

    def offline(self) -> SimulationResult:
        """Run with all requests queued from the start."""
        return self._new().open([0.0] * len(self.requests))

    def single(self) -> list[float]:
        """Return the latencies in seconds of one request after the other, in no order."""
        # Alone, requests with equal lengths take equally long, so each length is simulated once.
        distinct = Counter(map(tuple, self.requests))
        simulation = Simulation(self.cost, self.limits, list(distinct), self.front)
        latencies = simulation.open([_APART_S * number for number in range(len(distinct))]).latencies
        return [seconds for seconds, count in zip(latencies, distinct.values(), strict=True) for _ in range(count)]

    def open(self, rate: float, times: int = 1) -> SimulationResult:
        """Run an open loop at `rate` requests per second, with all requests `times` times.

        The arrivals are the same at each rate, scaled in time.
        """
        draw, now, arrived = random.Random(0), 0.0, []
        for _ in range(times * len(self.requests)):
            now += draw.expovariate(1.0)
            arrived.append(now / rate)
        result = self._new(times).open(arrived)
        result.latencies = result.latencies[len(result.latencies) // 10 :]
        return result

    def meets_slo(self, rate: float, slo: float) -> bool:
        """Return whether the p99 is at most `slo` seconds at a rate."""
        times = min(_MAX_REPEATS, max(1, math.ceil(_RUN_SLOS * slo * rate / len(self.requests))))
        return percentile(self.open(rate, times=times).latencies, _PERCENTILE) <= slo

    def highest_rate(self, slo: float, most: float | None = None) -> float:
        """Return the highest requests per second with a p99 of at most `slo` seconds.

        It is 0 if a single request without load already exceeds `slo`, and `most` (the saturation rate) if the SLO is
        met up to there.
        """
        most = most or self.offline().per_second
        if percentile(self.single(), _PERCENTILE) > slo:
            return 0.0
        if self.meets_slo(_NEARLY * most, slo):
            return most
        low, high = (most / 2, most) if self.meets_slo(most / 2, slo) else (0.0, most / 2)
        for _ in range(_STEPS):
            rate = (low + high) / 2
            low, high = (rate, high) if self.meets_slo(rate, slo) else (low, rate)
        return low

    def _new(self, times: int = 1) -> Simulation:
        return Simulation(self.cost, self.limits, list(self.requests) * times, self.front)
