"""Charts of the report as Plotly figures, plain data. Colours of text, grid and background are the page's: it knows light from dark."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.bench.receipt import Receipt
from inferctl.bench.report import load_charts

Figure = dict[str, Any]

# Okabe and Ito's colours: told apart with every kind of colour vision, on white and on black.
_PRECISIONS = {"fp32": "#0072b2", "fp16": "#e69f00", "bf16": "#009e73", "int8": "#cc79a7"}
_OTHERS = ("#56b4e9", "#d55e00", "#8c8c8c", "#b2a100")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
GREY = "#8c8c8c"
_LOWEST_ERROR = 1e-7
# Pixels of a bar and of what is around them; so many fit a chart of the usual height.
_BAR, _AROUND, _FITS = 34, 74, 7


def all_charts(
    receipts: Sequence[Receipt], rows: Sequence[Mapping[str, Any]] = ()
) -> dict[str, tuple[str, str, Figure]]:
    """Chart id -> (title, what it shows, figure), in the order of the page; those without data are left out.

    `rows` are those of the result: what was estimated is drawn beside what was measured, hatched and named so.
    """
    shades = colours(receipts)
    estimated = [row for row in rows if row["outcome"] == "estimated"]
    charts = {
        "goodput": (
            "Rate against p99",
            "Each probe of the search, with the 95 % interval of its p99. A cross broke a constraint, an open triangle was ended early: its "
            "true p99 is higher. The upright line is the highest rate that held, and held again.",
            load_charts.goodput(receipts, shades),
        ),
        "neighbours": (
            "Beside busy neighbours",
            "Circle: alone. Diamond: beside busy neighbours on the same device. The figure is the factor with its 95 % interval.",
            load_charts.neighbours(receipts, shades),
        ),
        "percentiles": (
            "Latency by percentile",
            "How slow the slowest share of requests is. The bars at p50, p90 and p99 are 95 % intervals; a percentile that the sample does not support has none.",
            percentiles(receipts, shades),
        ),
        "throughput": (
            "Throughput",
            "Good answers per second in the measured window, with 95 % intervals. Filled and hatched: emulated precision."
            + (" Outlines are estimated, with the error band or as an upper bound." if estimated else ""),
            throughput(receipts, shades, estimated),
        ),
        "memory": (
            "Memory",
            "Resident memory of the whole server, highest seen while measuring.",
            memory(receipts, shades),
        ),
        "ecdf": (
            "Latency, cumulative",
            "Share of requests that were answered within a time.",
            cumulative(receipts, shades),
        ),
        "frontier": load_charts.frontier(receipts, shades),
        "quality": (
            "Distance to fp32",
            "1 - cosine between each vector and the fp32 one of the same text; lower is closer. At 1e-7 and below the difference is float rounding.",
            distance(receipts, shades),
        ),
        "recall": (
            "Nearest neighbours kept",
            "Share of each text's ten nearest neighbours that are the same as with fp32.",
            recall(receipts, shades),
        ),
        "latency": (
            "Latency over time",
            "By the time at which requests should have left: median (line) and highest (dots) of each window of the first run."
            + (" Shaded: more load than at first." if any(one.data.get("stages") for one in receipts) else ""),
            load_charts.latency_over_time(receipts, shades),
        ),
        "timeline": (
            "Throughput over time",
            "Each run, second by second: a run that drifts has not settled.",
            timeline(receipts, shades),
        ),
    }
    drawn = {name: chart for name, chart in charts.items() if chart[2]["data"]}
    return drawn if len(receipts) <= _FITS else _crowded(drawn, len(receipts))


def _crowded(charts: dict[str, tuple[str, str, Figure]], count: int) -> dict[str, tuple[str, str, Figure]]:
    """With many configurations one chart has the legend, in room of its own; it would leave the others none."""
    for name in ("ecdf", "frontier", "latency", "timeline", "goodput"):
        if name in charts:
            title, text, figure = charts[name]
            figure["layout"]["showlegend"] = False
            charts[name] = (title, f"{text} Colours as in the table of results.", figure)
    if "percentiles" in charts:
        charts["percentiles"][2]["layout"]["height"] = 320 + 10 * count
    return charts


def colours(receipts: Sequence[Receipt]) -> dict[str, str]:
    """Colour of each configuration."""
    spare = itertools.cycle(
        _OTHERS if any(one.name in _PRECISIONS for one in receipts) else (*_PRECISIONS.values(), *_OTHERS)
    )
    return {one.name: _PRECISIONS.get(one.name) or next(spare) for one in receipts}


def dashes(shades: Mapping[str, str]) -> dict[str, str]:
    """How the line of each configuration is drawn: where colours come again, the dashes differ."""
    seen: dict[str, int] = {}
    found = {}
    for name, colour in shades.items():
        found[name] = _DASHES[seen.get(colour, 0) % len(_DASHES)]
        seen[colour] = seen.get(colour, 0) + 1
    return found


def label(one: Receipt) -> str:
    """Name of a configuration as charts show it; an invalid one says so."""
    return one.name if one.valid else f"{one.name} (invalid)"


def percentiles(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    """Latency over 1 / (1 - percentile), logarithmic: the tail gets the room."""
    data: list[dict[str, Any]] = []
    dash = dashes(shades)
    for one in receipts:
        points = [(share, ms) for share, ms in one.data["curve"] if 0 < share < 1]
        line = {"color": shades[one.name], "width": 2, "dash": dash[one.name]}
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
        line, note = load_charts.slo_line(slo)
        layout |= {"shapes": [line], "annotations": [note]}
    return {"data": data, "layout": layout}


def cumulative(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label(one),
            "line": {"color": shades[one.name], "width": 2, "shape": "hv", "dash": dashes(shades)[one.name]},
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


def throughput(
    receipts: Sequence[Receipt], shades: dict[str, str], estimated: Sequence[Mapping[str, Any]] = ()
) -> Figure:
    values = [one.data["summary"]["requests_per_s"] for one in receipts]
    spans = [one.data["summary"]["requests_per_s_interval"] for one in receipts]
    bars = _bars(receipts, shades, values, "%{y}: %{x:.2f} requests/s<extra></extra>")
    ends = [
        (max(0.0, value - span["low"]), span["high"] - value) if span else (0.0, 0.0)
        for span, value in zip(spans, values, strict=True)
    ]
    bars["error_x"] = _whiskers(ends)
    data = [bars] if receipts else []
    guessed = [row for row in estimated if _end_of_bar(row) is not None]
    if guessed:
        data.append(_estimated(guessed))
    return {"data": data, "layout": _bar_layout(len(receipts) + len(guessed), "requests/s")}


def _end_of_bar(row: Mapping[str, Any]) -> float | None:
    """The estimated requests/s of a row, or their upper bound."""
    figures = row["estimate"]
    span = (figures.get("ranges") or {}).get("requests_per_s") or {}
    found = span.get("high") if span.get("bound") else figures.get("requests_per_s")
    return None if found is None else float(found)


def _estimated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bars of estimates: hollow, hatched and labeled. A bound has no error bar."""
    values = [_end_of_bar(row) or 0.0 for row in rows]
    spans = [(row["estimate"].get("ranges") or {}).get("requests_per_s") for row in rows]
    bounds = [(span or {}).get("bound") for span in spans]
    ends = [
        (value - span["low"], (span["high"] or value) - value) if span and not bound else (0.0, 0.0)
        for value, span, bound in zip(values, spans, bounds, strict=True)
    ]
    return {
        "type": "bar",
        "orientation": "h",
        "y": [f"{short(row['configuration'])}, estimated<br>{row['hardware']['key']}" for row in rows],
        "x": values,
        "text": [
            f"{bound} {_figure(value)}" if bound else f"~{_figure(value)}"
            for value, bound in zip(values, bounds, strict=True)
        ],
        "textposition": "none",
        "width": 0.6,
        "marker": {
            "color": "rgba(0,0,0,0)",
            "line": {"color": GREY, "width": 1.5},
            "pattern": {"shape": "x", "fgcolor": GREY, "fgopacity": 0.7, "solidity": 0.15, "size": 7},
        },
        "error_x": _whiskers(ends),
        "hovertemplate": "%{y}: %{text} requests/s<extra></extra>",
    }


