"""The result in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

HEADINGS = ("config", "runs as", "p50", "p90", "p99", "req/s", "tok/s", "cosine", "recall")
_UNKNOWN = "-"


def render(result: Mapping[str, Any]) -> RenderableType:
    """Finding, reasons against invalid rows, table, cautions; `result` is what `inferctl bench --json` prints."""
    parts: list[RenderableType] = [Text(result["finding"], style="bold"), Text("")]
    if bad := [row for row in result["rows"] if row["receipt"] and not row["valid"]]:
        parts += [Text(f"INVALID {row['configuration']}: {'; '.join(row['reasons'])}", style="bold red") for row in bad]
        parts.append(Text(""))
    rows = result["rows"]
    measured = [row for row in rows if row["receipt"]]
    estimated = [row for row in rows if row["outcome"] == "estimated"]
    absent = [row for row in rows if row not in measured and row not in estimated]
    if measured:
        parts.append(table(measured))
        if machines := hardware(measured):
            parts += [Text(""), machines]
        blocks = (searched(measured), beside(measured), stages(measured), costs(measured))
        parts += [part for block in blocks if block for part in (Text(""), block)]
    if estimated:
        parts += [Text(""), estimates(estimated)] if measured else [estimates(estimated)]
    if absent:
        parts += [Text(""), absences(absent)] if measured or estimated else [absences(absent)]
    parts.append(Text(""))
    parts += [Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in notes(result)]
    return Group(*parts)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with figures; one that is invalid is red and marked."""
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold", collapse_padding=True)
    for heading in HEADINGS:
        left = heading in ("config", "runs as")
        grid.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows:
        grid.add_row(*cells(row), style="" if row["valid"] else "red")
    return grid


