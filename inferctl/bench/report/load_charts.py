"""Charts of what a load did: rate against p99, busy neighbours, latency over time, and what throughput costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.bench.receipt import Receipt

Figure = dict[str, Any]
GREY = "#8c8c8c"
_SLO = {"dash": "dot", "color": "#d55e00"}


def goodput(receipts: Sequence[Receipt], shades: Mapping[str, str]) -> Figure:
    """p99 over the offered rate, of every probe of each search; the last look at a rate counts, it pools the ones before."""
    found = [(one, one.data["search"]) for one in receipts if one.data.get("search")]
    data: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for one, search in found:
        latest = {probe["rate"]: probe for probe in search["probes"] if probe["p99_ms"] is not None}
        probes = [latest[rate] for rate in sorted(latest)]
        ends = [probe["p99_interval_ms"] for probe in probes]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": one.name,
                "line": {"color": shades[one.name], "width": 2},
                "marker": {"size": 9, "symbol": [_symbol(probe) for probe in probes]},
                "x": [probe["rate"] for probe in probes],
                "y": [probe["p99_ms"] for probe in probes],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [(high or p["p99_ms"]) - p["p99_ms"] for (_, high), p in zip(ends, probes, strict=True)],
                    "arrayminus": [
                        p["p99_ms"] - (low or p["p99_ms"]) for (low, _), p in zip(ends, probes, strict=True)
                    ],
                    "color": shades[one.name],
                    "thickness": 1,
                },
                "customdata": [[probe["achieved_rps"], probe["reason"]] for probe in probes],
                "hovertemplate": "%{x:g} requests/s offered, %{customdata[0]:.1f} done<br>p99 %{y:.1f} ms: "
                "%{customdata[1]}<extra>" + one.name + "</extra>",
            }
        )
        if best := search["max_goodput_rps"]:
            line = {"color": shades[one.name], "width": 1.5, "dash": "dash"}
            shapes.append({"type": "line", "x0": best, "x1": best, "yref": "paper", "y0": 0, "y1": 1, "line": line})
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "requests/s offered"}, "rangemode": "tozero"},
        "yaxis": {"type": "log", "title": {"text": "p99, ms"}, **ticks([y for trace in data for y in trace["y"]])},
        "hovermode": "closest",
    }
    if found:
        line, note = slo_line(found[0][1]["slo_p99_ms"])
        layout |= {"shapes": [*shapes, line], "annotations": [note]}
    return {"data": data, "layout": layout}


def _symbol(probe: Mapping[str, Any]) -> str:
    if probe["ended_early"]:
        return "triangle-up-open"
    return "circle" if probe["holds"] else "x" if probe["holds"] is False else "circle-open"


def slo_line(slo: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Line and label at a p99 on a logarithmic axis."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": slo, "y1": slo, "line": _SLO}
    # On a logarithmic axis Plotly places shapes by value and annotations by exponent.
    place = {"xref": "paper", "x": 1, "y": math.log10(slo), "xanchor": "right", "yshift": 9, "showarrow": False}
    return line, {"text": f"SLO: p99 {slo:g} ms", **place}


def neighbours(receipts: Sequence[Receipt], shades: Mapping[str, str]) -> Figure:
    """A line from the latency alone to that beside busy neighbours, for each percentile."""
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for one in receipts:
        for key, found in ((one.data.get("neighbours") or {}).get("percentiles") or {}).items():
            if found["factor"] is None:
                continue
            row = f"{one.name} {key}"
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "showlegend": False,
                    "line": {"color": shades[one.name], "width": 3},
                    "marker": {"size": 11, "symbol": ["circle", "diamond"]},
                    "x": [found["without_ms"], found["with_ms"]],
                    "y": [row, row],
                    "hovertemplate": "%{x:.2f} ms<extra>" + row + "</extra>",
                }
            )
            text = f"{found['factor']:.2f}x ({found['low']:.2f} – {found['high']:.2f})"
            furthest = max(found["without_ms"], found["with_ms"])
            notes.append(
                {"text": text, "x": math.log10(furthest), "y": row, "xanchor": "left", "xshift": 10, "showarrow": False}
            )
    values = [x for trace in data for x in trace["x"]]
    reach = (
        [math.log10(min(values) * 0.8), math.log10(max(values) * (max(values) / min(values)) ** 0.9 * 1.2)]
        if values
        else None
    )
    layout = {
        "xaxis": {"type": "log", "title": {"text": "latency, ms"}, "range": reach, **ticks(values)},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "annotations": notes,
        "height": 90 + 34 * len(data),
    }
    return {"data": data, "layout": layout}


_COSTS = (
    (
        "usd_per_million_texts",
        "US dollars per million texts",
        "Lowest on-demand price of the catalog, at the load measured.",
    ),
    (
        "joules_per_million_texts",
        "joules per million texts",
        "Average power, idle power included, over what was answered.",
    ),
    (
        "cpu_seconds_per_1000_requests",
        "CPU seconds per 1,000 requests",
        "No price and no energy counter is known here.",
    ),
)


def frontier(receipts: Sequence[Receipt], shades: Mapping[str, str]) -> tuple[str, str, Figure]:
    """What a request costs over throughput: in dollars where a price is known, else in joules, else in CPU seconds."""
    valid = [one for one in receipts if one.valid]
    # What is known of most of them: a chart of dollars with half of the configurations missing compares less.
    key, title, note = max(_COSTS, key=lambda kind: sum(spent(one, kind[0]) is not None for one in valid))
    points = [(one, cost) for one in valid if (cost := spent(one, key)) is not None]
    if not points:
        return "Cost and throughput", "", {"data": [], "layout": {}}
    absent = ", ".join(one.name for one in valid if spent(one, key) is None)
    text = (
        f"Lower right is better; the line joins what nothing else beats in both. {note}"
        + (" A cross fails on quality." if any(_mark(one) == "x" for one, _ in points) else "")
        + (f" Not known for {absent}." if absent else "")
    )
    spots = [(one.data["summary"]["requests_per_s"], cost) for one, cost in points]
    best = sorted(spot for spot in spots if not any(_beats(other, spot) for other in spots))
    edge = {
        "type": "scatter",
        "mode": "lines",
        "line": {"color": GREY, "width": 1.5, "dash": "dot", "shape": "vh"},
        "x": [x for x, _ in best],
        "y": [y for _, y in best],
        "hoverinfo": "skip",
        "showlegend": False,
    }
    marks = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": one.name,
            "marker": {"color": shades[one.name], "size": 12, "symbol": _mark(one)},
            "x": [x],
            "y": [y],
            "hovertemplate": f"%{{x:.1f}} requests/s, %{{y:.4~g}} {title}<extra>{one.name}</extra>",
        }
        for (one, _), (x, y) in zip(points, spots, strict=True)
    ]
    layout = {
        "xaxis": {"title": {"text": "requests/s"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": title}, "rangemode": "tozero"},
        "hovermode": "closest",
    }
    return "Cost and throughput", text, {"data": [edge, *marks] if len(best) > 1 else marks, "layout": layout}


def _mark(one: Receipt) -> str:
    """A cross for what fails on quality: it cannot be recommended."""
    return "x" if one.data["quality"].get("passes") is False else "circle"


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether (throughput, cost) `one` is at least as good in both and better in one."""
    return one != other and one[0] >= other[0] and one[1] <= other[1]


