"""`inferctl serve`: run the embeddings server, as a process or, with `--image`, as a container."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import options
from inferctl.errors import SpecError, UsageError

if TYPE_CHECKING:
    from inferctl.spec import Spec

EPILOG = """Examples: `inferctl serve --model ./all-MiniLM-L6-v2` serves a local folder on port 8080;
`inferctl serve --model DIR --precision bf16 --port 0 --announce ready.json` takes a free port and says which;
`inferctl serve --image registry.example.com/ml/minilm@sha256:...` runs a built image."""


def serve(
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
        str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N; auto takes a GPU when there is one.")
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
    image: Annotated[
        str | None, typer.Option(metavar="REF", help="Run this built image as a container instead of a process.")
    ] = None,
    image_reference: Annotated[
        str | None, typer.Option(hidden=True, help="What /info says of the image this runs in.")
    ] = None,
    engine: Annotated[
        str, typer.Option(hidden=True, help="encoder, or echo: no model, for measuring the rest.")
    ] = "encoder",
) -> None:
    """Serve embeddings over HTTP, OpenAI-compatible.

    Stops cleanly on SIGTERM: accepted requests finish first. Says on stderr which precision and attention really run.
    """
    flags = {
        "model.source": model,
        "name": name,
        "serve.precision": precision,
        "serve.host": host,
        "serve.port": port,
        "serve.max_batch_tokens": max_batch_tokens,
        "serve.max_input_tokens": max_input_tokens,
        "serve.max_queue_tokens": max_queue_tokens,
    }
    from inferctl.cli import console

    if image:
        from inferctl.image import server as container

        raise typer.Exit(container.run_server(image, _spec_of_image(image, spec_file, flags), console.note, announce))
    spec = options.load(spec_file, flags).spec
    try:
        from inferctl.serve import server
    except ModuleNotFoundError as error:
        raise UsageError(
            f"serving needs the package {error.name}, which is not installed", "pip install 'inferctl[serve]'"
        ) from None
    reference, _, digest = (image_reference or "").partition("@")
    chosen = server.Options(device, engine, truncate, announce, (reference, digest or None) if reference else None)
    raise typer.Exit(server.run(spec, chosen, console.note))


def _spec_of_image(image: str, spec_file: Path | None, flags: dict[str, Any]) -> Spec:
    """The spec for a container: an image with its own weights and settings needs none, so a missing file is no mistake."""
    try:
        return options.load(spec_file, flags).spec
    except SpecError:
        raise
    except UsageError:
        if spec_file or flags["model.source"]:
            raise
        return options.load(None, {**flags, "model.source": image}).spec