def _whiskers(ends: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Error bars from (below, above) of each value."""
    return {
        "type": "data",
        "symmetric": False,
        "arrayminus": [low for low, _ in ends],
        "array": [high for _, high in ends],
        "color": GREY,
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
            "y": [short(label(one)) for one in checked],
            "x": [max(_LOWEST_ERROR, 1 - one.data["quality"]["cosine"][key]) for one in checked],
            "customdata": [one.data["quality"]["cosine"][key] for one in checked],
            "hovertemplate": "%{y}: cosine %{customdata:.6f}<extra>" + name + "</extra>",
        }
        data += [{"type": "scatter", "mode": "markers", **part} for part in (points, legend)]
    axis = {"type": "log", "title": {"text": "1 - cosine"}, "exponentformat": "power", "dtick": 1}
    layout = _bar_layout(len(checked), "") | {"xaxis": axis, "showlegend": True}
    return {"data": data, "layout": layout | {"yaxis": {**layout["yaxis"], "showgrid": True}}}


def recall(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    checked = [one for one in receipts if "cosine" in one.data["quality"]]
    values = [100 * one.data["quality"]["recall_at_10"] for one in checked]
    bars = _bars(checked, shades, values, "%{y}: %{x:.2f} %<extra></extra>")
    return {"data": [bars] if checked else [], "layout": _bar_layout(len(checked), "recall@10, %", [0, 104])}


def memory(receipts: Sequence[Receipt], shades: dict[str, str]) -> Figure:
    known = [one for one in receipts if one.data["resources"].get("server_peak_bytes")]
    values = [one.data["resources"]["server_peak_bytes"] / 1e6 for one in known]
    bars = _bars(known, shades, values, "%{y}: %{x:.0f} MB<extra></extra>")
    return {"data": [bars] if known else [], "layout": _bar_layout(len(known), "MB")}


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
    return load_charts.ticks([ms for one in receipts for _, ms in one.data["curve"]])


def _bars(receipts: Sequence[Receipt], shades: dict[str, str], values: list[float], hover: str) -> dict[str, Any]:
    """Lying bars, so that long names have room; each with its value beside its name; hatched where the precision is emulated."""
    emulated = [one.data["precision"].get("level") == "emulated" for one in receipts]
    pattern = {
        "shape": ["/" if one else "" for one in emulated],
        "fillmode": "overlay",
        "fgcolor": "#ffffff",
        "fgopacity": 0.45,
        "solidity": 0.3,
    }
    return {
        "type": "bar",
        "orientation": "h",
        "y": [f"{short(label(one))}  <b>{_figure(value)}</b>" for one, value in zip(receipts, values, strict=True)],
        "x": values,
        "width": 0.6,
        "marker": {"color": [shades[one.name] for one in receipts], "pattern": pattern},
        "hovertemplate": hover,
    }


def _bar_layout(count: int, title: str, span: list[float] | None = None) -> dict[str, Any]:
    """First on top; as high as its bars need."""
    axis = {"range": span} if span else {"rangemode": "tozero"}
    return {
        "xaxis": {"title": {"text": title}, **axis},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
        "showlegend": False,
        **({"height": _AROUND + _BAR * count} if count > _FITS else {}),
    }


def short(name: str, most: int = 34) -> str:
    """A name that leaves room for what it names."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
