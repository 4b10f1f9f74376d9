"""The HTML report: one file that needs no other file and no network. All its numbers come from the receipts."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path

from inferctl.bench.judge import summary, verdict
from inferctl.bench.report import charts, retrieval, search_findings, terminal
from inferctl.bench.report.caveats import Caveat, by_text, lines
from inferctl.bench.report.result import Result
from inferctl.bench.report.rows import MeasuredRow
from inferctl.core import assets, outputs
from inferctl.receipts.receipt import Receipt

# plotly.js with the trace types of the charts (scatter, bar), gzipped. docs/release.md says how to update it.
PLOTLY = "plotly-basic.min.js.gz"
# The percentiles in the table of results: the key of the summary, and the percentile.
COLUMNS = (("latency_ms", "p50"), ("latency_ms", "p90"), ("latency_ms", "p99"))
GENERATION_COLUMNS = (
    *(("ttft_ms", name) for name in ("p50", "p90", "p99")),
    *(("itl_ms", "p50"), ("itl_ms", "p99"), ("tpot_ms", "p50")),
)


def write(path: Path, result: Result, receipts: Sequence[Receipt]) -> Path:
    """Write the report of a result and its receipts. Raises `NotReadyError` if the file cannot be written."""
    outputs.write(path, render(result, receipts), "--report")
    return path


def milliseconds(value: float) -> str:
    """Return the text of a latency in a table: two decimals below 100 ms, one below 1,000 ms, none above."""
    decimals = 0 if round(value, 1) >= 1000 else 1 if round(value, 2) >= 100 else 2
    return f"{value:,.{decimals}f}"


def code(text: str) -> str:
    """Return text as HTML in which parts in backticks are code."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def render(result: Result, receipts: Sequence[Receipt]) -> str:
    """Return the page."""
    drawn = charts.all_charts(receipts)
    document = result.as_dict()
    rows = [{**row, "runs_as": terminal.runs_as(row["precision"])} for row in document["rows"]]
    measured = [row for row in result.rows if isinstance(row, MeasuredRow)]
    running = any(receipt.data["configuration"]["url"] for receipt in receipts)
    machines = list(dict.fromkeys(receipt.data["hardware"]["name"] for receipt in receipts))
    figures = {name: {"data": chart.data, "layout": chart.layout} for name, chart in drawn.items()}
    return assets.page(
        "report.html.j2",
        {"milliseconds": milliseconds, "code": code},
        result=document,
        rows=rows,
        retrieval_headings=retrieval.HEADINGS,
        retrieval_rows=[retrieval.cells(row) for row in result.retrieval],
        costs=[row for row in rows if row["receipt"]],
        cost_columns=terminal.cost_columns(measured, result.load.task),
        sent=terminal.received(measured),
        requests=lines((_requests(one), one.name) for one in receipts),
        models=lines((_model(one), one.name) for one in receipts),
        opened=any(row.mode == "open" for row in measured),
        noisy=any(row.noise for row in measured),
        prices=[*terminal.prices(measured), *terminal.limits(measured)],
        unknown=unknown_costs(receipts),
        limitations=[(note.kind, note.label, note.text) for note in limitations(result, receipts)],
        machines=machines,
        machines_differ=running or len(machines) > 1,
        remote=running,
        charts={name: (chart.title, chart.text, figures[name]) for name, chart in drawn.items()},
        colors=charts.colors_of(receipts),
        # A configuration name must not be able to end the script element.
        figures=json.dumps(figures).replace("<", "\\u003c"),
        plotly=base64.b64encode((assets.root() / "templates" / PLOTLY).read_bytes()).decode(),
        receipts=[receipt.data for receipt in receipts],
        percentile_columns=GENERATION_COLUMNS if result.load.task == "generate" else COLUMNS,
        name_columns=terminal.name_columns(result.load.task),
        slo_of=search_findings.slo_of,
        failures=summary.failures,
        summaries={receipt.name: receipt.data["summary"] for receipt in receipts},
        seals={receipt.name: receipt.data["seal"] for receipt in receipts},
    )


def unknown_costs(receipts: Sequence[Receipt]) -> list[str]:
    """Return why energy or cost is unknown: each reason once, with its configurations."""
    unknown = [((receipt.data.get("efficiency") or {}).get("unknown") or {}, receipt.name) for receipt in receipts]
    return [
        f"{label} is unknown for {names}: {reason}"
        for key, label in (("cost", "Cost"), ("joules", "Energy"))
        for reason, names in by_text((found.get(key), name) for found, name in unknown)
        if reason
    ]


def limitations(result: Result, receipts: Sequence[Receipt]) -> list[Caveat]:
    """Return what a reader must know before using the numbers: caveats of the result, and properties of the setup."""
    texts = list[str]()
    if any(isinstance(row, MeasuredRow) and row.mode == "closed" for row in result.rows):
        texts.append("Closed loop: a slow server receives fewer requests. Its latency at a fixed rate would be higher.")
    if any(receipt.data["configuration"]["this_machine"] for receipt in receipts):
        shared = "Load generator and server share the cores of this machine"
        texts.append(f"{shared}: compare the rows with each other, not with other machines.")
    fewest = min((len(receipt.runs) for receipt in receipts), default=1)
    runs = "One run" if fewest == 1 else f"{fewest} runs"
    do = "include" if fewest >= verdict.MIN_RUNS else "do not include"
    which = "intervals" if fewest == 1 else "intervals of latencies"
    text = f"{runs} each: {which} {do} differences between runs{' if these are large' if do == 'include' else ''}."
    if fewest < verdict.RECOMMENDED_REPEATS:
        text += f" `inferctl compare` needs {verdict.MIN_RUNS} repeats; {verdict.RECOMMENDED_REPEATS} are recommended."
    return [*result.caveats, *(Caveat("setup", each) for each in (*texts, text))]


def _requests(receipt: Receipt) -> str:
    """Return the texts that a configuration received."""
    work = receipt.data["workload"]
    text = f"corpus {work['corpus']}, seed {work['seed']}, schedule `{str(work['sha256'])[:16]}…`"
    if work["inputs"] == "unique":
        what = {"rerank": "query", "generate": "prompt"}.get(receipt.task, "input")
        text += f"; each {what} starts with two numbers (about four tokens), so that no cache can respond"
    return text


def _model(receipt: Receipt) -> str:
    found = receipt.data["model"]
    digest = f", sha256 `{found['sha256'][:16]}…`" if found.get("sha256") else ""
    return f"{found['source'] or 'not stated'}{digest}"
