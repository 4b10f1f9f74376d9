"""Load on the simulated server: one run at a rate, and the highest rate that holds a latency."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from inferctl.estimate.cost import Cost
from inferctl.estimate.simulate import Answers, Simulation
from inferctl.serve.batcher import Limits

# Of this many requests the p99 is known to about 3 %; the first tenth meets an empty server and is not counted.
REQUESTS = 20_000
_STEPS = 12


@dataclass(frozen=True)
class Server:
    """A server to simulate: what a batch costs, the batcher's limits, and the requests that come (lengths of each one's sequences)."""

    cost: Cost
    limits: Limits
    requests: Sequence[Sequence[int]]
    engines: int = 1
    seed: int = 0

    def offline(self) -> Answers:
        """Everything waits from the start."""
        return self._new().open([0.0] * len(self.requests))

    def single(self) -> Answers:
        """One request after the other."""
        return self._new().closed(1)

    def closed(self, users: int) -> Answers:
        """`users` at once, without a pause between answer and next request."""
        return self._new().closed(users)

    def open(self, rate: float, arrivals: str = "poisson") -> Answers:
        """`rate` requests a second, drawn from the seed: equal seeds give equal arrivals at every rate, stretched."""
        draw, now, times = random.Random(self.seed), 0.0, []
        for _ in self.requests:
            now += draw.expovariate(1.0) if arrivals == "poisson" else 1.0
            times.append(now / rate)
        answers = self._new().open(times)
        answers.latencies = answers.latencies[len(answers.latencies) // 10 :]
        return answers

    def highest_rate(self, slo: float, q: float = 0.99, most: float | None = None) -> float:
        """Requests a second that keep the percentile `q` within `slo` seconds; 0 when not even a lone request does.

        `most`: what it does at saturation, when known.
        """
        most = most or self.offline().per_second
        if self.single().percentile(q) > slo:
            return 0.0
        low, high = 0.0, most
        for _ in range(_STEPS):
            rate = (low + high) / 2
            low, high = (rate, high) if self.open(rate).percentile(q) <= slo else (low, rate)
        return low

    def _new(self) -> Simulation:
        return Simulation(self.cost, self.limits, self.requests, self.engines)
