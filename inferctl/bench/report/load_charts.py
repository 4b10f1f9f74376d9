"""The charts of rate against p99, and of latency over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inferctl.bench.report import search_findings
from inferctl.bench.report.chart import PARTS, Chart, Json, slo_line, ticks
from inferctl.receipts.receipt import JsonObject, Receipt


def goodput(receipts: Sequence[Receipt], colors: Mapping[str, str]) -> Chart:
    """Return the p99 over the offered rate, for all searches. The last probe of a rate pools the earlier ones."""
    searches = [(receipt, receipt.data["search"]) for receipt in receipts if receipt.data.get("search")]
    data: list[Json] = []
    shapes: list[Json] = []
    unit = search_findings.unit_of(searches[0][1]) if searches else " ms"
    for receipt, search in searches:
        latest = {probe["rate"]: probe for probe in search["probes"] if probe["p99_ms"] is not None}
        probes = [latest[rate] for rate in sorted(latest)]
        data.append(_probes(receipt.name, probes, colors[receipt.name], search_findings.unit_of(search)))
        if best := search["max_goodput_rps"]:
            line = {"color": colors[receipt.name], "width": 1.5, "dash": "dash"}
            shapes.append({"type": "line", "x0": best, "x1": best, "yref": "paper", "y0": 0, "y1": 1, "line": line})
    layout: Json = {
        "xaxis": {"title": {"text": "offered rate (requests/s)"}, "rangemode": "tozero"},
        "yaxis": {
            "type": "log",
            "title": {"text": f"p99 ({unit.strip()})"},
            **ticks([y for trace in data for y in trace["y"]]),
        },
        "hovermode": "closest",
    }
    if searches:
        line, note = slo_line(searches[0][1]["slo_p99_ms"], unit)
        layout |= {"shapes": [*shapes, line], "annotations": [note]}
    text = "Each probe of the search, with the 95% interval of its p99. Cross: the probe violated a constraint."
    if shapes:
        text += " Vertical line: the highest rate within the SLO, confirmed by another probe."
    return Chart("Offered rate and p99", text, data, layout)


def _probes(name: str, probes: Sequence[JsonObject], color: str, unit: str) -> Json:
    intervals = [(probe["p99_ms"], *probe["p99_interval_ms"]) for probe in probes]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "line": {"color": color, "width": 2},
        "marker": {"size": 9, "symbol": [_symbol(probe) for probe in probes]},
        "x": [probe["rate"] for probe in probes],
        "y": [probe["p99_ms"] for probe in probes],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [(high or p99) - p99 for p99, _, high in intervals],
            "arrayminus": [p99 - (low or p99) for p99, low, _ in intervals],
            "color": color,
            "thickness": 1,
        },
        "customdata": [[probe["achieved_rps"], probe["reason"]] for probe in probes],
        "hovertemplate": "%{x:g} requests/s offered, %{customdata[0]:.1f} completed<br>p99 %{y:.1f}" + unit + ": "
        "%{customdata[1]}<extra>" + name + "</extra>",
    }


def _symbol(probe: JsonObject) -> str:
    return "circle" if probe["holds"] else "x" if probe["holds"] is False else "circle-open"


def latency_over_time(receipts: Sequence[Receipt], colors: Mapping[str, str]) -> Chart:
    """Return median and highest latency of each window of the first run.

    In a closed loop without stages, throughput over time shows the same: users / requests/s.
    """
    data: list[Json] = []
    for receipt in receipts:
        first = next((run["latency_over_time"] for run in receipt.data["runs"] if run.get("latency_over_time")), None)
        closed = (receipt.data["plan"].get("load") or {}).get("mode") == "closed" and not receipt.data.get("stages")
        if first is None or closed:
            continue
        points = [point for point in first["points"] if point[1]]
        middle = [point[0] + first["window_s"] / 2 for point in points]
        shared = {"type": "scatter", "x": middle, "legendgroup": receipt.name, "name": receipt.name}
        line = {"color": colors[receipt.name], "width": 2}
        median = {"mode": "lines", "line": line, "y": [point[2] for point in points], "hovertemplate": _hover("median")}
        marker = {"color": colors[receipt.name], "size": 5, "opacity": 0.7}
        highest = {"mode": "markers", "marker": marker, "y": [point[3] for point in points], "showlegend": False}
        data += [{**shared, **median}, {**shared, **highest, "hovertemplate": _hover("highest")}]
    layout: Json = {
        "xaxis": {"title": {"text": "time in the measured window (s)"}, "rangemode": "tozero"},
        "yaxis": {
            "type": "log",
            "title": {"text": "latency (ms)"},
            **ticks([y for trace in data for y in trace["y"] if y]),
        },
        "hovermode": "closest",
    }
    text = (
        "Median (line) and highest latency (dots) in each window of the first run, by the intended send time of the "
        "requests."
    )
    return Chart("Latency over time", text, data, layout)


def profile(receipt: Receipt) -> Chart:
    """Return the parts of an engine's time at each point of its profile, one bar each."""
    points = (receipt.data.get("profile") or {"points": ()})["points"]
    names = [f"{each['texts']} x {each['tokens']:.0f} ({each['matrix_share_percent']:.0f}%)" for each in points]
    data: list[Json] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "marker": {"color": color},
            "y": names,
            "x": [each["parts"].get(part, 0) for each in points],
            "hovertemplate": "%{x:.1f}%<extra>" + part + "</extra>",
        }
        for part, (_, color) in PARTS.items()
    ]
    layout: Json = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "share of the time of all cores (%)"}, "range": [0, 100]},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "height": 480,
    }
    text = "Texts x tokens, in brackets the share of the matrix rate. Python: time between operators, with launches."
    return Chart(f"Where the time of the engine goes: {receipt.name}", text, data, layout)


def _hover(which: str) -> str:
    return which + " %{y:.1f} ms at %{x:.1f} s<extra>%{fullData.name}</extra>"
