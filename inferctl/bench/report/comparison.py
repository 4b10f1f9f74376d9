"""The verdict in a terminal of 80 columns, and as Markdown for the summary page of a CI job."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from inferctl.bench.judge import compare, verdict

HEADINGS = ("", "old", "new", "change", "interval", "worst case", "verdict")
_STYLES = {"regression": "bold red", "not enough evidence": "yellow", "improvement": "green", "invalid": "bold red"}
_NAMES = {"requests_per_s": "requests/s", "recall_at_10": "recall@10", "cosine_p1": "cosine p1"}


def render(result: Mapping[str, Any]) -> RenderableType:
    """The verdict in a sentence, a table for each configuration, what to know beside it."""
    parts: list[RenderableType] = [Text(sentence(result), style=_STYLES.get(result["outcome"], "bold"))]
    for part in result["configurations"]:
        parts += [Text(""), Text(heading(part), style="bold")]
        parts += [Padding(Text(f"INVALID: {reason}", style="bold red"), (0, 0, 0, 1)) for reason in part["reasons"]]
        if part["metrics"]:
            parts.append(_table(part["metrics"]))
        parts += [Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in remarks(part)]
    parts += [Text(""), *(Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in footnotes(result))]
    return Group(*parts)


def plain(result: Mapping[str, Any]) -> str:
    """`render` as text without colours, 80 columns wide."""
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None, highlight=False).print(render(result))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def markdown(result: Mapping[str, Any]) -> str:
    """The same for a job's summary page: one table for each configuration."""
    lines = [f"### {_escaped(sentence(result))}", ""]
    for part in result["configurations"]:
        lines += [f"**{_escaped(heading(part))}**", ""]
        lines += [f"- **invalid:** {_escaped(reason)}" for reason in part["reasons"]]
        if part["metrics"]:
            lines += ["| " + " | ".join(HEADINGS) + " |", "|---|--:|--:|--:|:-:|--:|---|"]
            lines += ["| " + " | ".join(_marked(metric)) + " |" for metric in part["metrics"]]
        lines += ["", *(f"- {_escaped(note)}" for note in remarks(part)), ""]
    if below := [f"{_escaped(note)}." for note in footnotes(result)]:
        lines.append(f"<sub>{' '.join(below)}</sub>")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def sentence(result: Mapping[str, Any]) -> str:
    """The verdict in words, with its largest figure."""
    outcome = result["outcome"]
    if outcome == "invalid":
        return "Invalid: these cannot be compared"
    found = [metric for part in result["configurations"] for metric in part["metrics"] if metric["outcome"] == outcome]
    said = ", ".join(_figure(metric) for metric in found)
    if outcome == "regression":
        return f"Regression: {said}"
    if outcome == "not enough evidence":
        return f"Not enough evidence ({', '.join(dict.fromkeys(_name(metric) for metric in found))}): {compare.advice(result)}"
    return f"No regression; better: {said}" if outcome == "improvement" else "No regression"


def heading(part: Mapping[str, Any]) -> str:
    """Which configuration, how often each side was measured, and how they belong together."""
    if part["new"] is None:
        return str(part["name"])
    old, new = part["old"]["repeats"], part["new"]["repeats"]
    how = f"{old} repeats each" if old == new else f"{old} and {new} repeats"
    order = (
        ""
        if part["interleaved"] is None or max(old, new) < verdict.FEWEST_RUNS
        else ", interleaved"
        if part["interleaved"]
        else ", measured apart"
    )
    return f"{part['name']} ({how}{order})"


def cells(metric: Mapping[str, Any]) -> list[str]:
    """The seven texts of a row."""
    return [
        _name(metric) + (f" {metric['unit']}" if metric["unit"] in ("ms", "MiB", "%") else ""),
        _number(metric, metric["old"]),
        _number(metric, metric["new"]),
        _change(metric),
        _interval(metric),
        _at_most(metric),
        _word(metric),
    ]


