"""`inferctl compare`: the verdict on two receipts, for a terminal and for CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from inferctl.bench.judge import comparable, compare_result, retrieval
from inferctl.bench.judge import compare as comparing
from inferctl.bench.judge.compare import CompareOptions
from inferctl.bench.judge.compare_result import CompareResult
from inferctl.bench.judge.run_metrics import METRICS, REJECTED
from inferctl.bench.report import comparison, junit
from inferctl.cli import completion, console, options
from inferctl.core import outputs
from inferctl.core.errors import UsageError

FORMATS = ("text", "markdown", "json", "junit")
_SUFFIXES = {".txt": "text", ".md": "markdown", ".json": "json", ".xml": "junit"}

EPILOG = """\b
Examples:
  # Compare two servers of one benchmark, and write the verdict for a summary page
  inferctl compare bench-results/RUN/receipts/old.json bench-results/RUN/receipts/new.json -o verdict.md
  # Compare two benchmarks: receipts with equal configuration names
  inferctl compare OLD-BENCH NEW-BENCH
"""


def _default_thresholds() -> str:
    """Return the default of `--threshold`, such as `5; p99 and memory 10`."""
    names: dict[float, list[str]] = {}
    for metric in METRICS.values():
        names.setdefault(metric.threshold, []).append(metric.name)
    common, *others = sorted(names, key=lambda threshold: -len(names[threshold]))
    return "; ".join([f"{100 * common:g}", *(f"{', '.join(names[each])} {100 * each:g}" for each in others)])


_THRESHOLD_HELP = (
    "Set the smallest change that counts, for all metrics or as METRIC=PERCENT; repeatable. "
    f"[default: {_default_thresholds()}]"
)
_METRIC_HELP = (
    f"Judge only {', '.join(METRICS)}, {REJECTED} or {retrieval.NAME}, and always the quality against fp32; "
    "repeatable. [default: all]"
)


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Receipt or benchmark folder of the baseline.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Receipt or benchmark folder of the candidate.")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PERCENT",
            help=_THRESHOLD_HELP,
        ),
    ] = None,
    floor_ms: Annotated[
        float,
        typer.Option(
            metavar="MS", min=0, max=options.MAX_SLO_MS, help="Set the smallest change of a latency that counts."
        ),
    ] = 0.05,
    floor_ndcg: Annotated[
        float,
        typer.Option(metavar="POINTS", min=0, max=100, help="Set the smallest loss of nDCG@10 that counts, in points."),
    ] = retrieval.MARGIN,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.METRICS,
            help=_METRIC_HELP,
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            autocompletion=completion.one_of("precision", "hardware"),
            help="Compare receipts with different `precision` or `hardware`; repeatable.",
        ),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            autocompletion=completion.one_of(*FORMATS),
            help="Print text, markdown, json or junit.",
        ),
    ] = "text",
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Also write FILE, as .md, .json, .xml or .txt, else in the --format; repeatable.",
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Check whether NEW is worse than OLD: exit code 0 no, 1 yes, 4 not enough evidence, 5 cannot be compared."""
    inputs = [*comparable.files(old), *comparable.files(new)]
    for file in output or []:
        outputs.check(file, "--output", parents=True, inputs=inputs)
    style = "json" if json_ else options.known(format_, FORMATS, "--format")
    compare_options = _options(threshold, floor_ms, floor_ndcg, metric, allow)
    pairs, notes = comparable.pairs(old, new)
    result = comparing.compare(pairs, notes, compare_options)
    if style == "text":
        console.report(comparison.render(result))
    elif style == "json":
        console.document(result.as_dict())
    else:
        console.data(_text(result, style))
    for file in output or []:
        outputs.write(file, _text(result, _SUFFIXES.get(file.suffix, style)), "--output")
    if problem := compare_result.problem(result):
        raise problem


def _options(
    threshold: list[str] | None,
    floor_ms: float,
    floor_ndcg: float,
    metric: list[str] | None,
    allow: list[str] | None,
) -> CompareOptions:
    shares = {}
    for text in threshold or []:
        name, separator, value = text.rpartition("=")
        if separator:
            options.known(name, METRICS, "--threshold")
        shares[name] = _share(value)
    overall = shares.pop("", None)
    if overall is not None:
        shares = dict.fromkeys(METRICS, overall) | shares
    return comparing.CompareOptions(
        thresholds=shares,
        floor_ms=floor_ms,
        floor_ndcg=floor_ndcg,
        metrics=[options.known(name, (*METRICS, REJECTED, retrieval.NAME), "--metric") for name in metric or []],
        allow=[options.known(name, comparable.ALLOWABLE, "--allow") for name in allow or []],
    )


def _share(percent: str) -> float:
    """Return a percentage, with or without its sign, as a share of 1."""
    try:
        value = float(percent.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise UsageError(f"--threshold {percent!r} is not a percentage between 0 and 100", "as in `--threshold 5`")
    return value / 100


def _text(result: CompareResult, style: str) -> str:
    if style == "json":
        return json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n"
    if style == "junit":
        return junit.render(result)
    return comparison.markdown(result) if style == "markdown" else comparison.plain(result)
