"""`inferctl estimate`: estimate latency, throughput and cost on other hardware, as bounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from inferctl.cli import completion, console, options
from inferctl.config.spec import Spec
from inferctl.core.errors import NotReadyError, UsageError, install_hint
from inferctl.estimate import calibration, document, forecast, lengths
from inferctl.estimate.document import Question
from inferctl.facts.precision import PRECISIONS
from inferctl.models import hub
from inferctl.models import model as model_folder

_STANDARD = "t4,l4,a100-40gb-sxm,h100-sxm"
_TEXTS = "mixed"

EPILOG = """\b
Examples:
  # Choose between a T4 and half an A100, and see what ten million texts cost
  inferctl estimate --model DIR --hardware t4,a100-40gb-mig-3g.20gb --rate 500 --slo-p99-ms 100 --texts 10M
  # Estimate full load from a config.json, for texts of 128 tokens
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
        options.hardware_option(f"Estimate this hardware; repeatable. [default: the spec's, else {_STANDARD}]"),
    ] = None,
    precision: Annotated[
        list[str] | None,
        options.precision_option(
            "Estimate auto, fp32, fp16, bf16 or int8; repeatable. [default: the spec's, else auto]"
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
    texts: Annotated[
        str | None, typer.Option(metavar="N", help="Print the cost of N texts, such as 10M or 250k. [default: 1M]")
    ] = None,
    inputs: Annotated[int, typer.Option(metavar="N", min=1, max=2048, help="Set the number of texts per request.")] = 1,
    api_processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=64, help="Assume N API processes. [default: the spec's, else 1]"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Estimate which hardware is the cheapest, with replicas, latency and cost.

    Every figure is estimated from published results, not measured. Lists accept commas: --hardware t4,l4.
    """
    if corpus is not None and length is not None:
        raise UsageError("`--corpus` and `--length` exclude each other: both set the input lengths", "pass one of them")

    def estimated(spec: Spec | None, file: Path) -> dict[str, Any]:
        data = forecast.read_config(file)
        tokens, token_source = _tokens(corpus, length, file, _max_tokens(data))
        processes = api_processes or (spec.serve.least_api_processes if spec else 1)
        batch_tokens = spec.serve.max_batch_tokens if spec else 16_384
        work = forecast.Scenario(tokens, inputs, batch_tokens, api_processes=processes)
        question = Question(rate, slo or (spec.slo.p99_ms if spec else None), _count(texts))
        keys = _split(hardware) or (spec.hardware if spec else []) or _STANDARD.split(",")
        known = [options.known(name, ("auto", *PRECISIONS), "--precision") for name in _split(precision)]
        precisions = known or [spec.serve.precision if spec else "auto"]
        with console.progress("estimating"):
            result = document.build(keys, precisions, data, work, question)
        result["tokens"] |= {"how": token_source, "assumed": corpus is length is None}
        if not result["rows"]:
            reasons = dict.fromkeys(absent["reason"] for absent in result["absent"])
            raise UsageError("\n".join(reasons), result["absent"][0]["hint"])
        return result

    models, results = _models(spec_file, model, config), []
    for spec, file in models:
        try:
            results.append(estimated(spec, file))
        except UsageError as error:
            if len(models) == 1:
                raise
            results.append({"rows": [], "absent": [{"reason": error.message, "hint": error.hint}]})
    if as_json:
        named = [{"name": spec and spec.name, **result} for (spec, _), result in zip(models, results, strict=True)]
        console.document({"schema": document.SCHEMA, "models": named} if len(models) > 1 else results[0])
        return
    for (spec, _), result in zip(models, results, strict=True):
        if spec and len(models) > 1:
            console.report(Text(f"\n{spec.name}, with the hardware for itself\n", style="bold underline"))
        console.report(render(result) if result["rows"] else Text(f"not estimated: {result['absent'][0]['reason']}"))
    if len(models) > 1:
        console.report(Text("\n`inferctl check` says on which hardware their memory fits together"))


def _models(spec_file: Path | None, model: str | None, config: Path | None) -> list[tuple[Spec | None, Path]]:
    """Return the spec of each model, or None without one, and the path of its `config.json`."""
    if config is not None:
        spec = options.load(spec_file, {}).spec if options.names_model(spec_file, {}) and model is None else None
        return [(spec, config)]
    if not options.names_model(spec_file, {"model.source": model}):
        raise UsageError("no model specified", "pass `--model DIR`, or `--config FILE` with its config.json")
    resolved = options.load(spec_file, {"model.source": model}, several=True)
    return [(spec, _config(spec)) for spec in resolved.spec.each()]


def _config(spec: Spec) -> Path:
    """Return the path of a model's `config.json`."""
    folder = Path(spec.model.source)
    # The weights are not needed, so the folder may lack them.
    if model_folder.is_folder(folder) and (folder / "config.json").is_file():
        return folder / "config.json"
    if (found := hub.cached(spec.model.source, spec.model.revision)) is not None:
        return found.path / "config.json"
    if not model_folder.is_hub_id(spec.model.source):
        return model_folder.find(spec.model.source).path / "config.json"
    names = ("config.json", "tokenizer.json", "modules.json")
    try:
        return hub.small_files(spec.model.source, spec.model.revision, names) / "config.json"
    except NotReadyError as error:
        raise NotReadyError(error.message, f"{error.hint}, or `--config FILE` with its config.json") from None


def _max_tokens(config: dict[str, Any]) -> int:
    """Return the limit of tokens per input. The positions of RoBERTa start after the padding index."""
    positions = config.get("max_position_embeddings")
    offset = 2 if str(config.get("model_type", "")) in ("roberta", "xlm-roberta", "mpnet", "camembert") else 0
    return int(positions) - offset if isinstance(positions, int) and positions > offset else 512


def _tokens(corpus: str | None, length: str | None, config: Path, max_tokens: int) -> tuple[list[int], str]:
    if length is not None:
        return lengths.parse(length, max_tokens, calibration.load().mean_length, 20_000), f"drawn: {length}"
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


def _count(text: str | None) -> int | None:
    """Return the number of texts of `--texts`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text, re.IGNORECASE)
    count = float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[found[2].lower()] if found else 0
    if not 1 <= count <= 10**15:
        raise UsageError(f"invalid --texts {text!r}", "pass a number such as 10M, 250k or 1.5B")
    return round(count)


def _split(values: list[str] | None) -> list[str]:
    """Split `a,b` and repeated options into one list."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def render(result: dict[str, Any]) -> RenderableType:
    """Return the conclusion, the table, data sources, prices and limitations, 80 columns wide."""
    rate, slo, texts = result["load"], result["slo_p99_ms"], result["texts"]
    headings = ["hardware", "runs as"]
    headings += ["replicas\nat least", "USD/h\nat least"] if rate else ["hours\nat least"] if texts else []
    headings += [f"USD for\n{_compact(texts or 10**6)} texts\nat least"]
    headings += ["req/s at\nthe SLO\nat most" if slo else "offline\ntexts/s\nat most"]
    headings += [f"{'' if rate else 'single'}\np99 ms\nat least"]
    table = console.table(headings, whole=("hardware",), right=headings[2:], narrow=True)
    for row in result["rows"]:
        cost = _lowest(row)
        cells = [cost.get("usd" if texts else "usd_per_million_texts")]
        if rate:
            cells = [row["replicas"], cost.get("usd_per_hour_of_all"), *cells]
        elif texts:
            cells = [row.get("hours"), *cells]
        cells += [row["highest_rate" if slo else "offline_texts_per_s"]]
        cells += [row["load"]["p99_ms"] if rate else row["single_ms"]["p99"]]
        table.add_row(row["hardware"], row["precision"], *map(_shown, cells))
    head = Text(f"estimated, not measured: {_summary(result)}", style="bold")
    return Group(head, Text(), *map(Text, conclusion(result)), Text(), table, Text(), *map(Text, lines(result)))


def conclusion(result: dict[str, Any]) -> list[str]:
    """Return what to choose, and how certain that is."""
    decided, mean = result["verdict"], result["tokens"]["mean"]
    if decided is None:
        able = [_named(row) for row in result["rows"] if row["replicas"]]
        return [f"The catalog has no price of {', '.join(able)}." if able else "None of this hardware can serve this."]
    found, other = [_costs(result)], decided["next"]
    if other:
        found.append(
            f"{_named(other)} costs {other['times']:.2f} times as much, by these bounds. {_margin(result)}"
            if other["times"] > 1
            else f"{_named(other)} costs as much, by these bounds."
        )
        capped = [row for row in result["rows"] if row["limited_by"] == "front end" and row["replicas"]]
        if names := [_named(row) for row in capped if not result["load"] or row["replicas"]["low"] > 1]:
            found.append(f"API processes limit {', '.join(names)}: `--api-processes 4` compares the GPUs.")
    for row in result["rows"]:
        if row["replicas"] and not row["costs"]:
            found.append(f"{_named(row)} is not compared: the catalog has no price.")
        elif row["precision"] == "int8" != decided["precision"]:
            found.append(f"{_named(row)} is not compared: TensorRT ran it, and the server's int8 is slower than fp16.")
    if result["tokens"]["assumed"]:
        found.append(f"{mean:.0f} tokens per text are assumed: pass `--length` with the mean length of your texts.")
    return found


def _costs(result: dict[str, Any]) -> str:
    """Return the replicas and the totals of the cheapest hardware."""
    load, decided = result["load"], result["verdict"]
    row = next(row for row in result["rows"] if _named(row) == _named(decided))
    cost = _lowest(row)
    if load:
        count = int(row["replicas"]["low"])
        parts = [f"{count} replica{'s' * (count > 1)}", f"{_money(cost['usd_per_hour_of_all'])} USD per hour"]
    else:
        parts = [f"{_money(cost['usd_per_million_texts'])} USD per million texts at full load"]
    if result["texts"]:
        parts.append(
            f"{_compact(result['texts'])} texts in {_short(row['hours']['low'])} hours for {_money(cost['usd'])} USD"
        )
    name = _named(decided)
    if decided["next"]:
        name = f"Cheapest: {name}" if decided["clear"] else f"No clear difference. The lowest cost has {name}"
    return f"{name}, at least {', '.join(parts)}."


def _lowest(row: dict[str, Any]) -> dict[str, Any]:
    """Return the costs of the provider with the lowest price; empty if the catalog has no price."""
    return min(row["costs"], key=lambda each: float(each["usd_per_hour"]), default={})


def _margin(result: dict[str, Any]) -> str:
    """Return how far the cheapest may miss its bound."""
    decided = result["verdict"]
    share, count = f"{100 * decided['share_needed']:.0f}% of its bound", decided.get("replicas_at_most")
    condition = f"it reaches {share}"
    if count:
        each = f"{_short(result['load']['rate'] / count)} requests/s ({share})"
        condition = f"{count} replicas, each with {each}, suffice" if count > 1 else f"one replica reaches {each}"
    return (
        f"Real servers are slower. {_named(decided)} stays cheaper if {condition}, even if the other reaches its bound."
    )


def _compact(count: int) -> str:
    """Return 10M for ten million."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:g}{unit}"
    return str(count)


def _money(value: dict[str, Any]) -> str:
    return f"{value['low']:,.2f}" if value["low"] >= 0.1 else f"{value['low']:.2g}"


def _shown(value: dict[str, Any] | None) -> str:
    """Return a figure; the heading of its column says which bound it is."""
    return "-" if value is None else _short(value["low"] if value["high"] is None else value["high"])


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def _summary(result: dict[str, Any]) -> str:
    load, slo = result["load"], result["slo_p99_ms"]
    parts = [f"{result['tokens']['mean']:.0f} tokens per text on average"]
    if load:
        parts.append(f"{load['rate']:g} requests/s")
    if slo:
        parts.append(f"p99 within {slo:g} ms")
    return ", ".join(parts)


def lines(result: dict[str, Any]) -> list[str]:
    """Return the lines below the table: data sources, reasons for bounds, prices, limitations."""
    rows, slo = result["rows"], result["slo_p99_ms"]
    output = [f"{_named(row)}: based on {row['rests_on']}" for row in rows]
    output += [
        f"{_named(row)}: no rate has a p99 within {slo:g} ms" for row in rows if slo and not row["highest_rate"]["high"]
    ]
    output += [
        f"{_named(row)}: no p99, since {'each of so many replicas' if row['replicas']['low'] > 1 else 'one replica'} "
        "would work without a pause"
        for row in rows
        if result["load"] and row["replicas"] and row["load"]["saturated"]
    ]
    output += [f"not estimated: {absent['reason']}" for absent in result["absent"]]
    because = list(dict.fromkeys(reason for row in rows for reason in row["bounded_by"]))
    output += ["", "only bounds, because of", *(f"- {reason}" for reason in because)]
    if front := [row for row in rows if row["limited_by"] == "front end"]:
        limit = result["front_end"]
        output.append(
            f"- front end: {limit['api_processes']} API process{'es' * (limit['api_processes'] > 1)} of"
            f" {', '.join(map(_named, front))} can serve {_short(limit['texts_per_s'])} texts/s in requests of"
            f" {limit['texts_per_request']} (measured: {limit['machine']})"
        )
    if priced := _prices(rows):
        output += ["", *priced]
    notes = list(dict.fromkeys(note for row in rows for note in row["notes"]))
    return [*output, "", f"input lengths: {result['tokens']['how']}", *notes]


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
    found = [*dict.fromkeys(prices), *(f"[{number}] {source}" for source, number in sources.items())]
    if any(" of " in cost["instance"] for row in rows for cost in row["costs"]):
        found.append("a part of a machine has that part of its price: true only if other work pays for the rest")
    return found


def _named(row: dict[str, Any]) -> str:
    return f"{row['hardware']} in {row['precision']}"
