"""The report: one HTML file that needs nothing else, no network either. Every number in it comes out of the receipts."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inferctl import assets, outputs
from inferctl.bench.receipt import Receipt
from inferctl.bench.report import charts, terminal

# plotly.js with the trace types that the charts use (scatter, bar), gzipped. CONTRIBUTING.md says how to update it.
PLOTLY = "plotly-basic.min.js.gz"


def write(path: Path, result: Mapping[str, Any], receipts: Sequence[Receipt]) -> Path:
    """Write the report of `result` (what `inferctl bench --json` prints) and its receipts. Raises `NotReadyError`."""
    outputs.write(path, render(result, receipts), "--report")
    return path


def render(result: Mapping[str, Any], receipts: Sequence[Receipt]) -> str:
    """The page as text."""
    import jinja2

    loader = jinja2.FileSystemLoader(assets.root() / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = charts.all_charts(receipts, result["rows"])
    remote = any(one.data["configuration"]["url"] for one in receipts)
    machines = list(dict.fromkeys(one.data["hardware"]["name"] for one in receipts))
    return environment.get_template("report.html.j2").render(
        result=result,
        rows=[
            {**row, "runs_as": terminal.runs_as(row["precision"])}
            for row in result["rows"]
            if row["outcome"] != "estimated"
        ],
        estimated=[
            {**row, "runs_as": terminal.runs_as(row["precision"])}
            for row in result["rows"]
            if row["outcome"] == "estimated"
        ],
        costs=[row for row in result["rows"] if row["receipt"]],
        sent=terminal.loop(result["load"]),
        prices=list(terminal.prices(result["rows"])),
        unknown=unknown(receipts),
        honesty=honesty(result, receipts),
        machines=machines,
        machines_differ=remote or len(machines) > 1,
        remote=remote,
        charts=drawn,
        colours=charts.colours(receipts),
        # A name from the command line must not be able to end the script element.
        figures=json.dumps({name: figure for name, (_, _, figure) in drawn.items()}).replace("<", "\\u003c"),
        plotly=base64.b64encode((assets.root() / "templates" / PLOTLY).read_bytes()).decode(),
        receipts=[one.data for one in receipts],
        summaries={one.name: one.data["summary"] for one in receipts},
        seals={one.name: one.data["seal"] for one in receipts},
    )


def unknown(receipts: Sequence[Receipt]) -> list[str]:
    """Why energy or money is not known, each reason once with those that it is true of."""
    said: dict[tuple[str, str], list[str]] = {}
    for one in receipts:
        for what, why in ((one.data.get("efficiency") or {}).get("unknown") or {}).items():
            said.setdefault((what, why), []).append(one.name)
    words = {"joules": "Energy", "cost": "Cost"}
    return [f"{words[what]} not known for {', '.join(names)}: {why}" for (what, why), names in said.items()]


def honesty(result: Mapping[str, Any], receipts: Sequence[Receipt]) -> list[tuple[str, str]]:
    """(kind, sentence): what to know before reading a number, the caveats of the result and how the measurement was set up."""
    notes = [(caveat["kind"], caveat["text"]) for caveat in result["caveats"]]
    if result["load"]["mode"] == "closed":
        notes.append(
            (
                "setup",
                "Closed loop: a slow server is asked less, so its latency under a fixed rate would be worse than shown.",
            )
        )
    if any(one.data["configuration"]["this_machine"] for one in receipts):
        notes.append(
            (
                "setup",
                "Load generator and server shared this machine's cores: compare the rows with each other, not with other machines.",
            )
        )
    if result["load"]["inputs"] == "unique":
        notes.append(
            (
                "setup",
                "Every request carries a number of its own (about four tokens), so that no cache answers for the model.",
            )
        )
    runs = "One run each" if result["repeats"] == 1 else f"{result['repeats']} runs each"
    # From five runs on those of requests/s are over runs; before, over windows, and nothing widens them.
    within = (
        "Intervals of latencies are within runs,"
        if result["repeats"] >= 5
        else "Intervals are within runs; those of latencies are"
    )
    notes.append(
        (
            "setup",
            f"{runs}. {within} widened by how much answers in a row depend on each other: how runs differ is not in them. "
            "`inferctl compare` judges over runs, and needs at least five.",
        )
    )
    return notes
