"""`inferctl bench`: run a benchmark plan, print the result table and write receipts and a report."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import completion, console, options
from inferctl.core import outputs
from inferctl.core.errors import NotReadyError, install_hint

if TYPE_CHECKING:
    from inferctl.bench.measure.bench import Bench
    from inferctl.bench.measure.outcome import Outcome
    from inferctl.bench.plan.overrides import Overrides
    from inferctl.bench.report.result import Result

EPILOG = """\b
Examples:
  # Compare bf16, int8 and fp16 in about two minutes
  inferctl bench --model DIR --plan quick
  # Send 50 requests/s, even if the server responds more slowly
  inferctl bench -p bf16 --rate 50
  # Find the highest rate whose p99 stays within 100 ms
  inferctl bench -p bf16 --search --slo 100
  # Measure every combination of batch limit and corpus
  inferctl bench -p bf16 --batch-tokens 4096 --batch-tokens 16384 --corpus short --corpus mixed
  # Compare two models by their retrieval on your own texts, next to speed
  inferctl bench -m DIR -m OTHER-DIR -p fp32 -p bf16 --retrieval COLLECTION
  # Measure a running server
  inferctl bench --url t4=http://10.0.0.7:8080
  # Measure a running server that requires an API key
  inferctl bench --url vllm=http://10.0.0.7:8000 --api-key-env VLLM_API_KEY
  # Measure a generation server with prompts of 128 tokens and outputs of 64
  inferctl bench --url vllm=http://10.0.0.7:8000 --users 8 --lengths 128,64
  # Find the highest rate at which 99% of the responses start and flow in time
  inferctl bench --url vllm=http://10.0.0.7:8000 --search --slo-ttft 500 --slo-itl 50
