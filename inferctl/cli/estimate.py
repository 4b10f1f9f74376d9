"""`inferctl estimate`: estimate latency, throughput and cost on other hardware, as bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from inferctl.batching.latency_model import Capacity
from inferctl.cli import completion, console, options
from inferctl.config.spec import Spec
from inferctl.core.errors import NotReadyError, UsageError, install_hint
from inferctl.estimate import calibration, document, forecast, lengths
from inferctl.estimate.cost import Cost
from inferctl.estimate.document import Question
from inferctl.estimate.forecast import Scenario
from inferctl.models import hub
from inferctl.models import model as model_folder

_STANDARD = "t4,l4,a100-40gb-sxm,h100-sxm"
_TEXTS = "mixed"

EPILOG = """\b
Examples:
  # Compare half an A100 with a T4 at an SLO
  inferctl estimate --model DIR --hardware t4,a100-40gb-mig-3g.20gb --slo-p99-ms 70 --against t4
  # Estimate from a config.json, for texts of 128 tokens
  inferctl estimate --config config.json --hardware l4,h100-sxm --length 128
"""


def estimate(
    spec_file: options.SpecFile = None,
    model: options.ModelSource = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read this config.json instead of a model; the weights are not needed."),
    ] = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            autocompletion=completion.HARDWARE,
            help=f"Estimate this hardware; repeatable. [default: the spec's, else {_STANDARD}]",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            "-p",
            metavar="NAME",
            autocompletion=completion.PRECISIONS,
            help="Estimate auto, fp32, fp16, bf16 or int8; repeatable. [default: the spec's, else auto]",
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.CORPORA,
            help="Take input lengths from this corpus or .jsonl or .txt file. [default: mixed]",
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Set input lengths without a corpus: 128, 55:0.8 (log-normal) or squad."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(metavar="N", min=0.001, max=100_000, help="Estimate an open loop of N requests/s (Poisson)."),
    ] = None,
    users: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=10_000, help="Estimate a closed loop of N users.")
    ] = None,
    slo: Annotated[
        float | None,
        typer.Option(
            "--slo-p99-ms",
            min=options.MIN_SLO_MS,
            max=options.MAX_SLO_MS,
            metavar="MS",
            help="Find the highest rate whose p99 meets this SLO. [default: the spec's]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            autocompletion=completion.HARDWARE,
            help="Compare the bound and the price of each row with this hardware.",
        ),
    ] = None,
    inputs: Annotated[int, typer.Option(metavar="N", min=1, max=2048, help="Set the number of texts per request.")] = 1,
    api_processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=64, help="Assume N API processes. [default: the spec's, else 1]"),
    ] = None,
    capacity: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add a row for a measured server, from an `inferctl capacity` file."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, metavar="N", help="Seed arrivals and order; equal seeds give equal figures."
        ),
    ] = 0,
    as_json: options.Json = False,
) -> None:
    """Estimate latency, throughput and cost on other hardware.

    Every figure is estimated from published results, not measured. Lists accept commas: --hardware t4,l4.
    """
    if rate and users:
        raise UsageError("`--rate` and `--users` exclude each other", "pass one of them")
    if corpus is not None and length is not None:
        raise UsageError("`--corpus` and `--length` exclude each other: both set the input lengths", "pass one of them")
    spec, file = _model(spec_file, model, config)
    data = forecast.read_config(file)
    max_tokens = _max_tokens(data)
    calibration_data = calibration.load()
    tokens, token_source = _tokens(corpus, length, file, max_tokens, calibration_data.mean_length, seed)
    processes = api_processes or (spec.serve.least_api_processes if spec else 1)
    batch_tokens = spec.serve.max_batch_tokens if spec else 16_384
    work = forecast.Scenario(tokens, inputs, batch_tokens, seed, api_processes=processes)
    question = document.Question(_load(rate, users, inputs), slo or (spec.slo.p99_ms if spec else None), against)
    keys = _split(hardware) or (spec.hardware if spec else []) or ([] if capacity else _STANDARD.split(","))
    with console.progress("estimating"):
        result = document.build(
            keys, _split(precision) or [spec.serve.precision if spec else "auto"], data, work, question
        )
        if capacity:
            result["rows"].insert(0, _measured_row(capacity, work, question))
    result["tokens"]["how"] = token_source
    if not result["rows"]:
        reasons = dict.fromkeys(absent["reason"] for absent in result["absent"])
        raise UsageError("\n".join(reasons), result["absent"][0]["hint"])
    if as_json:
        console.document(result)
    else:
        console.report(render(result))


def _model(spec_file: Path | None, model: str | None, config: Path | None) -> tuple[Spec | None, Path]:
    """Return the spec, or None without one, and the path of the model's `config.json`."""
    if config is not None:
        spec = options.load(spec_file, {}).spec if options.names_model(spec_file, {}) and model is None else None
        return spec, config
    if not options.names_model(spec_file, {"model.source": model}):
        raise UsageError("no model specified", "pass `--model DIR`, or `--config FILE` with its config.json")
    spec = options.load(spec_file, {"model.source": model}).spec
    folder = Path(spec.model.source)
    # The weights are not needed, so the folder may lack them.
    if model_folder.is_folder(folder) and (folder / "config.json").is_file():
        return spec, folder / "config.json"
    if (found := hub.cached(spec.model.source, spec.model.revision)) is not None:
        return spec, found.path / "config.json"
    if not model_folder.is_hub_id(spec.model.source):
        return spec, model_folder.find(spec.model.source).path / "config.json"
    names = ("config.json", "tokenizer.json", "modules.json")
    return spec, hub.small_files(spec.model.source, spec.model.revision, names) / "config.json"


