"""`inferctl serve`: run the server of a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from inferctl.cli import console, download, lazy, options
from inferctl.core.errors import needs_packages
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
"""


@options.with_settings(*main.SETTINGS.values())
def serve(
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
    image_reference: Annotated[
        str | None, typer.Option(hidden=True, help="Set the image reference that /info returns.")
    ] = None,
    engine: options.Engine = "encoder",
    engines: options.Engines = None,
) -> None:
    """Serve embeddings, scores or generation with an OpenAI-compatible API.

    Generation runs on vLLM. Prints the effective precision on stderr. On SIGTERM, finishes the accepted requests and
    exits.
    """
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
        engines=engines,
        hang_seconds=hang_seconds,
        log=log,
        traces=tracing.enabled(os.environ),
    )
    spinner = console.progress if sys.stderr.isatty() else None
    raise typer.Exit(start.run(spec, server_options, console.note, download.fetch, spinner))
