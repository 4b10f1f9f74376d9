"""Reads the measured throughput of API processes without a model: HTTP, JSON, tokenization, queue and base64.

`benchmarks/calibration/front-end.json` holds the measurement and its machine; `benchmarks/calibration/front_end.py`
writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from inferctl.core import assets

FILE = "benchmarks/calibration/front-end.json"


@dataclass(frozen=True)
class FrontEnd:
    """Measured seconds of the API process per request, by number of texts, and the machine of the measurement.

    `hop`: how many times as long an API process takes beside a backend. `backend_s`: seconds of that per request.
    """

    points: tuple[tuple[int, float], ...]
    machine: str
    hop: float
    backend_s: float

    def seconds(self, texts: int, processes: int = 1) -> float:
        """Return the seconds between two requests with `texts` texts each, at most.

        With several processes, these share the work; the backend works on one request at a time.
        """
        alone = self._alone(texts)
        return alone if processes == 1 else max(alone * self.hop / processes, self.backend_s)

    def _alone(self, texts: int) -> float:
        """Return the seconds of one process: interpolated linearly, and proportional beyond the largest size."""
        if texts >= self.points[-1][0]:
            return self.points[-1][1] * texts / self.points[-1][0]
        for (few, low), (many, high) in pairwise(self.points):
            if texts <= many:
                return low + (high - low) * (texts - few) / (many - few)
        raise AssertionError("the measured sizes must start at one text")

    def texts_per_s(self, texts: int, processes: int = 1) -> float:
        """Return the texts per second that API processes can serve in requests of `texts` texts."""
        return texts / self.seconds(texts, processes)

    def as_dict(self, texts: int, processes: int) -> dict[str, Any]:
        """Return the limit for requests of `texts` texts, with its source."""
        return {
            "texts_per_s": self.texts_per_s(texts, processes),
            "texts_per_request": texts,
            "api_processes": processes,
            "machine": self.machine,
            "source": FILE,
        }


@cache
def load() -> FrontEnd:
    """Return the shipped measurement."""
    data = json.loads((assets.root() / FILE).read_text(encoding="utf-8"))
    points = tuple((row["texts_per_request"], row["ms_per_request"] / 1000) for row in data["requests"])
    several = data["several_processes"]
    machine = f"{data['machine']['cpu']}, {data['machine']['cores']} cores"
    return FrontEnd(points, machine, several["hop"], several["backend_us"] / 1e6)
