"""`inferctl verify`: check an existing image as `inferctl build` checks a new one, or a server or a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inferctl.cli import build_view, console, download, options
from inferctl.cli.build_view import show_compared, show_verified
from inferctl.core.errors import UsageError
from inferctl.models import model as model_folder
from inferctl.models.reference_process import LIBRARIES

if TYPE_CHECKING:
    from inferctl.bench.load.target import ServerConnection
    from inferctl.config.settings import Resolved
    from inferctl.image.library import LibraryComparison


EPILOG = """\b
Examples:
  # Check an image that contains its weights
  inferctl verify registry.example.com/ml/minilm:bf16
  # Check an image that mounts its weights
  inferctl verify registry.example.com/ml/minilm:bf16 --model DIR
  # Compare what a server of a model folder computes with sentence-transformers
  inferctl verify --model DIR --precision fp32 --against sentence-transformers
  # Compare a running server
  inferctl verify --url http://10.0.0.7:8080 --against sentence-transformers
"""


def verify(
    reference: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="Name, name@digest or id of the image; pulled if absent.")
    ] = None,
    spec_file: options.SpecFile = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="SOURCE", help="Use the weights of this model folder or hub id."),
    ] = None,
    against: Annotated[
        Literal["sentence-transformers", "transformers"] | None,
        typer.Option(help="Compare also with this library, from raw text; a classifier with transformers."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Compare this running server; --model names its folder on this machine."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Send the API key in this variable to the --url server.")
    ] = None,
    precision: options.PrecisionOption = None,
    ready_timeout: options.ReadySeconds = 900.0,
    network: options.Network = None,
    as_json: options.Json = False,
) -> None:
    """Start an image, compare its output with fp32, and print the image id.

    The image does not change. If it mounts its weights, they come from --model or from the spec. Without an image,
    --against compares a running server (--url), or starts a server for --model or the spec.
    """
    from inferctl.image import library

    if url is not None and reference is None and against is None:
        raise UsageError("`--url` needs the library to compare with", "add `--against sentence-transformers`")
    if reference is None and against is None:
        hint = "name one, or compare a model folder: `inferctl verify --model DIR --against sentence-transformers`"
        raise UsageError("`inferctl verify` has no image", hint)
    if reference is not None and reference.startswith((".", "/")):
        hint = f"compare a model folder with `inferctl verify --model {reference} --against sentence-transformers`"
        raise UsageError(f"{reference} is a path, not the name of an image", hint)
    if reference is not None and url is not None:
        raise UsageError("an image and `--url` are two servers", "remove one of them")
    if precision is not None and (reference is not None or url is not None):
        raise UsageError("`--precision` applies only to a server that this command starts", "remove it")
    if against:
        library.require(against)
    if reference is not None:
        _verify_image(reference, spec_file, model, ready_timeout, network, as_json, against)
        return
    if url is not None:
        found = _compare_running(url, model, api_key_env, against)
    else:
        spec = options.load(spec_file, {"model.source": model, "serve.precision": precision})
        found = _compare_started(spec, against)
    if as_json:
        console.document({"url": url, "library": asdict(found)})
    else:
        show_compared(found)


def _compare_running(url: str, model: str | None, api_key_env: str | None, against: str | None) -> LibraryComparison:
    """Compare the server at `url` with `model`, or on the same machine with the folder that it reports."""
    from inferctl.bench.load.target import connect
    from inferctl.cli.bench_options import AccessOptions

    server = connect(url, access=AccessOptions(api_key_env=api_key_env).access())
    try:
        folder = model_folder.find(model or str((server.info.get("model") or {}).get("source") or server.model))
    except UsageError as error:
        raise UsageError(error.message, f"pass the folder that {against} loads: `--model DIR`") from None
    return _compare(_outputs(server, against), server, folder.path)


def _compare_started(resolved: Resolved, against: str | None) -> LibraryComparison:
    """Start a server of the spec, stop it after its output, and compare that with the model of the spec."""
    from inferctl.bench.load import child_server

    model = resolved.spec.model
    folder = download.fetch(model.source, model.revision).path
    spec_file = Path(resolved.file) if resolved.file else None
    starting = child_server.serve_folder(folder, resolved.spec.name, resolved.spec.serve.precision, spec_file)
    with console.progress("starting the server"), starting as server:
        outputs = _outputs(server, against)
    return _compare(outputs, server, folder)


def _check_library(task: str, against: str | None) -> None:
    """Raise `UsageError` unless the library computes the task."""
    wanted = LIBRARIES.get(task)
    if wanted is None:
        raise UsageError(f"no library computes the task {task} for a comparison", "remove `--against`")
    if wanted != against:
        raise UsageError(f"{against} does not compute the task {task}", f"pass `--against {wanted}`")


def _outputs(server: ServerConnection, against: str | None) -> Sequence[object]:
    from inferctl.image.library import TEXTS
    from inferctl.image.output_checks import QUERY

    _check_library(server.task, against)
    return server.request([QUERY, *TEXTS] if server.task == "rerank" else list(TEXTS))


def _compare(outputs: Sequence[object], server: ServerConnection, folder: Path) -> LibraryComparison:
    from inferctl.image import library

    with console.progress(f"computing the texts with {LIBRARIES[server.task]}"):
        return library.compare(outputs, {**server.info, "task": server.task}, folder)


def _verify_image(
    reference: str,
    spec_file: Path | None,
    model: str | None,
    ready_timeout: float,
    network: str | None,
    as_json: bool,
    against: str | None,
) -> None:
    from inferctl.image import lint, serve_image
    from inferctl.image.docker import DockerEngine
    from inferctl.image.plan import raise_for
    from inferctl.image.verify import VerifyOptions
    from inferctl.image.verify import document as verification
    from inferctl.image.verify import verify as verified

    engine = DockerEngine.connect()
    image = serve_image.get_or_pull(engine, reference, console.note)
    serve_image.check_inferctl_image(image, reference)
    findings = lint.check_built_image(image.environment, image.user)
    for finding in findings:
        console.warn(finding.text())
    raise_for([finding for finding in findings if finding.level == "error"])
    has_model = options.names_model(spec_file, {"model.source": model})
    spec = options.load(spec_file, {"model.source": model}, several=True).spec if has_model else None
    mounts = serve_image.weights(image, spec, download.weights, replaces_model=model is not None and not against)
    compared = {}
    if against:
        # Weights in the image are not on this machine, so the library gets those that the user names.
        if spec is None:
            raise UsageError(
                f"{reference} contains or downloads its weights, and {against} needs them here", "pass `--model DIR`"
            )
        compared = {
            each.name if spec.models else "": download.fetch(each.model.source, each.model.revision).path
            for each in spec.each()
        }
    checks = VerifyOptions(
        mounts=mounts,
        network=network,
        ready_seconds=ready_timeout,
        library_models=compared,
        requires_library=True,
    )
    results = build_view.follow(verified(engine, image, checks))
    for result in results:
        if against:
            _check_library(result.task, against)
        show_verified(result, several=len(results) > 1)
    document = {"image": image.id, "reference": reference, "verified": verification(results)}
    console.result(document, image.id, as_json=as_json)
