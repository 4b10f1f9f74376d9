"""`inferctl serve`: run the server of a model as a process or, with `--image`, as a container."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from inferctl.cli import console, download, lazy, options
from inferctl.core.errors import UsageError, needs_packages
from inferctl.image.image_name import full_reference
from inferctl.models.image_source import is_image
from inferctl.serve import main
from inferctl.serve.options import ServerOptions

EPILOG = """\b
Examples:
  # Serve a local model folder on port 8080
  inferctl serve --model ./all-MiniLM-L6-v2
  # Use a free port and write its URL to ready.json
  inferctl serve --model DIR --precision bf16 --port 0 --announce ready.json
  # Serve a generative model with vLLM
  inferctl serve --model ./SmolLM2-135M-Instruct --max-context-tokens 2048
  # Let only those use it who have a key
  inferctl keys create team-a && inferctl serve --model DIR --host 0.0.0.0 --keys keys.json
  # Run a built image as a container
  inferctl serve --image registry.example.com/ml/minilm@sha256:...
"""


@options.with_settings(*main.SETTINGS.values())
def serve(
    context: typer.Context,
    flags: options.Flags,
    spec_file: options.SpecFile = None,
    device: options.Device = "auto",
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate/--no-truncate",
            help="Truncate inputs that are too long, or reject them with HTTP 400.",
        ),
    ] = True,
    announce: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write {url, pid} as JSON to FILE when the server is ready.")
    ] = None,
    hang_seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0.1,
            max=86_400,
            help="Restart the engine if a batch exceeds S seconds and 20 times its prediction.",
        ),
    ] = 60.0,
    log: Annotated[
        Literal["text", "json"],
        typer.Option(help="Log as text, or as json with one object per line and one line per request."),
    ] = "text",
    image: Annotated[
        str | None, typer.Option(metavar="REF", help="Run this image as a container instead of a process.")
    ] = None,
    image_reference: Annotated[
        str | None, typer.Option(hidden=True, help="Set the image reference that /info returns.")
    ] = None,
    published: Annotated[
        str | None, typer.Option(hidden=True, help="Set the HOST:PORT that forwards to this container.")
    ] = None,
    engine: options.Engine = "encoder",
    engines: options.Engines = None,
) -> None:
    """Serve embeddings, scores or generation with an OpenAI-compatible API.

    Generation runs on vLLM. Prints the effective precision on stderr. On SIGTERM, finishes the accepted requests and
    exits.
    """
    if image is not None:
        raise typer.Exit(_serve_image(image, spec_file, flags, _command_line_options(context), announce))
    spec = options.load(spec_file, flags, several=True).spec
    with needs_packages("`inferctl serve`", "serve"), lazy.deferred_signals():
        from inferctl.serve import start
        from inferctl.serve.observe import tracing
    for source in (one.model.source for one in spec.each()):
        if log == "json" and is_image(source):
            download.fetch(source, None)  # the server pulls no images
    server_options = ServerOptions(
        device=device,
        engine=engine,
        truncate=truncate,
        announce=announce,
        image=main.reference(image_reference),
        published=published,
        engines=engines,
        hang_seconds=hang_seconds,
        log=log,
        traces=tracing.enabled(os.environ),
    )
    spinner = console.progress if sys.stderr.isatty() else None
    raise typer.Exit(start.run(spec, server_options, console.note, download.fetch, spinner))


def _command_line_options(context: typer.Context) -> dict[str, Any]:
    """Return the options of the command line, without defaults, by parameter name."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _serve_image(
    image: str, spec_file: Path | None, flags: dict[str, Any], command_line: dict[str, Any], announce: Path | None
) -> int:
    from inferctl.image import serve_image

    # Rejects a reference that is no image name or id before the engine is called.
    full_reference(image)
    for name in {"image_reference", "published", "capacity"} & command_line.keys():
        option = f"--{name.replace('_', '-')}"
        instead = ", or serve without `--image`" if name == "capacity" else ": `--image` sets it"
        raise UsageError(f"`{option}` is not allowed with `--image`", f"remove `{option}`{instead}")
    has_model = options.names_model(spec_file, flags)
    # A spec requires a model, but an image needs none. The image name serves as a placeholder, which is not read.
    spec = options.load(spec_file, flags if has_model else {**flags, "model.source": image}, several=True).spec
    container_options = serve_image.ServeOptions(
        address=serve_image.Address(spec.serve.host, spec.serve.port),
        spec=spec if has_model else None,
        replaces_model="model" in command_line,
        keys=Path(spec.access.key_file) if spec.access.key_file else None,
        drain_seconds=spec.serve.grace_seconds + spec.serve.drain_seconds,
        arguments=main.arguments(command_line),
    )
    return serve_image.run_server(image, container_options, console.note, announce, download.weights)
