"""The result in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

HEADINGS = ("config", "runs as", "p50", "p90", "p99", "req/s", "tok/s", "cosine", "recall")
_UNKNOWN = "-"


def render(result: Mapping[str, Any]) -> RenderableType:
    """Finding, reasons against invalid rows, table, cautions; `result` is what `inferctl bench --json` prints."""
    parts: list[RenderableType] = [Text(result["finding"], style="bold"), Text("")]
    if bad := [row for row in result["rows"] if row["receipt"] and not row["valid"]]:
        parts += [Text(f"INVALID {row['configuration']}: {'; '.join(row['reasons'])}", style="bold red") for row in bad]
        parts.append(Text(""))
    rows = result["rows"]
    if measured := [row for row in rows if row["receipt"]]:
        parts.append(table(measured))
        if machines := hardware(measured):
            parts += [Text(""), machines]
    if absent := [row for row in rows if not row["receipt"]]:
        parts.append(absences(absent))
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
    if load["mode"] == "closed":
        how = f"closed loop, {load['users']} users"
    else:
        how = f"open loop, {load['rate']:g} requests/s offered ({load['arrivals']})"
    runs = f"{result['repeats']} runs each" if result["repeats"] > 1 else "one run each"
    yield f"latency in ms; {how}, {load['duration_s']:g} s, {runs}; cosine (mean) and recall@10 against fp32"
    if load["mode"] == "open":
        sends = ", ".join(
            f"{row['configuration']} {row['late']:,} late and {row['dropped']:,} dropped of {row['requests']:,}"
            for row in result["rows"]
            if row["receipt"]
        )
        yield f"sends over 1 ms late, and sends dropped: {sends or 'none'}"
    yield from result["findings"][1:]
    yield from (
        f"{caveat['kind']}: {caveat['text']}"
        for caveat in result["caveats"]
        if caveat["kind"] not in ("invalid", "absent")
    )