def remarks(part: Mapping[str, Any]) -> Iterator[str]:
    """What stands under a table: why something is not settled, then notes and cautions."""
    for metric in part["metrics"]:
        if metric["reason"]:
            yield f"{_name(metric)}: {metric['reason']}"
    yield from part["notes"]


def footnotes(result: Mapping[str, Any]) -> Iterator[str]:
    """What the columns mean."""
    yield from result["notes"]
    judged = [metric for part in result["configurations"] for metric in part["metrics"] if metric.get("interval")]
    if not judged:
        return
    limits = ", ".join(
        f"{_name(metric)} {100 * metric['threshold']:g} %"
        + (f" and {metric['floor']:g} {metric['unit']}" if metric["floor"] else "")
        for metric in {metric["name"]: metric for metric in judged}.values()
    )
    yield f"a regression exceeds {limits}, and its interval excludes no change"
    family = result["family"]
    which = f"all {family} figures together" if family > 1 else "the figure"
    confidence = f"{100 * verdict.CONFIDENCE:.0f} %"
    yield f"interval: {confidence} for {which}, over runs; worst case: one-sided bound of {confidence}"


def _table(metrics: Sequence[Mapping[str, Any]]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold", collapse_padding=True)
    for title in HEADINGS:
        left = title in ("", "verdict")
        grid.add_column(title, justify="left" if left else "right", no_wrap=title != "verdict", overflow="fold")
    for metric in metrics:
        *figures, word = cells(metric)
        grid.add_row(*figures, Text(word, style=_STYLES.get(metric["outcome"], "")))
    return grid


def _marked(metric: Mapping[str, Any]) -> list[str]:
    *figures, word = (_escaped(text) for text in cells(metric))
    return [*figures, f"**{word}**" if metric["outcome"] in ("regression", "not enough evidence") else word]


def _name(metric: Mapping[str, Any]) -> str:
    return str(_NAMES.get(metric["name"], metric["name"]))


def _figure(metric: Mapping[str, Any]) -> str:
    if metric.get("difference") is not None:
        return f"{_name(metric)} {metric['difference']:+.2f} percentage points"
    if metric.get("change") is None:
        return f"{_name(metric)} {metric['reason']}".rstrip()
    by = f" ({metric['new'] - metric['old']:+.3g} ms)" if metric["unit"] == "ms" else ""
    return f"{_name(metric)} {_percent(metric['change'])}{by}"


def _word(metric: Mapping[str, Any]) -> str:
    return {
        "no regression": "ok",
        "improvement": "better",
        "not enough evidence": "inconclusive",
        "not compared": "-",
    }.get(metric["outcome"], "WORSE") + (
        f": needs {metric['repeats_needed']} repeats" if metric.get("repeats_needed") else ""
    )


def _interval(metric: Mapping[str, Any]) -> str:
    if metric.get("difference_interval"):
        return " to ".join(f"{edge:+.2f}" for edge in metric["difference_interval"])
    return "" if not metric.get("interval") else " to ".join(_percent(edge) for edge in metric["interval"])


def _at_most(metric: Mapping[str, Any]) -> str:
    if metric.get("difference_at_most") is not None:
        return f"≤{max(0.0, metric['difference_at_most']):.2f}"
    return "" if metric.get("worse_at_most") is None else f"≤{100 * max(0.0, metric['worse_at_most']):.1f} %"


def _change(metric: Mapping[str, Any]) -> str:
    if metric.get("difference") is not None:
        return f"{metric['difference']:+.2f}"
    if metric.get("change") is not None:
        return _percent(metric["change"])
    old, new = metric["old"], metric["new"]
    # Quality: a difference, not a share.
    return f"{new - old:+.4f}" if "drop_allowed" in metric and old is not None else ""


def _number(metric: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "-"
    if "drop_allowed" in metric:
        return f"{value:.4f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %" if abs(share) < 1 else f"{100 * share:+.0f} %"


def _escaped(text: str) -> str:
    """Names and reasons come from servers and files: they must not become markup."""
    for mark in ("\\", "|", "*", "_", "`", "[", "]"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace("\n", " ")