def _max_tokens(config: dict[str, Any]) -> int:
    """Return the limit of tokens per input. The positions of RoBERTa start after the padding index."""
    positions = config.get("max_position_embeddings")
    offset = 2 if str(config.get("model_type", "")) in ("roberta", "xlm-roberta", "mpnet", "camembert") else 0
    return int(positions) - offset if isinstance(positions, int) and positions > offset else 512


def _tokens(
    corpus: str | None, length: str | None, config: Path, max_tokens: int, squad_mean: float, seed: int
) -> tuple[list[int], str]:
    if length is not None:
        return lengths.parse(length, max_tokens, squad_mean, 20_000, seed), f"drawn: {length}"
    try:
        from inferctl.bench.plan import workload
    except ModuleNotFoundError as error:
        raise NotReadyError(
            f"reading a corpus needs the package {error.name}, which is not installed",
            f"{install_hint('bench')}, or pass `--length`",
        ) from None
    texts, _ = workload.read_corpus(_TEXTS if corpus is None else corpus)
    token_counts, method = lengths.of_texts(texts, config.parent / "tokenizer.json", max_tokens)
    return token_counts, f"corpus {corpus or _TEXTS}, {method}"


def _load(rate: float | None, users: int | None, inputs: int) -> Any:
    if not rate and not users:
        return None
    mode = "open" if rate else "closed"
    return SimpleNamespace(mode=mode, users=users or 1, rate=rate, arrivals="poisson", inputs_per_request=inputs)