def spent(one: Receipt, key: str) -> float | None:
    """A cost of a receipt's configuration; None where it is not known."""
    found = one.data.get("efficiency") or {}
    if key == "usd_per_million_texts":
        return min((price[key] for price in found.get("cost") or ()), default=None)
    value = found.get(key)
    return None if value is None else float(value)


def latency_over_time(receipts: Sequence[Receipt], shades: Mapping[str, str]) -> Figure:
    """Median and highest latency of each window of the first run, with the stages of the load that send more than the first."""
    data: list[dict[str, Any]] = []
    for one in receipts:
        first = next((run["latency_over_time"] for run in one.data["runs"] if run.get("latency_over_time")), None)
        if first is None:
            continue
        points = [point for point in first["points"] if point[1]]
        middle = [point[0] + first["window_s"] / 2 for point in points]
        shared = {"type": "scatter", "x": middle, "legendgroup": one.name, "name": one.name}
        line = {"color": shades[one.name], "width": 2}
        data.append(
            {
                **shared,
                "mode": "lines",
                "line": line,
                "y": [point[2] for point in points],
                "hovertemplate": _at("median"),
            }
        )
        marker = {"color": shades[one.name], "size": 5, "opacity": 0.7}
        highest = {"mode": "markers", "marker": marker, "y": [point[3] for point in points], "showlegend": False}
        data.append({**shared, **highest, "hovertemplate": _at("highest")})
    values = [y for trace in data for y in trace["y"] if y]
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "seconds measured"}, "rangemode": "tozero"},
        "yaxis": {"type": "log", "title": {"text": "latency, ms"}, **ticks(values)},
        "hovermode": "closest",
    }
    staged = next((one.data["stages"] for one in receipts if one.data.get("stages")), None)
    if staged and data:
        layout |= _shaded(staged)
        # Room above the points for the names of the stages.
        layout["yaxis"]["range"] = [math.log10(0.8 * min(values)), math.log10(3 * max(values))]
    return {"data": data, "layout": layout}


def _at(which: str) -> str:
    return which + " %{y:.1f} ms at %{x:.1f} s<extra>%{fullData.name}</extra>"


def _shaded(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bands behind the stages that send more than the first one, and the name of every stage."""
    level = "rate" if stages[0]["rate"] is not None else "users"
    lowest = stages[0][level] or 0
    shapes = [
        {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": one["start_s"],
            "x1": one["end_s"],
            "y0": 0,
            "y1": 1,
            "fillcolor": "#d55e00",
            "opacity": 0.14,
            "line": {"width": 0},
            "layer": "below",
        }
        for one in stages
        if (one[level] or 0) > lowest
    ]
    unit = "/s" if level == "rate" else " users"
    notes = [
        {
            "text": f"{one['name']}<br>{one[level] or 0:g}{unit}",
            "x": (one["start_s"] + one["end_s"]) / 2,
            "y": 1,
            "yref": "paper",
            "yanchor": "top",
            "showarrow": False,
            "font": {"size": 11},
        }
        for one in stages
    ]
    return {"shapes": shapes, "annotations": notes if len(notes) <= 8 else []}


def ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks 1, 2, 5, 10, 20, … over the range of `values`, written out: Plotly's own would leave the zeros away."""
    known = [value for value in values if value and value > 0] or [1.0]
    exponents = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
    steps = (1, 2, 5) if len(exponents) <= 5 else (1,)
    marks = [step * 10.0**exponent for exponent in exponents for step in steps]
    return {"tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]}
