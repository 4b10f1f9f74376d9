"""The result of a benchmark in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from inferctl.bench import stats
from inferctl.bench.judge.summary import failures
from inferctl.bench.report import retrieval, search_findings
from inferctl.bench.report.caveats import lines
from inferctl.bench.report.chart import PARTS, unit_of
from inferctl.bench.report.result import Result
from inferctl.bench.report.rows import MeasuredRow, Row
from inferctl.receipts.receipt import JsonObject

HEADINGS = ("config", "runs as", "p50", "p90", "p99", "req/s")
FIGURES = {
    "embed": ("tok/s", "cosine", "recall"),
    "rerank": ("pairs/s", "max diff", "tau"),
    "classify": ("tok/s", "max diff", "labels"),
}
# The last columns: figures of quality, and their formats.
QUALITY = {
    "embed": (("cosine_mean", ".5f"), ("recall_at_10", ".3f")),
    "rerank": (("score_difference", ".2g"), ("kendall", ".3f")),
    "classify": (("score_difference", ".2g"), ("top_1", ".1%")),
    "generate": (("kl_mean", ".4f"), ("top_1", ".1%")),
}
GENERATION_HEADINGS = ("config", "runs as", "TTFT p50", "p90", "p99", "ITL p50", "p99", "tok/s", "KL", "top-1")
# The columns of costs: the key of a row, the title with its unit, what the value is divided by, and a short heading.
COSTS = (
    ("cpu_seconds_per_1000_requests", "CPU time per 1,000 requests (s)", 1, "CPU s"),
    ("joules_per_1000_requests", "energy per 1,000 requests (J)", 1, "J"),
    ("joules_per_million_texts", "energy per 1M {unit} (J)", 1, "J/M {unit}"),
    ("watts", "power (W)", 1, "W"),
    ("gpu_utilisation_percent", "GPU utilization (%)", 1, "GPU %"),
    ("matrix_share_percent", "share of the matrix rate (%)", 1, "limit %"),
    ("usd_per_million_texts", "USD per 1M {unit}", 1, "$/M {unit}"),
    ("server_peak_bytes", "peak memory of all server processes (MiB)", 2**20, "MiB"),
)
_UNKNOWN, _OR_MORE = "-", "+"


def render(result: Result) -> RenderableType:
    """Return the first finding, the reasons why rows are invalid, the tables, and the notes."""
    parts: list[RenderableType] = [Text(result.findings[0], style="bold"), Text("")]
    measured = [row for row in result.rows if isinstance(row, MeasuredRow)]
    if invalid := [row for row in measured if not row.valid]:
        parts += [Text(f"INVALID {row.configuration}: {'; '.join(row.reasons)}", style="bold red") for row in invalid]
        parts.append(Text(""))
    missing = [row for row in result.rows if not isinstance(row, MeasuredRow)]
    blocks: list[RenderableType] = []
    if measured:
        sections = (names, hardware, searches, stages, costs, profiles)
        blocks += [table(measured), *(block for section in sections if (block := section(measured)))]
    if result.retrieval:
        blocks.append(found_documents(result.retrieval))
    if missing:
        blocks.append(without_figures(missing))
    for block in blocks:
        parts += [block, Text("")]
    parts += [Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in notes(result)]
    return Group(*parts)


def table(rows: Sequence[MeasuredRow]) -> Table:
    """Return the table of measured rows. An invalid row is red and has a mark."""
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold", collapse_padding=True)
    task = rows[0].task
    for heading in GENERATION_HEADINGS if task == "generate" else (*HEADINGS, *FIGURES[task]):
        left = heading in ("config", "runs as")
        grid.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows:
        grid.add_row(*cells(row), style="" if row.valid else "red")
    return grid


def name_columns(task: str) -> list[tuple[str, str, str]]:
    """Return the percentiles in the table of names: heading, figure and key."""
    figures = (("TTFT ", "ttft_ms"), ("ITL ", "itl_ms")) if task == "generate" else (("", "latency_ms"),)
    return [(label * (key == "p50") + key, figure, key) for label, figure in figures for key in ("p50", "p99")]


def names(rows: Sequence[MeasuredRow]) -> RenderableType | None:
    """Return the figures of each name that requests use, for a load with names."""
    found = [(row.configuration, row.names) for row in rows if row.names]
    if not found:
        return None
    columns = name_columns(rows[0].task)
    rate = "tok/s" if rows[0].task == "generate" else "req/s"
    grid = _grid("name", *(heading for heading, *_ in columns), rate, "requests", "failed", "429")
    for label, listed in found:
        for number, name in enumerate(listed):
            figures = [_quantile(name[figure][key]) for _, figure, key in columns]
            speed = name["output_tokens_per_s" if "ttft_ms" in name else "requests_per_s"]
            lost = (name["requests"], sum(failures(name).values()), name["rejected"])
            grid.add_row("" if number else label, name["name"], *figures, short(speed), *map(str, lost))
    return _titled("names that requests use, latency in ms", grid)


def hardware(rows: Sequence[MeasuredRow]) -> Table | None:
    """Return the hardware of each row, if it differs or if a running server was measured."""
    machines = [row.hardware or {} for row in rows]
    if not any(row.url for row in rows) and len({machine["name"] for machine in machines}) == 1:
        return None
    grid = Table.grid(padding=(0, 1, 0, 0))
    for row, machine in zip(rows, machines, strict=True):
        key = machine["key"]
        grid.add_row(row.configuration, "on", machine["name"] + (f" ({key})" if key else ""))
    return grid


def searches(rows: Sequence[MeasuredRow]) -> RenderableType | None:
    """Return the highest rates within the SLO, and the constraints that limit them."""
    found = [(row.configuration, row.search) for row in rows if row.search]
    if not found:
        return None
    grid = _grid("max rate", "limit between", "lowest failing", "limited by")
    for name, search in found:
        best, failing = (short(search[key]) for key in ("max_goodput_rps", "first_failing_rps"))
        at_least = ">" if search["verdict"] == "at least" else ""
        limited_by = search["limited_by"] or ("" if search["verdict"] == "found" else search["verdict"])
        grid.add_row(name, at_least + best, _band(search), failing, limited_by)
    return _titled(f"highest rate (req/s) within the SLO: {search_findings.slo_of(found[0][1])}", grid)


def _band(search: JsonObject) -> str:
    """Return the rates between which the highest rate within the SLO lies."""
    if not (band := search.get("band_rps")):
        return _UNKNOWN
    return f"{short(band[0])}-{short(band[1])}" if band[1] else f"{short(band[0])} or more"


def stages(rows: Sequence[MeasuredRow]) -> RenderableType | None:
    """Return the figures of each stage, for a load with several."""
    found = [(row.configuration, row.stages) for row in rows if row.stages]
    if not found:
        return None
    grid = _grid("stage", "time (s)", "load", "p50", "p99", "failed", "429")
    for name, listed in found:
        for number, stage in enumerate(listed):
            level = f"{stage['rate']:g} req/s" if stage["rate"] is not None else f"{stage['users']} users"
            span = f"{stage['start_s']:g} - {stage['end_s']:g}"
            figures = [_quantile(stage["latency_ms"][key]) for key in ("p50", "p99")]
            lost = (sum(failures(stage).values()), stage.get("rejected", 0))
            grid.add_row("" if number else name, stage["name"], span, level, *figures, *map(str, lost))
    return _titled("stages of the load, latency in ms", grid)


def _quantile(found: JsonObject) -> str:
    return f"n<{found['needed']}" if found["value"] is None else short(found["value"])


def cost_columns(rows: Sequence[MeasuredRow], task: str) -> list[tuple[str, str, int, str]]:
    """Return the columns of costs that at least one row has: those of `COSTS`, with the unit of the task."""
    unit = unit_of(task)
    return [
        (key, title.format(unit=unit), divisor, heading.format(unit=unit))
        for key, title, divisor, heading in COSTS
        if any(getattr(row, key) is not None for row in rows)
    ]


def costs(rows: Sequence[MeasuredRow]) -> RenderableType | None:
    """Return what requests cost, and the peak memory. A column is absent if no row has a value for it."""
    columns = cost_columns(rows, rows[0].task)
    if not columns:
        return None
    grid = _grid(*(heading for *_, heading in columns))
    for row in rows:
        values = [(getattr(row, key), divisor) for key, _, divisor, _ in columns]
        grid.add_row(row.configuration, *(short(None if value is None else value / by) for value, by in values))
    titles = [title for _, title, _, heading in columns if heading in ("CPU s", "J", "limit %", "MiB")]
    return _titled("; ".join(titles), grid)


def profiles(rows: Sequence[MeasuredRow]) -> RenderableType | None:
    """Return where the time of each profiled engine goes, in percent of its core-seconds."""
    grids: list[RenderableType] = []
    for row in (row for row in rows if row.profile):
        assert row.profile
        grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for heading in ("texts", "tokens", "limit", *(name for name, _ in PARTS.values())):
            grid.add_column(heading, justify="right")
        for point in row.profile["points"]:
            sizes = str(point["texts"]), f"{point['tokens']:.0f}", f"{point['matrix_share_percent']:.0f}"
            grid.add_row(*sizes, *(f"{point['parts'].get(part, 0):.0f}" for part in PARTS))
        title = f"{row.configuration}: share of the matrix rate (limit), and of the cores' time by part (%)"
        grids.append(_titled(title, grid))
    return Group(*grids) if grids else None


def found_documents(rows: Sequence[retrieval.RetrievalRow]) -> RenderableType:
    """Return nDCG@10 and bytes of each configuration, and of all kinds of vectors of the first one."""
    grid = _grid("vectors", "bytes", "nDCG", "change (interval)", "R@10")
    grid.columns[1].justify = "left"
    for row in rows:
        if row.configuration == rows[0].configuration or not row.is_compact:
            name, *texts = (text for text, _ in retrieval.cells(row)[:6])
            grid.add_row(name if row.first else "", *texts)
    title = "nDCG@10 (points); change: to the first row, or to the config's first vectors"
    return _titled(f"{title}\nOther formats and dimensions are made here, of the server's float32 vectors", grid)


def _titled(title: str, grid: Table) -> Group:
    return Group(Text(title, style="underline"), grid)


def _grid(*headings: str) -> Table:
    """Return a table whose first column is the configuration."""
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold", collapse_padding=True)
    grid.add_column("config", overflow="fold", max_width=24)
    for heading in headings:
        grid.add_column(heading, justify="right", overflow="fold")
    return grid


def without_figures(rows: Sequence[Row]) -> Table:
    """Return the rows that have no figures, with the reason."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    for row in rows:
        grid.add_row(row.configuration, Text(f"{row.outcome}: {row.reason}"), style="dim")
    return grid