def _split(values: list[str] | None) -> list[str]:
    """Split `a,b` and repeated options into one list."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def _measured_row(file: Path, work: Scenario, question: Question) -> dict[str, Any]:
    """Return the row of a measured server, with the parallel batches and the batch limit of its measurement."""
    measured = Capacity.read(file)
    as_measured = replace(
        work,
        slots=measured.parallel_batches or 1,
        batch_tokens=measured.max_batch_tokens or work.batch_tokens,
    )
    cost = Cost(measured.fixed_s, 1 / measured.tokens_per_s)
    return document.measured_row(cost, file.name, as_measured, question)


def render(result: dict[str, Any]) -> RenderableType:
    """Return the table, data sources, prices, comparisons and limitations, 80 columns wide."""
    rows = result["rows"]
    loaded, slo, against = result["load"], result["slo_p99_ms"], any("against" in row for row in rows)
    headings = ["hardware", "runs as", "offline\ntexts/s", "single\np99 ms"]
    headings += ["p50 ms", "p99 ms"] if loaded else []
    headings += ["req/s at\nthe SLO"] if slo else []
    headings += [f"bound over\n{result['against']}'s"] if against else []
    headings += ["USD per\n1M texts"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        left_aligned = heading in ("hardware", "runs as")
        table.add_column(
            heading, justify="left" if left_aligned else "right", no_wrap=heading == "hardware", overflow="fold"
        )
    for row in rows:
        cells = [
            row["hardware"],
            row["precision"] or "as is",
            shown(row["offline_texts_per_s"]),
            shown(row["single_ms"]["p99"]),
        ]
        if loaded:
            cells += [shown(row["load"][key]) if row["load"][key] else "over" for key in ("p50_ms", "p99_ms")]
        if slo:
            cells.append(shown(row["highest_rate"]))
        if against:
            cells.append(f"{_short(row['against']['of_bounds'])}x" if "against" in row else "-")
        cells.append("\n".join(shown(cost["usd_per_million_texts"]) for cost in row["costs"][:1]) or "-")
        table.add_row(*cells)
    return Group(
        Text(f"estimated, not measured: {_summary(result)}", style="bold"),
        Text(),
        table,
        Text(),
        *map(Text, lines(result)),
    )


def shown(value: dict[str, Any]) -> str:
    """Return a figure, below `at most` or `at least` if it is a bound."""
    figure = value["low"] if value["high"] is None else value["high"]
    return f"{value['bound']}\n{_short(figure)}" if value["bound"] else _short(figure)


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def _summary(result: dict[str, Any]) -> str:
    load, slo = result["load"], result["slo_p99_ms"]
    parts = [f"{result['tokens']['mean']:.0f} tokens per text on average"]
    if load:
        parts.append(f"{load['rate']:g} requests/s" if load["mode"] == "open" else f"{load['users']} users")
    if slo:
        parts.append(f"p99 within {slo:g} ms")
    return ", ".join(parts)


def lines(result: dict[str, Any]) -> list[str]:
    """Return the lines below the table: data sources, reasons for bounds, prices, verdicts, limitations."""
    rows = result["rows"]
    output = [*_no_difference(rows), *(f"{_named(row)}: based on {row['rests_on']}" for row in rows)]
    output += [f"not estimated: {absent['reason']}" for absent in result["absent"]]
    because = list(dict.fromkeys(reason for row in rows for reason in row["bounded_by"]))
    if because:
        output += ["", "only bounds, because of", *(f"- {reason}" for reason in because)]
    front, capped = result["front_end"], [_named(row) for row in rows if row.get("limited_by") == "front end"]
    if capped:
        count = front["api_processes"]
        processes = "one API process" if count == 1 else f"{count} API processes"
        output.append(
            f"limited by the front end: {', '.join(capped)}. Their rates are at most what {processes} can serve"
            f" behind this front end: {_short(front['texts_per_s'])} texts/s in requests of"
            f" {front['texts_per_request']} (measured: {front['machine']}). More API processes"
            " (`--api-processes`, `serve.api_processes`), a faster CPU or a second replica serve more"
        )
    if priced := _prices(rows):
        output += ["", *priced]
    output += [comparison(row) for row in rows if "against" in row]
    notes = list(dict.fromkeys(note for row in rows for note in row["notes"]))
    if any("load" in row and row["load"]["saturated"] for row in rows):
        notes.insert(0, "over: the offered rate exceeds the capacity, so latency grows without limit")
    return [*output, "", f"input lengths: {result['tokens']['how']}", *notes]


def _no_difference(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line if the API process limits the throughput of two rows or more: their figures are then equal."""
    capped = [row for row in rows if row.get("limited_by") == "front end"]
    if len(capped) < 2 or len({row["offline_texts_per_s"]["high"] for row in capped}) > 1:
        return []
    names = ", ".join(map(_named, capped))
    who = names if len(capped) < len(rows) else "Both" if len(rows) == 2 else "All"
    return [f"{who} are limited by the front end, so this estimate shows no difference in throughput.", ""]


def _prices(rows: list[dict[str, Any]]) -> list[str]:
    """Return each price, and each source with its date once."""
    sources: dict[str, int] = {}
    prices = []
    for row in rows:
        for cost in row["costs"]:
            number = sources.setdefault(f"{cost['source']}, {cost['date']}", len(sources) + 1)
            price = (
                f"{row['hardware']}: {cost['usd_per_hour']:.3f} USD/h, {cost['provider']} {cost['instance']} [{number}]"
            )
            prices.append(price)
    return [*dict.fromkeys(prices), *(f"[{number}] {source}" for source, number in sources.items())]


def comparison(row: dict[str, Any]) -> str:
    """Return at which price two parts cost the same per text if both reach their bounds, and the prices there are."""
    against = row["against"]
    text = f"{_named(row)} against {against['hardware']} {against['precision']}, per text: break-even price "
    text += f"{against['of_bounds']:.2f}x if both reach their bounds"
    if against["behind_front_end"]:
        text += " behind this front end"
    if "-mig-" in row["hardware"]:
        text += f"; {against['whole_gpu_of_bounds']:.1f}x for the whole GPU"
    return text + "".join(
        f". {price['provider']}: {price['price_ratio']:.2f}x the price" for price in against["prices"]
    )


def _named(row: dict[str, Any]) -> str:
    return f"{row['hardware']} {row['precision']}" if row["precision"] else str(row["hardware"])
