"""A chart of the report, and parts that several charts share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# The parts of a profile: their names in the terminal, and their colors by Okabe and Ito.
PARTS = {
    "matrix products": ("matrix", "#009e73"),
    "padding": ("pad", "#b2a100"),
    "attention": ("attn", "#0072b2"),
    "norms and elementwise": ("elem", "#56b4e9"),
    "embedding and outputs": ("out", "#cc79a7"),
    "preparation": ("prep", "#e69f00"),
    "tokenization": ("tok", "#d55e00"),
    "Python": ("Python", "#8c8c8c"),
    "waiting": ("wait", "#c8c8c8"),
}
_SLO_LINE = {"dash": "dot", "color": "#d55e00"}

# A trace, a layout or an axis of a Plotly figure, in its JSON form.
Json = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A Plotly figure (`data`, `layout`) with its title and a text that explains it."""

    title: str
    text: str
    data: list[Json]
    layout: Json


def unit_of(task: str) -> str:
    """Return what a server processes: texts, for rerank pairs of a query and a document, or output tokens."""
    return {"rerank": "pairs", "generate": "output tokens"}.get(task, "texts")


def ticks(values: Sequence[float]) -> Json:
    """Return the ticks 1, 2, 5, 10, 20, ... over the range of `values`. Plotly's own ticks omit the zeros."""
    known = [value for value in values if value and value > 0] or [1.0]
    exponents = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
    steps = (1, 2, 5) if len(exponents) <= 5 else (1,)
    marks = [step * 10.0**exponent for exponent in exponents for step in steps]
    return {"tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]}


def slo_line(slo_ms: float, unit: str = " ms") -> tuple[Json, Json]:
    """Return line and label of an SLO on a logarithmic axis. `unit` is that of the axis."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": slo_ms, "y1": slo_ms, "line": _SLO_LINE}
    # On a logarithmic axis Plotly places shapes by value and annotations by exponent.
    place = {"xref": "paper", "x": 0, "y": math.log10(slo_ms), "xanchor": "left", "yshift": 9, "showarrow": False}
    return line, {"text": f"SLO: p99 {slo_ms:g}{unit}", **place}