def cells(row: MeasuredRow) -> list[str]:
    """Return the nine texts of a row. A percentile that the sample does not support is `n<NEEDED`."""
    name = row.configuration if row.valid else f"{row.configuration} (!)"
    missing = "broken" if row.quality["checked"] else _UNKNOWN
    values = [(getattr(row, key), style) for key, style in QUALITY[row.task]]
    quality = [missing if value is None else f"{value:{style}}" for value, style in values]
    if found := row.generation:
        keys = (("ttft_ms", "p50"), ("ttft_ms", "p90"), ("ttft_ms", "p99"), ("itl_ms", "p50"), ("itl_ms", "p99"))
        latencies = [_quantile(found[figure][key]) for figure, key in keys]
        return [name, runs_as(row.precision), *latencies, short(found["output_tokens_per_s"]), *quality]
    return [
        name,
        runs_as(row.precision),
        _percentile(row.p50_ms, 0.5),
        _percentile(row.p90_ms, 0.9),
        _percentile(row.p99_ms, 0.99) + (_OR_MORE if _is_bound(row) else ""),
        short(row.requests_per_s),
        short(row.pairs_per_s if row.task == "rerank" else row.tokens_per_s),
        *quality,
    ]


def runs_as(precision: JsonObject) -> str:
    """Return the effective precision and its level, such as `bf16 native` and `fp16 emulated`."""
    return " ".join(part for part in (precision.get("effective"), precision.get("level")) if part) or "not stated"


