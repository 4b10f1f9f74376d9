"""`inferctl embed`: embed files of any length without a server, and continue where a run was interrupted."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import typer

from inferctl.cli import completion, console, download, embed_view, lazy, options
from inferctl.cli.bench import ApiKeyEnv, ServedModel
from inferctl.cli.bench_options import AccessOptions
from inferctl.config.settings import flag
from inferctl.core import outputs
from inferctl.core.errors import UsageError, needs_packages
from inferctl.models.model import resolve_task

if TYPE_CHECKING:
    from inferctl.bench.load.http_json import ServerAccess
    from inferctl.config.spec import Spec, Task
    from inferctl.embed.computer import Computer
    from inferctl.embed.job import Job
    from inferctl.reading.outputs import Output

Result = TypeVar("Result")
_HARDWARE = ("t4", "l4", "a100-40gb-sxm", "h100-sxm")

EPILOG = """\b
Examples:
  # Count the texts, and see what they take here and on other hardware
  inferctl embed 'docs/*.jsonl' --model ./all-MiniLM-L6-v2 --dry-run
  # Plan a change from another model: time by a receipt, and the bytes of both stores
  inferctl embed 'docs/*.jsonl' --model NEW --dry-run --receipt l4.json --replaces vectors/receipt.json
  # Write Parquet shards; after an interruption, the same command continues
  inferctl embed 'docs/*.jsonl' --model ./all-MiniLM-L6-v2 --output vectors
  # Read other columns of a CSV file, and write float16
  inferctl embed docs.csv --text body --id url --dtype float16 --model DIR --output vectors
  # Score pairs with a reranker
  inferctl embed pairs.parquet --text question,answer --model ./reranker --output scores
  # Send the texts to a server, as bulk requests, which let others pass
  inferctl embed 'docs/*.jsonl' --url http://10.0.0.7:8080 --api-key-env BATCH_KEY --output vectors
  # Be the second of four processes that share a folder
  inferctl embed 'docs/*.jsonl' --model DIR --output /shared/vectors --part 1/4
  # Use a Ray cluster whose nodes share the folders
  inferctl embed 'docs/*.jsonl' --model DIR --output /shared/vectors --ray 10.0.0.5:6379
