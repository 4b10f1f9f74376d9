"""Reads the measured throughput of one API process without a model: HTTP, JSON, tokenization, queue and base64.

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
    """Measured seconds of the API process per request, by number of texts, and the machine of the measurement."""

    points: tuple[tuple[int, float], ...]
    machine: str

    def seconds(self, texts: int) -> float:
        """Return the seconds of a request with `texts` texts.

        It is interpolated linearly between two measured sizes, and proportional beyond the largest one.
        """
        if texts >= self.points[-1][0]:
            return self.points[-1][1] * texts / self.points[-1][0]
        for (few, low), (many, high) in pairwise(self.points):
            if texts <= many:
                return low + (high - low) * (texts - few) / (many - few)
        raise AssertionError("the measured sizes must start at one text")

    def texts_per_s(self, texts: int) -> float:
        """Return the texts per second that one API process can serve in requests of `texts` texts."""
        return texts / self.seconds(texts)

    def as_dict(self, texts: int) -> dict[str, Any]:
        """Return the limit for requests of `texts` texts, with its source."""
        return {
            "texts_per_s": self.texts_per_s(texts),
            "texts_per_request": texts,
            "api_processes": 1,
            "machine": self.machine,
            "source": FILE,
        }


@cache
def load() -> FrontEnd:
    """Return the shipped measurement."""
    data = json.loads((assets.root() / FILE).read_text(encoding="utf-8"))
    points = tuple((row["texts_per_request"], row["ms_per_request"] / 1000) for row in data["requests"])
    return FrontEnd(points, f"{data['machine']['cpu']}, {data['machine']['cores']} cores")
