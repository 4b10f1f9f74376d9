"""What one API process can serve without a model, as measured: HTTP, JSON, tokenization, queue and base64.

`benchmarks/calibration/front-end.json` holds the measurement and its machine; `benchmarks/calibration/front_end.py`
writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from inferctl import assets

FILE = "benchmarks/calibration/front-end.json"


@dataclass(frozen=True)
class FrontEnd:
    """Seconds of the API process per request, by its number of texts, and the machine that was measured."""

    points: tuple[tuple[int, float], ...]
    machine: str

    def seconds(self, texts: int) -> float:
        """Seconds of a request of `texts`.

        Between two measured sizes on a straight line, beyond the last one in proportion.
        """
        if texts >= self.points[-1][0]:
            return self.points[-1][1] * texts / self.points[-1][0]
        for (few, low), (many, high) in pairwise(self.points):
            if texts <= many:
                return low + (high - low) * (texts - few) / (many - few)
        raise AssertionError("the measured sizes begin at one text")

    def texts_per_s(self, texts: int) -> float:
        """Texts per second that one API process can serve in requests of `texts`."""
        return texts / self.seconds(texts)

    def as_dict(self, texts: int) -> dict[str, Any]:
        """The limit for requests of `texts`, with its source."""
        return {
            "texts_per_s": self.texts_per_s(texts),
            "texts_per_request": texts,
            "api_processes": 1,
            "machine": self.machine,
            "source": FILE,
        }


@cache
def load() -> FrontEnd:
    """The measurement that comes with inferctl."""
    data = json.loads((assets.root() / FILE).read_text(encoding="utf-8"))
    points = tuple((one["texts_per_request"], one["ms_per_request"] / 1000) for one in data["requests"])
    return FrontEnd(points, f"{data['machine']['cpu']}, {data['machine']['cores']} cores")
