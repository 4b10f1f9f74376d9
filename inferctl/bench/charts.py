"""Charts of the report as Plotly figures, plain data. Colours of text, grid and background are the page's: it knows light from dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from inferctl.bench.receipt import Receipt

Figure = dict[str, Any]

# Okabe and Ito's colours: told apart with every kind of colour vision, on white and on black.
_PRECISIONS = {"fp32": "#0072b2", "fp16": "#e69f00", "bf16": "#009e73", "int8": "#cc79a7"}
_OTHERS = ("#56b4e9", "#d55e00", "#8c8c8c", "#b2a100")
_LOWEST_ERROR = 1e-7


def all_charts(receipts: Sequence[Receipt]) -> dict[str, tuple[str, str, Figure]]:
    """Chart id -> (title, what it shows, figure), in the order of the page; those without data are left out."""
    shades = colours(receipts)
    charts = {
        "percentiles": (
            "Latency by percentile",
            "How slow the slowest share of requests is. The bars at p50, p90 and p99 are 95 % intervals; a percentile that the sample does not support has none.",
            percentiles(receipts, shades),
        ),
        "ecdf": (
            "Latency, cumulative",
            "Share of requests that were answered within a time.",
            cumulative(receipts, shades),
        ),
        "throughput": (
            "Throughput",
            "Good answers per second in the measured window, with 95 % intervals. Hatched: emulated precision.",
            throughput(receipts, shades),
        ),
        "quality": (
            "Distance to fp32",
            "1 - cosine between each vector and the fp32 one of the same text; lower is closer. At 1e-7 and below the difference is float rounding.",
            distance(receipts, shades),
        ),
        "recall": (
            "Neighbours kept",
            "Share of each text's ten nearest neighbours that are the same as with fp32.",
            recall(receipts, shades),
        ),
        "memory": (
            "Memory",
            "Resident memory of the whole server, highest seen while measuring.",
            memory(receipts, shades),
        ),
        "timeline": (
            "Throughput over time",
            "Each run, second by second: a run that drifts has not settled.",
            timeline(receipts, shades),
        ),
    }
    return {name: chart for name, chart in charts.items() if chart[2]["data"]}


def colours(receipts: Sequence[Receipt]) -> dict[str, str]:
    """Colour of each configuration."""
    spare = iter(_OTHERS * len(receipts))
    return {one.name: _PRECISIONS.get(one.name) or next(spare) for one in receipts}


def label(one: Receipt) -> str:
    """Name of a configuration as charts show it; an invalid one says so."""
    return one.name if one.valid else f"{one.name} (invalid)"


def percentiles(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    """Latency over 1 / (1 - percentile), logarithmic: the tail gets the room."""
    data: list[dict[str, Any]] = []
    for one in receipts:
        points = [(share, ms) for share, ms in one.data["curve"] if 0 < share < 1]
        line = {"color": shades[one.name], "width": 2}
        hover = "%{customdata:.5~g} %: %{y:.2f} ms<extra>" + label(one) + "</extra>"
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(one),
                "line": line,
                "x": [1 / (1 - share) for share, _ in points],
                "y": [ms for _, ms in points],
                "customdata": [100 * share for share, _ in points],
                "hovertemplate": hover,
            }
        )
        known = [(q, one.data["summary"]["latency_ms"][f"p{q * 100:g}"]) for q in (0.5, 0.9, 0.99)]
        known = [(q, found) for q, found in known if found["value"] is not None]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(one),
                "showlegend": False,
                "marker": {"color": shades[one.name], "size": 7},
                "x": [1 / (1 - q) for q, _ in known],
                "y": [found["value"] for _, found in known],
                "customdata": [100 * q for q, _ in known],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [found["high"] - found["value"] for _, found in known],
                    "arrayminus": [found["value"] - found["low"] for _, found in known],
                    "color": shades[one.name],
                    "thickness": 1.5,
                },
                "hovertemplate": hover,
            }
        )
    shares = (0.5, 0.9, 0.99, 0.999, 0.9999)
    axis = {
        "type": "log",
        "tickvals": [1 / (1 - q) for q in shares],
        "ticktext": [f"p{q * 100:g}" for q in shares],
        "title": {"text": "percentile"},
    }
    layout: dict[str, Any] = {
        "xaxis": axis,
        "yaxis": {"type": "log", **_ticks(receipts), "title": {"text": "latency, ms"}},
        "hovermode": "closest",
    }
    slo = next((found for one in receipts if (found := one.data.get("slo", {}).get("p99_ms"))), None)
    if slo:
        line = {"dash": "dot", "color": "#d55e00"}
        layout["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": slo, "y1": slo, "line": line}]
        # On a logarithmic axis Plotly places shapes by value and annotations by exponent.
        place = {"xref": "paper", "x": 1, "y": math.log10(slo), "xanchor": "right", "yshift": 9, "showarrow": False}
        layout["annotations"] = [{"text": f"SLO: p99 {slo:g} ms", **place}]
    return {"data": data, "layout": layout}


def cumulative(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label(one),
            "line": {"color": shades[one.name], "width": 2, "shape": "hv"},
            "x": [ms for _, ms in one.data["curve"]],
            "y": [100 * share for share, _ in one.data["curve"]],
            "hovertemplate": "%{y:.5~g} % within %{x:.2f} ms<extra>" + label(one) + "</extra>",
        }
        for one in receipts
        if one.data["curve"]
    ]
    layout: dict[str, Any] = {
        "xaxis": {"type": "log", "title": {"text": "latency, ms"}, **_ticks(receipts)},
        "yaxis": {"title": {"text": "requests, %"}, "range": [0, 101]},
    }
    return {"data": data, "layout": layout}


def throughput(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    values = [one.data["summary"]["requests_per_s"] for one in receipts]
    spans = [one.data["summary"]["requests_per_s_interval"] for one in receipts]
    bars = _bars(receipts, shades, values, "%{customdata}: %{y:.2f} requests/s<extra></extra>")
    bars["error_y"] = {
        "type": "data",
        "symmetric": False,
        "array": [span["high"] - value if span else 0 for span, value in zip(spans, values, strict=True)],
        "arrayminus": [value - span["low"] if span else 0 for span, value in zip(spans, values, strict=True)],
        "color": "#8c8c8c",
    }
    return {
        "data": [bars] if receipts else [],
        "layout": {"yaxis": {"title": {"text": "requests/s"}, "rangemode": "tozero"}, "showlegend": False},
    }


def distance(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    checked = [one for one in receipts if "cosine" in one.data["quality"]]
    marks = (("mean", "mean", "circle"), ("p1", "worst 1 %", "diamond"), ("min", "worst", "triangle-up"))
    data: list[dict[str, Any]] = []
    for key, name, symbol in marks if checked else ():
        marker = {"symbol": symbol, "size": 12}
        # The legend explains shapes only, so it is drawn by an empty trace in a neutral colour.
        legend = {"name": name, "x": [None], "y": [None], "marker": {**marker, "color": "#8c8c8c"}}
        points = {
            "showlegend": False,
            "marker": {**marker, "color": [shades[one.name] for one in checked]},
            "x": [label(one) for one in checked],
            "y": [max(_LOWEST_ERROR, 1 - one.data["quality"]["cosine"][key]) for one in checked],
            "customdata": [one.data["quality"]["cosine"][key] for one in checked],
            "hovertemplate": "%{x}: cosine %{customdata:.6f}<extra>" + name + "</extra>",
        }
        data += [{"type": "scatter", "mode": "markers", **part} for part in (points, legend)]
    axis = {"type": "log", "title": {"text": "1 - cosine"}, "exponentformat": "power", "dtick": 1}
    return {"data": data, "layout": {"yaxis": axis, "xaxis": {"type": "category"}}}


def recall(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    checked = [one for one in receipts if "cosine" in one.data["quality"]]
    bars = _bars(
        checked,
        shades,
        [100 * one.data["quality"]["recall_at_10"] for one in checked],
        "%{customdata}: %{y:.2f} %<extra></extra>",
    )
    return {
        "data": [bars] if checked else [],
        "layout": {"yaxis": {"title": {"text": "recall@10, %"}, "range": [0, 105]}, "showlegend": False},
    }


def memory(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    known = [one for one in receipts if one.data["resources"].get("server_peak_bytes")]
    bars = _bars(
        known,
        shades,
        [one.data["resources"]["server_peak_bytes"] / 1e6 for one in known],
        "%{customdata}: %{y:.0f} MB<extra></extra>",
    )
    return {
        "data": [bars] if known else [],
        "layout": {"yaxis": {"title": {"text": "MB"}, "rangemode": "tozero"}, "showlegend": False},
    }


def timeline(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label(one),
            "legendgroup": one.name,
            "showlegend": number == 0,
            "line": {"color": shades[one.name], "width": 2, "dash": "solid" if number == 0 else "dot"},
            "x": [second + 1 for second, _, _ in run["timeline"]],
            "y": [rate for _, rate, _ in run["timeline"]],
            "hovertemplate": "second %{x}: %{y:.0f} requests/s<extra>"
            + f"{label(one)}, run {run['repeat'] + 1}"
            + "</extra>",
        }
        for one in receipts
        for number, run in enumerate(one.data["runs"])
    ]
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "seconds measured"}},
            "yaxis": {"title": {"text": "requests/s"}, "rangemode": "tozero"},
        },
    }


def _ticks(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Ticks 1, 2, 5, 10, 20, … over the range of the latencies, written out: Plotly's own would leave the zeros away."""
    values = [ms for one in receipts for _, ms in one.data["curve"] if ms > 0] or [1.0]
    exponents = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents for step in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _bars(receipts: Sequence[Receipt], shades: dict[str, str], values: list[float], hover: str) -> dict[str, Any]:
    """Bars with their values under the names, where no error bar crosses them; hatched where the precision is emulated."""
    emulated = [one.data["precision"].get("level") == "emulated" for one in receipts]
    pattern = {
        "shape": ["/" if one else "" for one in emulated],
        "fillmode": "overlay",
        "fgcolor": "#ffffff",
        "fgopacity": 0.45,
        "solidity": 0.3,
    }
    shown = [f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in values]
    return {
        "type": "bar",
        "x": [f"{label(one)}<br><b>{text}</b>" for one, text in zip(receipts, shown, strict=True)],
        "y": values,
        "customdata": [label(one) for one in receipts],
        "width": 0.6,
        "marker": {"color": [shades[one.name] for one in receipts], "pattern": pattern},
        "hovertemplate": hover,
    }