def _is_bound(row: MeasuredRow) -> bool:
    """Return whether the p99 is a lower bound, because its effective sample size is too small."""
    return row.p99_ms is not None and row.p99_effective_n is not None and row.p99_effective_n < stats.needed(0.99)


def _percentile(value: float | None, q: float) -> str:
    return f"n<{stats.needed(q)}" if value is None else short(value)


def short(value: float | None) -> str:
    """Return three digits in at most six columns: `8.42`, `84.2`, `842`, `8,421`, `84.2k`."""
    if value is None:
        return _UNKNOWN
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def notes(result: Result) -> Iterator[str]:
    """Yield the lines below the tables: units and load, further findings, prices, and limitations."""
    measured = [row for row in result.rows if isinstance(row, MeasuredRow)]
    task = measured[0].task if measured else None
    quality = {
        "rerank": "maximum score difference and Kendall's tau (mean) against fp32",
        "classify": "maximum score difference against fp32, and share of texts with the same label",
    }.get(task or "", "cosine (mean) and recall@10 against fp32")
    latency = "latency in ms"
    if task == "generate":
        latency = "TTFT (percentiles over requests) and ITL (over gaps) in ms; tok/s: output tokens/s"
        quality = f"{_tokens(measured)}; KL divergence (mean) and top-1 agreement with fp32"
    if any(_is_bound(row) for row in measured) and task != "generate":
        latency += f" ({_OR_MORE}: or more, since too few samples are independent)"
    if any(cell.startswith("n<") for row in measured for cell in cells(row)):
        latency += "; n<N: fewer than the N responses that this percentile needs"
    yield from received(measured)
    yield f"{latency}; {quality}"
    if any(row.mode == "open" for row in measured):
        sends = ", ".join(
            f"{row.configuration} {row.late:,} late and {row.dropped:,} dropped of {row.requests:,}" for row in measured
        )
        yield f"requests sent over 1 ms late, and requests dropped: {sends}"
    yield from result.findings[1:]
    yield from prices(measured)
    yield from limits(measured)
    yield from (
        f"{caveat.label}: {caveat.text}" for caveat in result.caveats if caveat.kind not in ("invalid", "absent")
    )


