"""`inferctl serve`: run the embeddings server, as a process or, with `--image`, as a container."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from inferctl.cli import completion, options
from inferctl.errors import NotReadyError, UsageError

EPILOG = """Examples: `inferctl serve --model ./all-MiniLM-L6-v2` serves a local folder on port 8080;
`inferctl serve --model DIR --precision bf16 --port 0 --announce ready.json` takes a free port and says which;
`inferctl serve --image registry.example.com/ml/minilm@sha256:...` runs a built image."""


def serve(
    context: typer.Context,
    spec_file: options.SpecFile = None,
    model: options.ModelSource = None,
    precision: options.PrecisionOption = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model in the API; default is the model's own.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all. Default is 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port to listen on; 0 takes a free one. Default is 8080.")
    ] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of one forward pass at most.")
    ] = None,
    max_input_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of one input at most; default is the model's.")
    ] = None,
    max_queue_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens waiting at most; beyond it the answer is 429.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.one_of("auto", "cpu", "cuda"),
            help="auto, cpu, cuda or cuda:N; auto takes a GPU when there is one.",
        ),
    ] = "auto",
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate/--no-truncate",
            help="Cut inputs that are too long, or answer 400. A request's own `truncate` wins.",
        ),
    ] = True,
    announce: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write {url, pid} to FILE as JSON once the server is ready.")
    ] = None,
    capacity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measured capacity (JSON) that admission starts from, before it has seen load."
        ),
    ] = None,
    hang_seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0.1,
            max=86_400,
            help="Start the engine again when a batch takes this long, or 20 times what it should.",
        ),
    ] = 60.0,
    log: Annotated[
        str,
        typer.Option(
            metavar="STYLE",
            autocompletion=completion.one_of("text", "json"),
            help="text, or json: one object a line, one line a request.",
        ),
    ] = "text",
    image: Annotated[
        str | None, typer.Option(metavar="REF", help="Run this built image as a container instead of a process.")
    ] = None,
    image_reference: Annotated[
        str | None, typer.Option(hidden=True, help="What /info says of the image this runs in.")
    ] = None,
    engine: Annotated[
        str, typer.Option(hidden=True, help="encoder, or echo: no model, for measuring the rest.")
    ] = "encoder",
    engines: Annotated[
        int | None, typer.Option(hidden=True, min=1, max=64, help="Engine processes; default is one a GPU, or one.")
    ] = None,
) -> None:
    """Serve embeddings over HTTP, OpenAI-compatible.

    Stops cleanly on SIGTERM: accepted requests finish first. Says on stderr which precision and attention really run.
    """
    from inferctl.cli import console, download
    from inferctl.serve import main

    flags = {path: context.params[option] for option, path in main.SETTINGS.items()}

    if image is not None:
        raise typer.Exit(_serve_image(image, spec_file, flags, _given(context), announce))
    spec = options.load(spec_file, flags).spec
    try:
        from inferctl.serve import server, tracing
    except ModuleNotFoundError as error:
        raise NotReadyError(
            f"serving needs the package {error.name}, which is not installed", "pip install 'inferctl[serve]'"
        ) from None
    chosen = server.ServerOptions(
        device=device,
        engine=engine,
        truncate=truncate,
        announce=announce,
        image=main.reference(image_reference),
        engines=engines,
        hang_seconds=hang_seconds,
        capacity=capacity,
        log=log,
        traces=tracing.enabled(os.environ),
    )
    raise typer.Exit(server.run(spec, chosen, console.note, download.fetch))


def _given(context: typer.Context) -> dict[str, Any]:
    """The options that the command line itself gives, by parameter."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _serve_image(
    image: str, spec_file: Path | None, flags: dict[str, Any], given: dict[str, Any], announce: Path | None
) -> int:
    from inferctl.cli import console, download
    from inferctl.cli.build import full_reference
    from inferctl.image import container
    from inferctl.serve import main

    # Refuses what is neither a name nor an id before the engine is asked.
    full_reference(image)
    if "image_reference" in given:
        raise UsageError("--image-reference cannot be given with --image", "leave it out: it is told to the container")
    if "capacity" in given:
        raise UsageError("--capacity cannot be given with --image", "it is of another server; leave it out")
    known = options.names_model(spec_file, flags)
    # Settings are of a whole spec, and a spec names a model. An image needs neither: its name stands in, and nothing reads it.
    spec = options.load(spec_file, flags if known else {**flags, "model.source": image}).spec
    wanted = container.ServeOptions(
        address=container.Address(spec.serve.host, spec.serve.port),
        model=spec.model.source if known else None,
        revision=spec.model.revision if known else None,
        replaces_model="model" in given,
        drain_seconds=spec.serve.grace_seconds + spec.serve.drain_seconds,
        arguments=main.arguments(given),
    )
    return container.run_server(image, wanted, console.note, announce, download.fetch)
