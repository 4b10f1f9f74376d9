"""Show the result of `inferctl compare` in a terminal of 80 columns, and as Markdown for the page of a CI job."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from inferctl.bench.judge import verdict
from inferctl.bench.judge.compare_result import CompareResult, MetricResult, PairResult, problem

HEADINGS = ("", "old", "new", "change", "interval", "worst case", "verdict")
_STYLES = {"regression": "bold red", "not enough evidence": "yellow", "improvement": "green", "invalid": "bold red"}
_LABELS = {
    "requests_per_s": "requests/s",
    "recall_at_10": "recall@10",
    "ndcg_at_10": "nDCG@10",
    "cosine_p1": "cosine p1",
    "kendall": "Kendall's tau",
    "score_difference": "score difference",
    "kl": "KL divergence",
    "top_1": "top-1 agreement",
}


def render(result: CompareResult) -> RenderableType:
    """Return the result in one sentence, a table for each configuration, and notes."""
    parts: list[RenderableType] = [Text(sentence(result), style=_STYLES.get(result.outcome, "bold"))]
    for pair in result.pairs:
        parts += [Text(""), Text(heading(pair), style="bold")]
        parts += [Padding(Text(f"INVALID: {reason}", style="bold red"), (0, 0, 0, 1)) for reason in pair.reasons]
        if pair.metrics:
            parts.append(_table(pair.metrics))
        parts += [Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in remarks(pair)]
    parts += [Text(""), *(Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in footnotes(result))]
    return Group(*parts)


def plain(result: CompareResult) -> str:
    """Return `render` and the hint as text without colors, 80 columns wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=80, color_system=None, highlight=False)
    console.print(render(result))
    if hint := _hint(result):
        console.print(Text(f"\nhint: {hint}"))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def markdown(result: CompareResult) -> str:
    """Return the content of `render` as Markdown."""
    lines = [f"### {_escaped(sentence(result))}", ""]
    if hint := _hint(result):
        lines += [f"Hint: {_escaped(hint)}", ""]
    for pair in result.pairs:
        lines += [f"**{_escaped(heading(pair))}**", ""]
        lines += [f"- **invalid:** {_escaped(reason)}" for reason in pair.reasons]
        if pair.metrics:
            lines += ["| " + " | ".join(HEADINGS) + " |", "|---|--:|--:|--:|:-:|--:|---|"]
            lines += ["| " + " | ".join(_markdown_cells(metric)) + " |" for metric in pair.metrics]
        lines += ["", *(f"- {_escaped(note)}" for note in remarks(pair)), ""]
    if notes := [f"{_escaped(note)}." for note in footnotes(result)]:
        lines.append(f"<sub>{' '.join(notes)}</sub>")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def sentence(result: CompareResult) -> str:
    """Return the outcome in one sentence, with the metrics that decide it."""
    if result.outcome == "invalid":
        return "Invalid: these receipts cannot be compared"
    deciding = list(result.metrics_with(result.outcome))
    changes = ", ".join(_change_in_words(metric) for metric in deciding)
    if result.outcome == "regression":
        return f"Regression: {changes}"
    if result.outcome == "not enough evidence":
        names = ", ".join(dict.fromkeys(_label(metric) for metric in deciding))
        return f"Not enough evidence: {names}"
    return f"No regression; improvement: {changes}" if result.outcome == "improvement" else "No regression"


def _hint(result: CompareResult) -> str:
    """Return what to do if there is no verdict, for files. On a terminal, the error message on stderr says it."""
    found = problem(result) if result.outcome in ("invalid", "not enough evidence") else None
    return (found.hint or "") if found else ""


def heading(pair: PairResult) -> str:
    """Return the configuration, the number of repeats, and whether the runs alternated."""
    if pair.new is None:
        return pair.name
    old, new = pair.old["repeats"], pair.new["repeats"]
    repeats = f"{old} repeat{'' if old == 1 else 's'} each" if old == new else f"{old} and {new} repeats"
    order = ""
    if pair.interleaved is not None and max(old, new) >= verdict.MIN_RUNS:
        order = ", interleaved" if pair.interleaved else ", measured separately"
    return f"{pair.name} ({repeats}{order})"


def cells(metric: MetricResult) -> list[str]:
    """Return the seven cells of a metric's row."""
    return [
        _label(metric) + (f" {metric.unit}" if metric.unit in ("ms", "MiB", "%") else ""),
        _number(metric, metric.old),
        _number(metric, metric.new),
        _change(metric),
        _interval(metric),
        _worst_case(metric),
        _verdict(metric),
    ]


