"""`inferctl bench`: run a plan, show the comparison, leave receipts and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import bench_progress, console, options

if TYPE_CHECKING:
    from inferctl.bench.plan import Plan
    from inferctl.bench.result import Context
    from inferctl.bench.runner import Bench, Outcome, Subject
    from inferctl.settings import Resolved

Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision", "-p", metavar="NAME", help="Instead of the plan's: fp32, fp16, bf16 or int8; repeatable."
    ),
]
Urls = Annotated[
    list[str] | None, typer.Option("--url", metavar="NAME=URL", help="Measure a server that runs already; repeatable.")
]
PlanName = Annotated[
    str | None,
    typer.Option("--plan", metavar="NAME", help="A plan of benchmarks/plans (quick, precision), or a YAML file."),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Where receipts, records, logs and the report go.")
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="The HTML report; default is report.html in the output folder."),
]


def bench(
    spec_file: options.SpecFile = None,
    model: options.ModelSource = None,
    plan: PlanName = None,
    precision: Precisions = None,
    url: Urls = None,
    duration: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Seconds to measure, instead of the plan's.")
    ] = None,
    users: Annotated[int | None, typer.Option(help="Concurrent users of a closed loop, instead of the plan's.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop at this many requests/s, instead of the plan's load.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Runs of each configuration, instead of the plan's.")] = None,
    output: Output = Path("bench-results"),
    report: Report = None,
    json_: options.Json = False,
) -> None:
    """Measure latency, throughput and quality of each precision, or of running servers."""
    _require_packages()
    from inferctl.bench import environment, result, runner
    from inferctl.bench import plan as plans

    targets = [_target(text) for text in url or []]
    resolved = _settings(spec_file, model, plan, needed=not targets or bool(precision))
    chosen = plans.load(plan or (resolved.spec.bench.plan if resolved else "precision"))
    chosen = chosen.with_overrides(precision, users, rate, duration, repeats)
    if users is not None and chosen.load.mode == "open":
        console.warn(f"--users {users} changes nothing: this load is an open loop, {chosen.load.rate:g} requests/s")
    subjects = _subjects(chosen, targets, bool(precision))
    machine = environment.detect()
    work = _prepare(resolved, model, chosen, subjects, output)
    context = result.Context(
        plan=chosen,
        environment=machine,
        model_source=resolved.spec.model.source if resolved else None,
        hardware_wanted=resolved.spec.hardware if resolved else [],
        slo_p99_ms=resolved.spec.slo.p99_ms if resolved else None,
        output=work.output,
        subjects=subjects,
    )
    outcomes = runner.outcomes(work)
    page = (report or work.output / "report.html").resolve()
    try:
        with bench_progress.Show(chosen.load.warmup_s + chosen.load.duration_s + 12) as show:
            runner.run(work, outcomes, show.tell, lambda outcome: result.receipts(context, [outcome]))
    except BaseException:
        if any(outcome.measurements for outcome in outcomes):
            _keep(context, outcomes, page, json_)
        raise
    if problem := result.verdict(_keep(context, outcomes, page, json_)):
        raise problem


def _keep(context: Context, outcomes: list[Outcome], page: Path, json_: bool) -> dict[str, Any]:
    """Seal what was measured, write the report, show the comparison."""
    from inferctl.bench import report, result, view

    sealed = result.receipts(context, outcomes)
    document = result.document(context, outcomes, sealed, page)
    report.write(page, document, sealed)
    result.write(context.output / "result.json", document)
    if json_:
        console.document(document)
    else:
        console.report(view.render(document))
    console.note(f"receipts: {context.output / 'receipts'}\nreport:   {page}")
    return document


def _require_packages() -> None:
    from importlib.util import find_spec

    from inferctl.errors import NotReadyError

    missing = [name for name in ("locust", "numpy", "plotly") if find_spec(name) is None]
    if missing:
        raise NotReadyError(
            f"{', '.join(missing)} not installed, which benchmarks need", "pip install 'inferctl[bench]'"
        )


def _settings(spec_file: Path | None, model: str | None, plan: str | None, needed: bool) -> Resolved | None:
    """Settings in force; None when only running servers are measured and nothing names a model."""
    from inferctl import spec
    from inferctl.errors import UsageError

    try:
        return options.load(spec_file, {"model.source": model, "bench.plan": plan})
    except UsageError:
        if needed or spec_file or model or Path(spec.DEFAULT_FILE).exists():
            raise
        return None


def _target(text: str) -> tuple[str, str]:
    import re

    from inferctl.errors import UsageError

    name, separator, address = text.partition("=")
    if (
        not separator
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        or not address.startswith(("http://", "https://"))
    ):
        raise UsageError(f"--url {text!r} is not NAME=URL", "give one like `--url t4=http://10.0.0.7:8080`")
    if len(name) > 40:
        raise UsageError(
            f"the name {name!r} has {len(name)} characters, at most 40 fit", "give the server a shorter name"
        )
    return name, address


def _subjects(chosen: Plan, targets: list[tuple[str, str]], with_precisions: bool) -> list[Subject]:
    """What is measured: the plan's configurations; with --url those servers, and our own only when --precision asks for them too."""
    from inferctl.bench.runner import Subject
    from inferctl.errors import UsageError

    own = [Subject(one.name, one.precision) for one in chosen.configurations] if with_precisions or not targets else []
    subjects = own + [Subject(name, url=address) for name, address in targets]
    names = [subject.name for subject in subjects]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"the name {sorted(repeated)[0]!r} is used twice", "give each server its own name: `--url NAME=URL`"
        )
    return subjects


def _prepare(
    resolved: Resolved | None, model: str | None, chosen: Plan, subjects: list[Subject], output: Path
) -> Bench:
    """Everything that can be wrong is found here, before anything is started."""
    from inferctl.bench import runner, server, target, workload

    workload.read_corpus(chosen.corpus)
    if chosen.quality:
        workload.read_corpus(chosen.quality.corpus)
    for subject in subjects:
        if subject.url:
            target.connect(subject.url)
    folder = _model(resolved, needed=any(subject.url is None for subject in subjects) or model is not None)
    command = None
    if resolved and folder:
        file = Path(resolved.file).resolve() if resolved.file else None
        command = server.serve_command(str(folder), resolved.spec.name, file)
    return runner.Bench(chosen, subjects, command, folder, _place(output, chosen.name))


def _place(output: Path, name: str) -> Path:
    """A new folder for one bench: two that start in the same second get two."""
    import itertools
    import time

    from inferctl.errors import NotReadyError

    first = (output / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    for place in itertools.chain([first], numbered):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir()
        except FileExistsError:
            if place.parent.is_dir():
                continue
            raise NotReadyError(f"{place.parent} is a file", "give another folder with --output") from None
        except OSError as error:
            raise NotReadyError(
                f"{place} cannot be made: {error.strerror}", "give another folder with --output"
            ) from None
        return place
    raise AssertionError("unreachable")


def _model(resolved: Resolved | None, needed: bool) -> Path | None:
    """The local model folder; None when there is none and only running servers are measured (their vectors are then not checked)."""
    from inferctl import model as models
    from inferctl.errors import UsageError

    if resolved is None:
        return None
    try:
        return models.find(resolved.spec.model.source, resolved.spec.model.revision).path.resolve()
    except UsageError:
        if needed:
            raise
        return None
