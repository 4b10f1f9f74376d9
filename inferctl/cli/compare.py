"""`inferctl compare`: the verdict on two receipts, for people and for CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import completion, console, options

if TYPE_CHECKING:
    from inferctl.bench.judge.compare import Options

FORMATS = ("text", "markdown", "json", "junit")
_SUFFIXES = {".txt": "text", ".md": "markdown", ".json": "json", ".xml": "junit"}


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The baseline: a receipt, or a folder of a bench.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The candidate, likewise.")],
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PERCENT",
            help="What a change must exceed; METRIC=PERCENT for one metric, repeatable. Default 5; p99 and memory 10.",
        ),
    ] = None,
    floor_ms: Annotated[
        float,
        typer.Option(
            metavar="MS", min=0, max=options.MAX_SLO_MS, help="Set the minimum absolute difference of a latency."
        ),
    ] = 0.05,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.METRICS,
            help="p50, p90, p99, requests_per_s, memory or rejected; repeatable; default all.",
        ),
    ] = None,
    max_cosine_drop: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=2,
            help="Set the largest drop of the cosine (1st percentile). Default: its error may double.",
        ),
    ] = None,
    max_recall_drop: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Set the largest drop of recall@10. Default: its error may double.",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT",
            autocompletion=completion.one_of("precision", "hardware"),
            help="Compare although `precision` or `hardware` differ; repeatable.",
        ),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            autocompletion=completion.one_of(*FORMATS),
            help="text, markdown, json or junit.",
        ),
    ] = "text",
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write it there too: .md, .json, .xml or .txt; else as --format."
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Say whether NEW is worse than OLD: exit code 0 no, 1 yes, 4 not enough evidence, 5 not comparable.

    Example: inferctl compare bench-results/RUN/receipts/old.json bench-results/RUN/receipts/new.json -o verdict.md
    """
    from inferctl import outputs
    from inferctl.bench.judge import comparable
    from inferctl.bench.judge import compare as comparing

    inputs = [*comparable.files(old), *comparable.files(new)]
    for file in output or []:
        outputs.check(file, "--output", parents=True, inputs=inputs)
    style = "json" if json_ else _one_of(format_, FORMATS, "--format")
    wanted = _options(threshold, floor_ms, metric, max_cosine_drop, max_recall_drop, allow)
    found, notes = comparable.pairs(old, new)
    result = comparing.document(found, notes, wanted)
    if style == "text":
        from inferctl.bench.report import comparison

        console.report(comparison.render(result))
    elif style == "json":
        console.document(result)
    else:
        console.data(_text(result, style))
    for file in output or []:
        outputs.write(file, _text(result, _SUFFIXES.get(file.suffix, style)), "--output")
    if problem := comparing.problem(result):
        raise problem


def _options(
    threshold: list[str] | None,
    floor_ms: float,
    metric: list[str] | None,
    cosine_drop: float | None,
    recall_drop: float | None,
    allow: list[str] | None,
) -> Options:
    from inferctl.bench.judge import comparable
    from inferctl.bench.judge import compare as comparing

    shares = {}
    for text in threshold or []:
        name, separator, value = text.rpartition("=")
        if separator:
            _one_of(name, comparing.METRICS, "--threshold")
        shares[name] = _share(value)
    overall = shares.pop("", None)
    defaults = comparing.DEFAULT_THRESHOLDS if overall is None else dict.fromkeys(comparing.METRICS, overall)
    return comparing.Options(
        thresholds={**defaults, **shares},
        floor_ms=floor_ms,
        metrics=[_one_of(name, (*comparing.METRICS, comparing.REJECTED), "--metric") for name in metric or []],
        cosine_drop=cosine_drop,
        recall_drop=recall_drop,
        allow=[_one_of(name, comparable.ALLOWABLE, "--allow") for name in allow or []],
    )


def _share(text: str) -> float:
    from inferctl.errors import UsageError

    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise UsageError(f"--threshold {text!r} is not a percentage between 0 and 100", "as in `--threshold 5`")
    return value / 100


def _one_of(name: str, known: Any, option: str) -> str:
    from inferctl.errors import UsageError, did_you_mean

    if name not in known:
        raise UsageError(f"{option} cannot be {name!r}", did_you_mean(name, known) or f"known: {', '.join(known)}")
    return name


def _text(result: dict[str, Any], style: str) -> str:
    import json

    from inferctl.bench.report import comparison, junit

    if style == "json":
        return json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if style == "junit":
        return junit.render(result)
    return comparison.markdown(result) if style == "markdown" else comparison.plain(result)