def hardware(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """What each row ran on, when rows differ in that or when servers elsewhere were measured."""
    if not any(row["url"] for row in rows) and len({row["hardware"]["name"] for row in rows}) == 1:
        return None
    grid = Table.grid(padding=(0, 1, 0, 0))
    for row in rows:
        key = row["hardware"]["key"]
        grid.add_row(row["configuration"], "on", row["hardware"]["name"] + (f" ({key})" if key else ""))
    return grid


def searched(rows: Sequence[Row]) -> RenderableType | None:
    """The highest rate within the SLO, and what broke above it."""
    found = [(row, row["search"]) for row in rows if row.get("search")]
    if not found:
        return None
    slo = found[0][1]["slo_p99_ms"]
    grid = _grid("max rate", "band", "fails at", "limited by", "knee", "saturation")
    for row, search in found:
        known = [short(search[key]) for key in ("max_goodput_rps", "first_failing_rps", "knee_rps", "saturation_rps")]
        least = ">" if search["verdict"] == "at least" else ""
        by = search["limited_by"] or ("" if search["verdict"] == "found" else search["verdict"])
        grid.add_row(row["configuration"], least + known[0], _band(search), known[1], by, *known[2:])
    return _titled(f"highest rate (requests/s) with p99 within {slo:g} ms", grid)


def _band(search: Mapping[str, Any]) -> str:
    """Return the rates between which the highest rate within the SLO lies."""
    if not (band := search.get("band_rps")):
        return _UNKNOWN
    return f"{short(band[0])}-{short(band[1])}" if band[1] else f"{short(band[0])} or more"


def beside(rows: Sequence[Row]) -> RenderableType | None:
    """Latency without and with busy neighbours."""
    found = [(row, row["neighbours"]) for row in rows if row.get("neighbours")]
    if not found:
        return None
    count = found[0][1]["count"]
    whom = "1 busy neighbour" if count == 1 else f"{count} busy neighbours"
    grid = _grid("", "alone", "beside", "factor", "95 % interval")
    for row, one in found:
        name = row["configuration"]
        for key, figures in one["percentiles"].items():
            if figures["factor"] is None:
                grid.add_row(name, key, f"n<{figures['needed']}")
            else:
                ends = f"{figures['low']:.2f} - {figures['high']:.2f}"
                cells = [short(figures[which]) for which in ("without_ms", "with_ms")]
                grid.add_row(name, key, *cells, f"{figures['factor']:.2f}x", ends)
            name = ""
        rates = one["requests_per_s"]
        factor = f"{rates['with'] / rates['without']:.2f}x" if rates["without"] else _UNKNOWN
        grid.add_row("", "req/s", short(rates["without"]), short(rates["with"]), factor)
        if others := one["neighbour_requests_per_s"]:
            each = " to ".join(dict.fromkeys((short(others["min"]), short(others["max"]))))
            grid.add_row("", "theirs", "idle", each)
    return _titled(f"beside {whom}, latency in ms", grid)


def stages(rows: Sequence[Row]) -> RenderableType | None:
    """Each stage of a load that has several."""
    found = [row for row in rows if row.get("stages")]
    if not found:
        return None
    grid = _grid("stage", "seconds", "load", "p50", "p99", "failed")
    for row in found:
        name = row["configuration"]
        for one in row["stages"]:
            level = f"{one['rate']:g} req/s" if one["rate"] is not None else f"{one['users']} users"
            span = f"{one['start_s']:g} - {one['end_s']:g}"
            figures = [_quantile(one["latency_ms"][key]) for key in ("p50", "p99")]
            grid.add_row(name, one["name"], span, level, *figures, str(sum(one["errors"].values())))
            name = ""
    return _titled("by stage of the load", grid)


def _quantile(found: Mapping[str, Any]) -> str:
    return f"n<{found['needed']}" if found["value"] is None else short(found["value"])


_COSTS = (
    ("CPU s", "cpu_seconds_per_1000_requests"),
    ("J", "joules_per_1000_requests"),
    ("J/M texts", "joules_per_million_texts"),
    ("$/M texts", "usd_per_million_texts"),
    ("GPU %", "gpu_utilisation_percent"),
    ("W", "watts"),
)


def costs(rows: Sequence[Row]) -> RenderableType | None:
    """What 1,000 requests and a million texts cost: only the columns of which something is known."""
    columns = [(title, key) for title, key in _COSTS if any(row.get(key) is not None for row in rows)]
    if not columns:
        return None
    grid = _grid(*(title for title, _ in columns))
    for row in rows:
        grid.add_row(row["configuration"], *(short(row.get(key)) for _, key in columns))
    return _titled("cost of 1,000 requests", grid)


def estimates(rows: Sequence[Row]) -> RenderableType:
    """Estimated figures in a table of their own, each above its error band or with its bound."""
    grid = _grid("on", "p50", "p90", "p99", "req/s")
    for row in rows:
        cells = [_estimated(row["estimate"], key) for key in ("p50_ms", "p90_ms", "p99_ms", "requests_per_s")]
        grid.add_row(row["configuration"], row["hardware"]["key"], *cells, style="italic")
    return _titled("ESTIMATED, not measured (error bands, or bounds)", grid)


def _estimated(figures: Mapping[str, Any], key: str) -> str:
    """A figure above its band, or a bound. The rate that an open loop offers is given, not estimated."""
    found = (figures.get("ranges") or {}).get(key)
    if found and found.get("bound"):
        return f"{found['bound']}\n{short(found['high'] if found['low'] is None else found['low'])}"
    if (value := figures.get(key)) is None:
        return _UNKNOWN
    if not found:
        return f"~{short(value)}"
    if key == "requests_per_s" and found["low"] == found["high"]:
        return f"{short(value)}\noffered"
    ends = f"over {short(found['low'])}" if found["high"] is None else f"{short(found['low'])}-{short(found['high'])}"
    return f"~{short(value)}\n{ends}"


def _titled(title: str, grid: Table) -> Group:
    return Group(Text(title, style="underline"), grid)


def _grid(*headings: str) -> Table:
    """A table with the configuration in its first column."""
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold", collapse_padding=True)
    grid.add_column("config", overflow="fold", max_width=24)
    for heading in headings:
        grid.add_column(heading, justify="right", overflow="fold")
    return grid


def absences(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows without figures: what could not run, and the parts that this machine is not. Nothing is made up for them."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    for row in rows:
        grid.add_row(row["configuration"], Text(f"{row['outcome']}: {row['reason']}"), style="dim")
    return grid


def cells(row: Mapping[str, Any]) -> list[str]:
    """The nine texts of a row; a percentile that the sample does not support is `n<NEEDED`."""
    return [
        row["configuration"] if row["valid"] else f"{row['configuration']} (!)",
        runs_as(row["precision"]),
        *(milliseconds(row, key) for key in ("p50", "p90", "p99")),
        short(row["requests_per_s"]),
        short(row["tokens_per_s"]),
        _without_number(row) if row["cosine_mean"] is None else f"{row['cosine_mean']:.5f}",
        _without_number(row) if row["recall_at_10"] is None else f"{row['recall_at_10']:.3f}",
    ]


def _without_number(row: Mapping[str, Any]) -> str:
    return "broken" if row["quality"]["checked"] else _UNKNOWN


def runs_as(precision: Mapping[str, Any]) -> str:
    """The precision that really ran and how: `bf16 native`, `fp16 emulated`."""
    return " ".join(part for part in (precision.get("effective"), precision.get("level")) if part) or "not stated"


def milliseconds(row: Mapping[str, Any], key: str) -> str:
    value = row[f"{key}_ms"]
    return f"n<{ {'p50': 6, 'p90': 36, 'p99': 368}[key] }" if value is None else short(value)


def short(value: float | None) -> str:
    """Three digits that fit six columns: `8.42`, `84.2`, `842`, `8,421`, `84.2k`."""
    if value is None:
        return _UNKNOWN
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines under the table: units and load, what else was found, what to know before using the numbers."""
    load = result["load"]
    searched = any(row.get("search") for row in result["rows"])
    how = "the open loop that confirmed the highest rate of each" if searched else loop(load)
    runs = f"{result['repeats']} runs each" if result["repeats"] > 1 else "one run each"
    yield f"latency in ms; {how}, {load['duration_s']:g} s, {runs}; cosine (mean) and recall@10 against fp32"
    if load["mode"] == "open" or searched:
        sends = ", ".join(
            f"{row['configuration']} {row['late']:,} late and {row['dropped']:,} dropped of {row['requests']:,}"
            for row in result["rows"]
            if row["receipt"]
        )
        yield f"sends over 1 ms late, and sends dropped: {sends or 'none'}"
    yield from result["findings"][1:]
    yield from prices(result["rows"])
    yield from (
        f"{caveat['kind']}: {caveat['text']}"
        for caveat in result["caveats"]
        if caveat["kind"] not in ("invalid", "absent")
    )


def loop(load: Mapping[str, Any]) -> str:
    """What was sent, in words."""
    if load["mode"] == "closed":
        how = f"closed loop, {load['users']} users"
    elif load.get("trace"):
        how = f"open loop, times of the trace {Path(load['trace']).name}"
    elif load.get("capacity_percent"):
        share = f"{load['capacity_percent']:g} % of the capacity of the first target"
        how = f"open loop at {share} ({load['arrivals']}), after a closed loop of {load['users']} users"
    elif load.get("rate") is None:
        how = f"open loop ({load['arrivals']})"
    else:
        how = f"open loop, {load['rate']:g} requests/s offered ({load['arrivals']})"
    if spike := load.get("spike"):
        how += f", {spike['times']:g} times that from {spike['at_s']:g} s for {spike['duration_s']:g} s"
    return f"{how}, {len(load['stages'])} stages" if load.get("stages") else how


def prices(rows: Sequence[Row]) -> Iterator[str]:
    """Each price that a cost was computed with, with its source and date."""
    known = [row["price"] for row in rows if row.get("price")]
    for one in {(price["provider"], price["instance"]): price for price in known}.values():
        yield (
            f"price: {one['provider']} {one['instance']} ${one['usd_per_hour']:g}/h on {one['date']} ({one['source']}), "
            "at the load measured"
        )
