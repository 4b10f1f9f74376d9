"""`inferctl bench`: run a plan, show the comparison, leave receipts and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import completion, console, options

if TYPE_CHECKING:
    from inferctl.bench.measure.outcome import Outcome
    from inferctl.bench.report.receipts import Context
    from inferctl.bench.report.result import Result
    from inferctl.cli import bench_setup

EPILOG = """Examples: `inferctl bench --model DIR --plan quick` compares precisions in about three minutes;
`inferctl bench -p bf16 --rate 50` offers 50 requests/s whatever the server does;
`inferctl bench -p bf16 --search --slo 100` finds the highest rate whose p99 stays within 100 ms;
`inferctl bench -p bf16 --batch-tokens 4096 --batch-tokens 16384 --corpus short --corpus mixed` measures every combination;
`inferctl bench --url t4=http://10.0.0.7:8080` measures a server that runs already;
`inferctl bench --url vllm=http://10.0.0.7:8000 --api-key-env VLLM_API_KEY` measures one of vLLM that requires a key;
`inferctl bench --resume bench-results/precision-20260102-030405` goes on where a bench was cut short."""

Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        "-p",
        metavar="NAME",
        autocompletion=completion.PRECISIONS,
        help="Instead of the plan's: fp32, fp16, bf16 or int8; repeatable.",
    ),
]
BatchTokens = Annotated[
    list[int] | None,
    typer.Option("--batch-tokens", metavar="N", help="Tokens of one forward pass at most; repeat for a matrix."),
]
Corpora = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus",
        metavar="NAME",
        autocompletion=completion.CORPORA,
        help="Set the texts: short, paragraphs, mixed, passages or a file; repeat for a matrix.",
    ),
]
Urls = Annotated[
    list[str] | None, typer.Option("--url", metavar="NAME=URL", help="Measure a server that runs already; repeatable.")
]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        metavar="'NAME: VALUE'",
        help="Send this header to the servers of --url; repeatable. Other users see it in the list of processes.",
    ),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="VARIABLE",
        help="Send the key in this environment variable to the servers of --url, as Authorization: Bearer.",
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option(
        "--served-model",
        metavar="NAME",
        help="Set the model name in requests to the servers of --url; default is the first that a server lists.",
    ),
]
Hardware = Annotated[
    list[str] | None,
    typer.Option(
        "--hardware",
        metavar="KEY,...",
        autocompletion=completion.HARDWARE,
        help="Parts to show beside: estimated where this machine is not one.",
    ),
]
PlanName = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="NAME",
        autocompletion=completion.PLANS,
        help="A plan of benchmarks/plans (quick, precision, search, ...), or a YAML file.",
    ),
]
Slo = Annotated[
    float | None,
    typer.Option(
        "--slo",
        metavar="MS",
        min=options.MIN_SLO_MS,
        max=options.MAX_SLO_MS,
        help="The p99 that must hold, instead of the spec's slo.p99_ms.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="TIME",
        help="Limit the searches of all servers together to this time: seconds, or as in 5m or 1.5h.",
    ),
]
Neighbours = Annotated[
    int | None,
    typer.Option("--neighbours", metavar="N", help="Also measure beside N busy servers on the same device, in turns."),
]
ErrorBudget = Annotated[
    float | None,
    typer.Option(
        "--error-budget",
        metavar="PERCENT",
        min=0,
        max=100,
        help="Requests that may fail before a result is invalid, instead of the plan's 0.1.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Where receipts, records, logs and the report go.")
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="The HTML report; default is report.html in the output folder."),
]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="DIR", help="Go on with the bench in this folder, as it began; takes no plan."),
]
# A key is in no file: a bench that goes on needs it again.
_WITH_RESUME = ("resume", "report", "json_", "header")


def bench(
    context: typer.Context,
    spec_file: options.SpecFile = None,
    model: options.ModelSource = None,
    plan: PlanName = None,
    precision: Precisions = None,
    batch_tokens: BatchTokens = None,
    corpus: Corpora = None,
    url: Urls = None,
    header: Headers = None,
    api_key_env: ApiKeyEnv = None,
    served_model: ServedModel = None,
    hardware: Hardware = None,
    duration: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Seconds to measure, instead of the plan's.")
    ] = None,
    users: Annotated[
        int | None,
        typer.Option(help="Set the users of a closed loop; default is the plan's, which may be found first (auto)."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop at this many requests/s, instead of the plan's load.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the highest rate whose p99 holds the SLO.")] = False,
    slo: Slo = None,
    budget: Budget = None,
    repeats: Annotated[int | None, typer.Option(help="Runs of each configuration, instead of the plan's.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that make the load, when one core is not enough.")
    ] = None,
    neighbours: Neighbours = None,
    error_budget: ErrorBudget = None,
    output: Output = Path("bench-results"),
    report: Report = None,
    resume: Resume = None,
    json_: options.Json = False,
) -> None:
    """Measure latency, throughput and quality of each configuration, or of running servers.

    A bench that was cut short, even killed, goes on with --resume: complete runs are kept, a half-done one is made again.
    """
    from inferctl import outputs
    from inferctl.cli import bench_setup

    _require_packages()
    if report is not None:
        read = [options.spec_path(spec_file), *(Path(name) for name in (plan, model, *(corpus or [])) if name)]
        if resume:
            read += [resume / name for name in ("bench.json", "runs", "receipts")]
        outputs.check(report, "--report", parents=True, inputs=read)
    if resume:
        _alone_with_resume(context)
        ready = bench_setup.go_on(resume, header or [])
    else:
        overrides: dict[str, Any] = {
            "users": users,
            "rate": rate,
            "duration_s": duration,
            "repeats": repeats,
            "load": {"workers": workers},
            "batch_tokens": batch_tokens,
            "corpora": corpus,
            "hardware": bench_setup.hardware(hardware or []),
            "search": {"slo_p99_ms": slo} if search else None,
            "slo_p99_ms": slo,
            "budget_s": None if budget is None else bench_setup.seconds(budget),
            "neighbours": neighbours,
            "error_budget_percent": error_budget,
        }
        reach = bench_setup.Reach(header or [], api_key_env, served_model)
        given = bench_setup.Given(spec_file, model, plan, precision or [], url or [], overrides, slo, output, reach)
        ready = bench_setup.start(given)
    _run(ready, report, json_)


def _run(ready: bench_setup.Ready, report: Path | None, json_: bool) -> None:
    from inferctl.bench.measure import resume, runner
    from inferctl.bench.report import receipts
    from inferctl.bench.report import result as results
    from inferctl.cli import bench_progress

    work, context, outcomes = ready.work, ready.context, ready.outcomes
    page = (report or work.output / "report.html").resolve()
    again = f"inferctl bench --resume {_shown(work.output)}"
    with resume.lock(work.output):
        done = resume.restore(work.output, work.order, outcomes)
        total = len(work.order)
        console.note(
            f"{done} of {total} runs are complete, {total - done} to go"
            if done
            else f"results go to {_shown(work.output)}; if this is cut short: {again}"
        )
        if said := bench_progress.forecast(work):
            console.note(said)
        try:
            with bench_progress.Show(bench_progress.expected(work), done) as show:
                runner.run(work, outcomes, show.tell, lambda outcome: receipts.write_all(context, [outcome]))
        except BaseException:
            if any(outcome.measurements for outcome in outcomes):
                _keep(context, outcomes, page, json_)
            console.note(f"to go on where this stopped: {again}")
            raise
        result = _keep(context, outcomes, page, json_)
        if problem := results.problem(result):
            raise problem


def _keep(context: Context, outcomes: list[Outcome], page: Path, json_: bool) -> Result:
    """Seal what was measured, write the report, show the comparison."""
    from inferctl.bench.report import html, receipts, terminal
    from inferctl.bench.report import result as results

    sealed = receipts.write_all(context, outcomes)
    result = results.collect(context, outcomes, sealed, page)
    results.write(context.output / "result.json", result)
    try:
        html.write(page, result, sealed)
    finally:
        # A report that cannot be written must not hide what was measured.
        if json_:
            console.document(result.as_dict())
        else:
            console.report(terminal.render(result))
        console.note(f"receipts: {context.output / 'receipts'}")
    console.note(f"report:   {page}")
    return result


def _require_packages() -> None:
    from importlib.util import find_spec

    from inferctl.errors import NotReadyError

    missing = [name for name in ("locust", "numpy") if find_spec(name) is None]
    if missing:
        raise NotReadyError(
            f"{', '.join(missing)} not installed, which benchmarks need", "pip install 'inferctl[bench]'"
        )


def _alone_with_resume(context: typer.Context) -> None:
    """A bench goes on as it began, so nothing of it can be given again."""
    from inferctl.errors import UsageError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source and source.name == "COMMANDLINE" and parameter.name not in _WITH_RESUME:
            raise UsageError(
                f"{parameter.opts[0]} cannot be given with --resume: a bench goes on as it began",
                "leave it out, or start a new bench",
            )


def _shown(path: Path) -> Path:
    """As it is typed from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
