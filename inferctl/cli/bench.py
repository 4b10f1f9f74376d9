"""`inferctl bench`: run a plan, show the comparison, leave receipts and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferctl.cli import bench_progress, console, options

if TYPE_CHECKING:
    from inferctl.bench.plan import Plan
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
    from inferctl.bench import environment, receipt, result, runner, view
    from inferctl.bench import plan as plans
    from inferctl.bench import report as reports

    targets = [_target(text) for text in url or []]
    resolved = _settings(spec_file, model, plan, needed=not targets or bool(precision))
    chosen = plans.load(plan or (resolved.spec.bench.plan if resolved else "precision"))
    chosen = chosen.with_overrides(precision, users, rate, duration, repeats)
    chosen, subjects = _subjects(chosen, targets, bool(precision))
    machine = environment.detect()
    work = _prepare(resolved, model, chosen, subjects, output, machine.cores)
    with bench_progress.Show(chosen.load.warmup_s + chosen.load.duration_s + 12) as show:
        outcomes: list[Outcome] = runner.run(work, show.tell)
    context = result.Context(
        plan=chosen,
        environment=machine,
        model_source=resolved.spec.model.source if resolved else None,
        hardware_wanted=resolved.spec.hardware if resolved else [],
        slo_p99_ms=resolved.spec.slo.p99_ms if resolved else None,
        output=work.output,
    )
    sealed: list[receipt.Receipt] = result.receipts(context, outcomes)
    page = (report or work.output / "report.html").resolve()
    document = result.document(context, outcomes, sealed, page)
    reports.write(page, document, sealed)
    result.write(work.output / "result.json", document)
    if json_:
        console.document(document)
    else:
        console.report(view.render(document))
    console.note(f"receipts: {work.output / 'receipts'}\nreport:   {page}")
    if problem := result.verdict(document):
        raise problem


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
    return name, address


def _subjects(chosen: Plan, targets: list[tuple[str, str]], with_precisions: bool) -> tuple[Plan, list[Subject]]:
    """What is measured: the plan's configurations; with --url those servers, and our own only when --precision asks for them too."""
    from inferctl.bench.plan import Configuration
    from inferctl.bench.runner import Subject
    from inferctl.errors import UsageError

    own = [Subject(one.name, one.precision) for one in chosen.configurations] if with_precisions or not targets else []
    subjects = own + [Subject(name, url=address) for name, address in targets]
    names = [subject.name for subject in subjects]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"the name {sorted(repeated)[0]!r} is used twice", "give each server its own name: `--url NAME=URL`"
        )
    listed = [Configuration(name=subject.name, precision=subject.precision or "auto") for subject in subjects]  # type: ignore[arg-type]
    return chosen.model_copy(update={"configurations": listed}), subjects


def _prepare(
    resolved: Resolved | None, model: str | None, chosen: Plan, subjects: list[Subject], output: Path, cores: int
) -> Bench:
    """Everything that can be wrong is found here, before anything is started."""
    import time

    from inferctl.bench import runner, server, target, workload
    from inferctl.errors import NotReadyError

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
    place = (output / f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotReadyError(f"{place} cannot be made: {error.strerror}", "give another folder with --output") from None
    return runner.Bench(chosen, subjects, command, folder, place, cores)


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