"""

Precisions = Annotated[
    list[str] | None,
    options.precision_option("Measure fp32, fp16, bf16, int8 or fp8; repeatable. [default: the plan's]"),
]
BatchTokens = Annotated[
    list[int] | None,
    typer.Option("--batch-tokens", metavar="N", help="Limit a forward pass to N tokens; repeat to compare limits."),
]
Corpora = Annotated[
    list[str] | None,
    typer.Option(
        "--corpus",
        metavar="NAME",
        autocompletion=completion.CORPORA,
        help="Send texts of short, paragraphs, mixed, passages or a file; repeat to compare.",
    ),
]
Urls = Annotated[
    list[str] | None, typer.Option("--url", metavar="NAME=URL", help="Measure this running server; repeatable.")
]
Headers = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        metavar="'NAME: VALUE'",
        help="Send this header to the --url servers; repeatable. `ps` shows its value.",
    ),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="VARIABLE",
        help="Send the API key in this variable to the --url servers as a Bearer token.",
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option(
        "--served-model",
        metavar="NAME",
        help="Request this model from the --url servers. [default: the first they list]",
    ),
]
PlanName = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="NAME",
        autocompletion=completion.PLANS,
        help="Run quick, precision, search, spike, gate or a YAML file. [default: precision]",
    ),
]
Duration = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Measure each run for this time. [default: the plan's]")
]
Users = Annotated[
    int | None, typer.Option(metavar="N", help="Send a closed loop of N concurrent users. [default: the plan's]")
]
Rate = Annotated[
    float | None, typer.Option(metavar="N", help="Send an open loop of N requests/s. [default: the plan's load]")
]
Search = Annotated[bool, typer.Option("--search", help="Find the highest rate that meets the SLO.")]


def _slo(name: str, text: str) -> Any:
    return typer.Option(name, metavar="MS", min=options.MIN_SLO_MS, max=options.MAX_SLO_MS, help=text)


Slo = Annotated[float | None, _slo("--slo", "Set the p99 SLO in milliseconds. [default: slo.p99_ms of the spec]")]
SloTtft = Annotated[
    float | None,
    _slo("--slo-ttft", "Generation: limit the time to the first token. [default: slo.ttft_ms of the spec]"),
]
SloItl = Annotated[
    float | None, _slo("--slo-itl", "Generation: limit the gaps between tokens. [default: slo.itl_ms of the spec]")
]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--lengths",
        metavar="IN,OUT",
        help="Generation: set the tokens of prompt and output, as 128,64, azure-llm-2023 or FILE.csv.",
    ),
]
Names = Annotated[
    str | None,
    typer.Option(
        metavar="MIX", help="Request these models or adapters: a=2,b=1, uniform or zipf:1.2. [default: the plan's]"
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="TIME", help="Limit all searches together to this time: 300 (seconds), 5m or 1.5h."
    ),
]
Repeats = Annotated[int | None, typer.Option(metavar="N", help="Run each configuration N times. [default: the plan's]")]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="Send the load from N processes. [default: the plan's, usually 1]")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Write receipts, records, logs and the report below DIR.")
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write the HTML report to FILE. [default: report.html in DIR]"),
]
Profile = Annotated[
    bool, typer.Option("--profile", help="Also show where the time of each engine goes, at 12 sizes of batches.")
]
Retrieval = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Also measure how well vectors find the documents of this judged collection."),
]
Dimensions = Annotated[
    list[int] | None,
    typer.Option(
        metavar="N",
        min=1,
        max=1_000_000,
        help="--retrieval: truncate vectors to N dimensions; repeatable. [default: 256, 128]",
    ),
]
Rerank = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="--retrieval: rank the 20 best documents again with this model or URL."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", "-m", metavar="SOURCE", help="Use this folder, hub id or `oci://` image; repeat to compare."
    ),
]


def bench(
    spec_file: options.SpecFile = None,
    model: Models = None,
    plan: PlanName = None,
    precision: Precisions = None,
    batch_tokens: BatchTokens = None,
    corpus: Corpora = None,
    url: Urls = None,
    header: Headers = None,
    api_key_env: ApiKeyEnv = None,
    served_model: ServedModel = None,
    duration: Duration = None,
    users: Users = None,
    rate: Rate = None,
    search: Search = False,
    slo: Slo = None,
    slo_ttft: SloTtft = None,
    slo_itl: SloItl = None,
    lengths: Lengths = None,
    names: Names = None,
    budget: Budget = None,
    repeats: Repeats = None,
    workers: Workers = None,
    output: Output = Path("bench-results"),
    report: Report = None,
    profile: Profile = False,
    retrieval: Retrieval = None,
    dimensions: Dimensions = None,
    rerank: Rerank = None,
    json_: options.Json = False,
) -> None:
    """Measure latency, throughput and quality of each configuration or running server.

    If a benchmark is interrupted, the receipts of its complete runs are kept.
    """
    _require_packages(*["pytrec_eval"] * bool(retrieval))
    from inferctl.cli import bench_options, bench_setup

    if report is not None:
        sources = (plan, *(model or []), *(corpus or []))
        inputs = [options.spec_path(spec_file), *(Path(name) for name in sources if name)]
        outputs.check(report, "--report", parents=True, inputs=inputs)
    overrides: Overrides = {
        "users": users,
        "rate": rate,
        "duration_s": duration,
        "repeats": repeats,
        "load": {"workers": workers, "names": bench_options.parse_names(names)},
        "generation": {**bench_options.parse_lengths(lengths), "ttft_ms": slo_ttft, "itl_ms": slo_itl},
        "batch_tokens": batch_tokens,
        "corpora": corpus or ([str(retrieval / "corpus.jsonl")] if retrieval else None),
        "search": {"slo_p99_ms": slo} if search else None,
        "slo_p99_ms": slo,
        "budget_s": None if budget is None else bench_options.parse_seconds(budget),
    }
    access = bench_options.AccessOptions(header or [], api_key_env, served_model)
    judged = (retrieval, rerank, dimensions or [])
    new_options = bench_options.BenchOptions(
        spec_file, model or [], plan, precision or [], url or [], overrides, slo, output, access, profile, *judged
    )
    _run(bench_setup.prepare(new_options), report, json_)


def _run(benchmark: Bench, report: Path | None, json_: bool) -> None:
    from inferctl.bench.measure import runner
    from inferctl.bench.report import receipts
    from inferctl.bench.report import result as results
    from inferctl.cli import bench_progress

    outcomes = runner.outcomes(benchmark)
    page = (report or benchmark.output / "report.html").resolve()
    console.note(f"writing results to {_relative(benchmark.output)}")
    console.note(bench_progress.forecast(benchmark))
    try:
        with bench_progress.ProgressView(bench_progress.expected(benchmark)) as view:
            runner.run(benchmark, outcomes, view.update, lambda outcome: receipts.write_all(benchmark, [outcome]))
    except BaseException:  # also Ctrl-C: the figures of complete runs are kept
        if any(outcome.measurements for outcome in outcomes):
            _write_results(benchmark, outcomes, page, json_)
        raise
    result = _write_results(benchmark, outcomes, page, json_)
    if problem := results.problem(result):
        raise problem


def _write_results(benchmark: Bench, outcomes: list[Outcome], page: Path, json_: bool) -> Result:
    """Write receipts, result.json and the report, print the result, and return it."""
    from inferctl.bench.report import html, receipts, terminal
    from inferctl.bench.report import result as results
    from inferctl.receipts import receipt

    sealed = receipts.sealed(benchmark, outcomes)
    result = results.collect(benchmark, outcomes, sealed, page)
    try:
        for each in sealed:
            receipt.save(each)
        results.write(benchmark.output / "result.json", result)
        html.write(page, result, sealed)
    finally:
        # If a file cannot be written, the measured figures are still printed.
        if json_:
            console.document(result.as_dict())
        else:
            console.report(terminal.render(result))
    console.note(f"receipts: {benchmark.output / 'receipts'}")
    console.note(f"report:   {page}")
    return result


def _require_packages(*more: str) -> None:
    missing_packages = [name for name in dict.fromkeys(("locust", "numpy", *more)) if find_spec(name) is None]
    if missing_packages:
        extra = "retrieval" if "pytrec_eval" in missing_packages else "bench"
        raise NotReadyError(f"benchmarks require {' and '.join(missing_packages)}, not installed", install_hint(extra))


def _relative(path: Path) -> Path:
    """Return `path` relative to the working directory if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