def _tokens(rows: Sequence[MeasuredRow]) -> str:
    """Return the measured tokens of prompts and outputs."""
    means = [
        [short(row.generation[f"{side}_tokens_per_request"]) for side in ("input", "output")]
        for row in rows
        if row.generation
    ]
    different = dict.fromkeys(f"{sent} tokens per prompt and {received} per output" for sent, received in means)
    return f"mean: {', '.join(different)}, as the server counts"


def received(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return each load that rows received, with their names if they received different ones."""
    return lines((row.received, row.configuration) for row in rows)


def limits(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return the share of the limit that each server used, with the limit and where it is from."""
    known = [(row, row.matrix_rate) for row in rows if row.matrix_rate and row.matrix_share_percent is not None]
    return [
        f"{row.configuration}: {row.precision['effective']}, {short(row.matrix_share_percent)}% of "
        + ("this machine's matrix rate" if rate["source"] == "measured" else "the GPU's peak in the catalog")
        + f" ({rate['flops_per_s'] / 1e12:.3g} TFLOP/s)"
        for row, rate in known
    ]


def prices(rows: Sequence[MeasuredRow]) -> Iterator[str]:
    """Yield each price that a cost is based on, with its source and date."""
    known = [row.price for row in rows if row.price]
    for price in {(price["provider"], price["instance"]): price for price in known}.values():
        yield (
            f"price: {price['provider']} {price['instance']} ${price['usd_per_hour']:g}/h on {price['date']} "
            f"({price['source']}), at the measured load"
        )
