"""The charts of the report as Plotly figures.

The page sets the colors of text, grid and background, for its light and its dark mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from inferctl.bench.report import load_charts, retrieval
from inferctl.bench.report.chart import Chart, Json, slo_line, ticks
from inferctl.receipts.receipt import Receipt

# Colors by Okabe and Ito: distinct with each kind of color vision, on white and on black.
_PRECISIONS = {"fp32": "#0072b2", "fp16": "#e69f00", "bf16": "#009e73", "int8": "#cc79a7"}
_OTHERS = ("#56b4e9", "#d55e00", "#8c8c8c", "#b2a100")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
# With more configurations, only one chart has a legend.
_MOST_LEGENDS = 7


@dataclass(frozen=True)
class Distribution:
    """A distribution of a receipt: the keys of its points and of its percentiles, and its words in a chart."""

    curve: str
    percentiles: str
    axis: str
    title: str
    text: str


LATENCY = Distribution(
    "curve", "latency_ms", "latency (ms)", "Latency by percentile", "1% of the requests were slower than the p99."
)
TTFT = Distribution(
    "ttft_curve",
    "ttft_ms",
    "time to first token (ms)",
    "Time to first token by percentile",
    "From the intended send to the first event with a token, over requests.",
)
ITL = Distribution(
    "itl_curve",
    "itl_ms",
    "inter-token latency (ms)",
    "Inter-token latency by percentile",
    "Gaps between the events of a response, over all gaps. Events that were read together have a gap of 0.",
)


def all_charts(receipts: Sequence[Receipt]) -> dict[str, Chart]:
    """Return the charts that have data, by id, in the order of the page."""
    colors = colors_of(receipts)
    charts = {
        **retrieval.charts(retrieval.rows(receipts), colors),
        "goodput": load_charts.goodput(receipts, colors),
        "ttft": percentiles(receipts, colors, TTFT),
        "itl": percentiles(receipts, colors, ITL),
        "percentiles": percentiles(receipts, colors),
        "timeline": timeline(receipts, colors),
        "latency": load_charts.latency_over_time(receipts, colors),
        **{f"profile-{number}": load_charts.profile(receipt) for number, receipt in enumerate(receipts)},
    }
    # The tables have single points.
    drawn = {name: chart for name, chart in charts.items() if any(len(trace["x"]) > 1 for trace in chart.data)}
    return drawn if len(receipts) <= _MOST_LEGENDS else _compact(drawn, len(receipts))


def _compact(charts: dict[str, Chart], count: int) -> dict[str, Chart]:
    """Return the charts for many configurations: one chart has the legend, which would cover the others."""
    for name in ("latency", "timeline", "goodput"):
        if chart := charts.get(name):
            layout = {**chart.layout, "showlegend": False}
            charts[name] = replace(chart, text=f"{chart.text} Colors as in the table of results.", layout=layout)
    if chart := charts.get("percentiles"):
        charts["percentiles"] = replace(chart, layout={**chart.layout, "height": 320 + 10 * count})
    return charts


def colors_of(receipts: Sequence[Receipt]) -> dict[str, str]:
    """Return the color of each configuration."""
    spare = itertools.cycle(
        _OTHERS if any(receipt.name in _PRECISIONS for receipt in receipts) else (*_PRECISIONS.values(), *_OTHERS)
    )
    return {receipt.name: _PRECISIONS.get(receipt.name) or next(spare) for receipt in receipts}


def dashes(colors: Mapping[str, str]) -> dict[str, str]:
    """Return the dash style of each configuration. Configurations of the same color have different styles."""
    used: dict[str, int] = {}
    found = {}
    for name, color in colors.items():
        found[name] = _DASHES[used.get(color, 0) % len(_DASHES)]
        used[color] = used.get(color, 0) + 1
    return found


def label(receipt: Receipt) -> str:
    """Return the name of a configuration in a chart; an invalid one is marked."""
    return receipt.name if receipt.valid else f"{receipt.name} (invalid)"


def percentiles(receipts: Sequence[Receipt], colors: Mapping[str, str], distribution: Distribution = LATENCY) -> Chart:
    """Return latency over 1 / (1 - percentile), on a logarithmic axis, so that the tail is visible."""
    data: list[Json] = []
    dash = dashes(colors)
    receipts = [receipt for receipt in receipts if receipt.data.get(distribution.curve)]
    for receipt in receipts:
        # A logarithmic axis has no place for the gap of events that were read together.
        points = [(share, ms) for share, ms in receipt.data[distribution.curve] if 0 < share < 1 and ms > 0]
        hover = "%{customdata:.5~g}%: %{y:.2f} ms<extra>" + label(receipt) + "</extra>"
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(receipt),
                "line": {"color": colors[receipt.name], "width": 2, "dash": dash[receipt.name]},
                "x": [1 / (1 - share) for share, _ in points],
                "y": [ms for _, ms in points],
                "customdata": [100 * share for share, _ in points],
                "hovertemplate": hover,
            }
        )
        every = [(q, receipt.data["summary"][distribution.percentiles][f"p{q * 100:g}"]) for q in (0.5, 0.9, 0.99)]
        known = [(q, found) for q, found in every if found["value"] is not None]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(receipt),
                "showlegend": False,
                "marker": {"color": colors[receipt.name], "size": 7},
                "x": [1 / (1 - q) for q, _ in known],
                "y": [found["value"] for _, found in known],
                "customdata": [100 * q for q, _ in known],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [found["high"] - found["value"] for _, found in known],
                    "arrayminus": [found["value"] - found["low"] for _, found in known],
                    "color": colors[receipt.name],
                    "thickness": 1.5,
                },
                "hovertemplate": hover,
            }
        )
    shares = (0.5, 0.9, 0.99, 0.999, 0.9999)
    layout: Json = {
        "xaxis": {
            "type": "log",
            "tickvals": [1 / (1 - q) for q in shares],
            "ticktext": [f"p{q * 100:g}" for q in shares],
            "title": {"text": "percentile"},
        },
        "yaxis": {
            "type": "log",
            **ticks([ms for receipt in receipts for _, ms in receipt.data[distribution.curve]]),
            "title": {"text": distribution.axis},
        },
        "hovermode": "closest",
    }
    if distribution == LATENCY and (
        slo := next((found for receipt in receipts if (found := receipt.data.get("slo", {}).get("p99_ms"))), None)
    ):
        line, note = slo_line(slo)
        layout |= {"shapes": [line], "annotations": [note]}
    text = (
        f"{distribution.text} The bars at p50, p90 and p99 are 95% intervals. A percentile has no bar if the sample "
        "does not support it."
    )
    return Chart(distribution.title, text, data, layout)


def timeline(receipts: Sequence[Receipt], colors: Mapping[str, str]) -> Chart:
    """Return requests/s of each run over time."""
    data: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label(receipt),
            "legendgroup": receipt.name,
            "showlegend": number == 0,
            "line": {"color": colors[receipt.name], "width": 2, "dash": "solid" if number == 0 else "dot"},
            "x": [second + 1 for second, _, _ in run["timeline"]],
            "y": [rate for _, rate, _ in run["timeline"]],
            "hovertemplate": "second %{x}: %{y:.0f} requests/s<extra>"
            + f"{label(receipt)}, run {run['repeat'] + 1}"
            + "</extra>",
        }
        for receipt in receipts
        for number, run in enumerate(receipt.data["runs"])
    ]
    layout: Json = {
        "xaxis": {"title": {"text": "time in the measured window (s)"}},
        "yaxis": {"title": {"text": "requests/s"}, "rangemode": "tozero"},
    }
    text = "Requests/s of each run, second by second. A run that drifts has not reached a steady state."
    return Chart("Throughput over time", text, data, layout)