"""
_SETTINGS = ("precision", "allow_inaccurate", "max_batch_tokens", "max_input_tokens")


@options.with_settings("model.source", *(f"serve.{name}" for name in _SETTINGS))
def embed(
    flags: options.Flags,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files of .jsonl, .csv or .parquet, patterns, or - for JSON lines."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write the shards into this folder.")
    ] = None,
    spec_file: options.SpecFile = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Read texts from this column, pairs from two. [default: text; pairs: query,document]"
        ),
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option("--id", metavar="COLUMN", help="Read ids from this column. [default: id, else row numbers]"),
    ] = None,
    returned: Annotated[
        str | None,
        typer.Option(
            "--outputs",
            metavar="NAMES",
            autocompletion=completion.one_of("dense", "sparse", "tokens"),
            help="Compute dense, sparse or tokens, or several. [default: the model's first]",
        ),
    ] = None,
    input_type: Annotated[
        Literal["query", "document"] | None, typer.Option(help="Embed the texts as queries or as documents.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put this text before each input. [default: the model's]")
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option("--truncate/--no-truncate", help="Truncate inputs that are too long, or list them as errors."),
    ] = True,
    format_: Annotated[
        Literal["parquet", "npy", "jsonl"], typer.Option("--format", help="Write shards in this format.")
    ] = "parquet",
    dtype: Annotated[
        Literal["float32", "float16", "bits"], typer.Option(help="Write the numbers of vectors in this type.")
    ] = "float32",
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Compute part I (from 0) of N, in one of N processes that share DIR.")
    ] = "0/1",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Compute on this Ray cluster, whose nodes share the folders.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first row that cannot be computed, instead of listing it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count the rows, measure a sample, and print time and cost.")
    ] = False,
    hardware: Annotated[
        list[str] | None,
        options.hardware_option(
            f"With --dry-run: also estimate this. [default: the spec's, else {','.join(_HARDWARE)}]"
        ),
    ] = None,
    receipts: Annotated[
        list[Path] | None,
        typer.Option(
            "--receipt",
            metavar="FILE",
            help="With --dry-run: also use the rate of this receipt of `inferctl bench` or `embed`; repeatable.",
        ),
    ] = None,
    replaces: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --dry-run: add the vectors of the old model, by the receipt of their run."
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Send bulk requests to this server, instead of loading a model.")
    ] = None,
    api_key_env: ApiKeyEnv = None,
    served_model: ServedModel = None,
    device: options.Device = "auto",
    engine: options.Engine = "encoder",
    engines: options.Engines = None,
    range_rows: Annotated[int, typer.Option(hidden=True, min=1, max=2**20)] = 65_536,
    range_bytes: Annotated[int | None, typer.Option(hidden=True, min=1, max=2**30)] = None,
    as_json: options.Json = False,
) -> None:
    """Embed, score or classify the rows of files, into shards that vector stores can import.

    The same command continues a run that was interrupted. It does not if inputs or options changed. Rows that cannot be
    computed are listed in part-*.errors.jsonl.
    """
    if url is None:
        spec = options.load(spec_file, flags).spec
    elif unused := [name for name, value in {"spec": spec_file, **flags}.items() if value is not None]:
        raise UsageError(f"`{flag(unused[0])}` has no effect with `--url`: the server decides", "remove one of the two")
    if output is None and (not dry_run or "-" in inputs):
        raise UsageError("`--output` is missing", "name the folder of the shards: `--output DIR`")
    if (share := re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)) is None or int(share[1]) >= int(share[2]):
        raise UsageError(f"invalid --part {part!r}", "pass I/N with I from 0 to N - 1, such as 0/4")
    index, parts = int(share[1]), int(share[2])
    with needs_packages("`inferctl embed`", "serve"), lazy.deferred_signals():
        from inferctl.embed import job, manifest
    folder = output or Path()
    if output is not None:
        outputs.check_folder(output, "--output")
    if (receipts or replaces) and not dry_run:
        raise UsageError("--receipt and --replaces are of a plan", "pass `--dry-run` too")
    if "-" in inputs:
        spooled = str(manifest.spool(sys.stdin.buffer, folder))
        inputs = [spooled if name == "-" else name for name in inputs]
    asked: dict[str, Any] = {"role": input_type, "prompt": prompt, "truncate": truncate}
    if url is None:
        if api_key_env or served_model:
            raise UsageError("--api-key-env and --served-model are for servers", "pass `--url URL`, or remove them")
        source = _local(spec, returned, asked, device=device, engine=engine, engines=engines)
    elif dry_run:
        raise UsageError("`--dry-run` measures this machine", "remove `--url`, and name the model with `--model`")
    else:
        access = AccessOptions(api_key_env=api_key_env, served_model=served_model).access()
        source = _remote(url, access, returned, asked)
    pairs = source.task == "rerank"
    run_options = manifest.RunOptions(
        inputs=tuple(inputs),
        output=folder,
        texts=tuple((text or ("query,document" if pairs else "text")).split(",")),
        id=id_,
        format=format_,
        dtype=dtype,
        model=source.decisive,
        most_rows=range_rows,
        # The vectors of the tokens of a text have a hundred times its bytes.
        most_bytes=range_bytes or (2**20 if "tokens" in source.decisive["outputs"] else 8 * 2**20),
        strict=strict,
    )
    if len(run_options.texts) != 1 + pairs:
        raise UsageError(f"`--text {text}` does not name {1 + pairs} columns", f"the task is {source.task}")
    if dry_run:
        keys = [key for each in hardware or [] for key in each.split(",")] or spec.hardware or _HARDWARE
        known = [embed_view.measured(file, source.decisive["model_sha256"]) for file in receipts or ()]
        old = embed_view.sealed_run(replaces) if replaces else None
        found = _finish(embed_view.forecast(run_options, source.make(), Path(source.folder), keys, known, old))
        console.document(found) if as_json else console.report(embed_view.table(found))
        return
    work = job.Job(run_options, None if ray else source.make())

    def left() -> list[int]:
        return [number for number in work.missing() if number % parts == index]

    with console.progress("reading the inputs"):
        plan, missing = work.plan(), left()
    total = len(range(index, len(plan.ranges), parts))
    try:
        if missing and ray:
            with needs_packages("`--ray`", "ray"):
                from inferctl.embed import ray_pipeline
            # Ray prints messages of its nodes.
            with redirect_stdout(sys.stderr), console.progress("computing on the Ray cluster") as show:
                for count, _ in enumerate(ray_pipeline.run(ray, run_options, source.make, missing), 1):
                    show(f"{len(missing) - count:,} ranges are left for the Ray cluster")
        elif missing:
            _finish(_run(work, missing))
    finally:
        if missing and 0 < (count := len(left())) < total:
            console.note(f"{total - count:,} of {total:,} ranges are done: repeat the command to continue")
    receipt = work.finish(embed_view.price)
    summary = {"output": str(folder), "ranges": total, "complete": receipt is not None, "receipt": receipt}
    console.result(summary, embed_view.summary(summary), as_json=as_json)


class _Source(NamedTuple):
    """What computes: its task, what decides its rows, the folder of the model if it is here, and its computer."""

    task: Task
    decisive: dict[str, Any]
    make: Callable[[], Computer]
    folder: Path = Path()


def _local(spec: Spec, returned: str | None, asked: dict[str, Any], **machine: Any) -> _Source:
    from inferctl.embed import local
    from inferctl.reading import task_config
    from inferctl.reading.embedding_config import EmbeddingConfig

    model = download.fetch(spec.model.source, spec.model.revision)
    task = resolve_task(spec.model.task, model, spec.model.source)
    if task == "generate":
        raise UsageError(f"{spec.model.source} is a generative model", "name an encoder model with `--model`")
    config = task_config.read(task, model.path, spec.serve.max_input_tokens)
    possible: tuple[Output, ...] = config.outputs if isinstance(config, EmbeddingConfig) else ("dense",)
    if task == "rerank" and asked["prompt"] is not None and not config.takes_instruction:
        raise UsageError(f"{spec.model.source} reads no instruction", "remove `--prompt`")
    named = [options.known(name, possible, "--outputs") for name in returned.split(",")] if returned else []
    prompt = config.prompts.select(asked["prompt"], None, asked["role"])
    inputs: dict[str, Any] = {**asked, "outputs": tuple(named) or possible[:1], "prompt": prompt}
    settings = {name: getattr(spec.serve, name) for name in _SETTINGS}
    decisive = {"task": task, "model_sha256": model.digest, **settings, **inputs}
    make = partial(local.LocalComputer, spec, task, model, local.LocalOptions(**machine, **inputs))
    return _Source(task, decisive, make, model.path)


def _remote(url: str, access: ServerAccess, returned: str | None, asked: dict[str, Any]) -> _Source:
    from inferctl.bench.load.target import connect
    from inferctl.embed.remote import RemoteComputer

    server = connect(url, access=access)
    model = server.info.get("model") or {}
    if "dimensions" not in model or server.output != "dense" or returned not in (None, "dense"):
        message = f"`--url` computes dense vectors only, and on servers of inferctl only: {url}"
        raise UsageError(message, "name the model with `--model` to compute others here")
    decisive = {"task": "embed", "model_sha256": model["sha256"], **asked, "outputs": ("dense",)}
    return _Source("embed", decisive, partial(RemoteComputer, server, **asked))


async def _run(work: Job, missing: list[int]) -> None:
    """Compute ranges."""
    try:
        with console.progress("starting"):
            await work.start()
        with console.progress("computing") as show:
            rows = sum(work.plan().ranges[number].rows for number in missing)
            following = asyncio.create_task(embed_view.follow(work, rows, show))
            await work.run(missing)
            following.cancel()
    finally:
        await work.close()


def _finish(work: Coroutine[Any, Any, Result]) -> Result:
    """Run work to its end. A signal cancels it, and `KeyboardInterrupt` follows."""
    from inferctl.serve import event_loop

    with event_loop.runner() as runner:
        # The runner cancels at SIGINT. The handler of the command line raises at SIGTERM, maybe while a thread starts.
        runner.get_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
        return runner.run(work)
