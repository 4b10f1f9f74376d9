"""Load on the simulated server: one run at a rate, and the highest rate that holds a latency."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from inferctl.estimate.cost import Cost
from inferctl.estimate.simulate import Answers, Simulation
from inferctl.serve.batcher import Limits

# Of this many requests the p99 is known to about 3 %; the first tenth meets an empty server and is not counted.
REQUESTS = 20_000
# A search near saturation looks at runs of a hundred times the SLO, where that is not more than three times as many
# requests.
_SLOS, _LONGER = 100, 3
_STEPS = 8


@dataclass(frozen=True)
class Server:
    """A server to simulate: what a batch costs, the batcher's limits, the requests that come (lengths of each one's
    sequences), how many batches its engine runs at a time (`slots`), and the seconds of its front end per request
    (`front`).
    """

    cost: Cost
    limits: Limits
    requests: Sequence[Sequence[int]]
    slots: int = 1
    seed: int = 0
    front: float = 0.0

    def offline(self) -> Answers:
        """Everything waits from the start."""
        return self._new().open([0.0] * len(self.requests))

    def single(self) -> Answers:
        """One request after the other."""
        return self._new().closed(1)

    def closed(self, users: int) -> Answers:
        """`users` at once, without a pause between answer and next request."""
        return self._new().closed(users)

    def open(self, rate: float, arrivals: str = "poisson", times: int = 1) -> Answers:
        """`rate` requests a second, all of them `times` over, drawn from the seed.

        Equal seeds give equal arrivals at every rate, stretched.
        """
        draw, now, arrived = random.Random(self.seed), 0.0, []
        for _ in range(times * len(self.requests)):
            now += draw.expovariate(1.0) if arrivals == "poisson" else 1.0
            arrived.append(now / rate)
        answers = self._new(times).open(arrived)
        answers.latencies = answers.latencies[len(answers.latencies) // 10 :]
        return answers

    def holds(self, rate: float, slo: float, q: float = 0.99) -> bool:
        """Whether the percentile `q` stays within `slo` seconds at a rate."""
        times = min(_LONGER, max(1, math.ceil(_SLOS * slo * rate / len(self.requests))))
        return self.open(rate, times=times).percentile(q) <= slo

    def highest_rate(self, slo: float, q: float = 0.99, most: float | None = None) -> float:
        """Requests a second that keep the percentile `q` within `slo` seconds; 0 when not even a single request does.

        `most`: what it does at saturation, when known.
        """
        most = most or self.offline().per_second
        if self.single().percentile(q) > slo:
            return 0.0
        low, high = (most / 2, most) if self.holds(most / 2, slo, q) else (0.0, most / 2)
        for _ in range(_STEPS):
            rate = (low + high) / 2
            low, high = (rate, high) if self.holds(rate, slo, q) else (low, rate)
        return low

    def _new(self, times: int = 1) -> Simulation:
        return Simulation(self.cost, self.limits, list(self.requests) * times, self.slots, self.front)