def remarks(pair: PairResult) -> Iterator[str]:
    """Yield what stands below a table: reasons of inconclusive metrics, then notes and warnings."""
    for metric in pair.metrics:
        if metric.reason:
            yield f"{_label(metric)}: {metric.reason}"
    yield from pair.notes


def footnotes(result: CompareResult) -> Iterator[str]:
    """Yield the notes of the result, and what the columns mean."""
    yield from result.notes
    if any(pair.metrics for pair in result.pairs):
        yield "change: new against old. Values are (geometric) means over runs. `bench` pools all requests"
    if any(result.metrics_with("not enough evidence")):
        yield "inconclusive: not enough evidence for a verdict"
    ndcg = [metric.limits for pair in result.pairs for metric in pair.metrics if metric.points and metric.limits]
    if ndcg:
        yield f"nDCG@10: points, over the same queries; a loss of up to {ndcg[0].drop_allowed:g} is tolerated"
    judged = {metric.name: metric for pair in result.pairs for metric in pair.metrics if metric.interval}
    if not judged:
        return
    limits = ", ".join(
        f"{_label(metric)} {100 * metric.sample.threshold:g}%"
        + (f" and {metric.sample.floor:g} {metric.unit}" if metric.sample.floor else "")
        for metric in judged.values()
        if metric.sample
    )
    yield f"tolerance: {limits}; a regression exceeds it, and its interval excludes zero"
    which = f"all {result.family} metrics together" if result.family > 1 else "the metric"
    confidence = f"{100 * verdict.CONFIDENCE:.0f}%"
    yield f"interval: {confidence} for {which}, over runs; worst case: one-sided bound of {confidence}"


def _table(metrics: Sequence[MetricResult]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1), header_style="bold", collapse_padding=True)
    for title in HEADINGS:
        left = title in ("", "verdict")
        grid.add_column(title, justify="left" if left else "right", no_wrap=title != "verdict", overflow="fold")
    for metric in metrics:
        *figures, word = cells(metric)
        grid.add_row(*figures, Text(word, style=_STYLES.get(metric.outcome, "")))
    return grid


def _markdown_cells(metric: MetricResult) -> list[str]:
    *figures, word = (_escaped(text) for text in cells(metric))
    return [*figures, f"**{word}**" if metric.outcome in ("regression", "not enough evidence") else word]


def _label(metric: MetricResult) -> str:
    return _LABELS.get(metric.name, metric.name)


def _change_in_words(metric: MetricResult) -> str:
    if metric.points:
        return f"{_label(metric)} {_change(metric)} {points_of(metric)}"
    if metric.change is None:
        return f"{_label(metric)} {metric.reason}".rstrip()
    milliseconds = ""
    if metric.unit == "ms" and metric.old is not None and metric.new is not None:
        milliseconds = f" ({metric.new - metric.old:+.3g} ms)"
    return f"{_label(metric)} {_percent(metric.change)}{milliseconds}"


def points_of(metric: MetricResult) -> str:
    """Return the unit of a difference: those of nDCG are 0.01."""
    return "points" if metric.unit == "points" else "percentage points"


def _verdict(metric: MetricResult) -> str:
    needed = f": needs {metric.repeats_needed} repeats" if metric.repeats_needed else ""
    return ("inconclusive" if metric.outcome == "not enough evidence" else metric.outcome) + needed


def _interval(metric: MetricResult) -> str:
    if metric.points:
        return " to ".join(f"{end:+.2f}" for end in metric.points.difference_interval)
    return " to ".join(_percent(end) for end in metric.interval or ())


def _worst_case(metric: MetricResult) -> str:
    if metric.points:
        return f"≤{max(0.0, metric.points.difference_at_most):.2f}"
    if metric.sample is None or metric.sample.worse_at_most is None:
        return ""
    return f"≤{100 * max(0.0, metric.sample.worse_at_most):.1f}%"


def _change(metric: MetricResult) -> str:
    if metric.points:
        return f"{metric.points.difference:+.2f}"
    if metric.change is not None:
        return _percent(metric.change)
    # A change of quality is a difference, not a share.
    if metric.limits and metric.old is not None and metric.new is not None:
        return f"{metric.new - metric.old:+.4f}"
    return ""


def _number(metric: MetricResult, value: float | None) -> str:
    if value is None:
        return "-"
    if metric.limits:
        return f"{value:.{1 if metric.points else 4}f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}%" if abs(share) < 1 else f"{100 * share:+.0f}%"


def _escaped(text: str) -> str:
    """Return text as literal Markdown: names and reasons come from servers and files."""
    for mark in ("\\", "|", "*", "_", "`", "[", "]"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace("\n", " ")
