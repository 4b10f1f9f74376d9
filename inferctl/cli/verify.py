"""`inferctl verify`: check an existing image in the same way as `inferctl build` checks a new one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from inferctl.cli import console, download, options
from inferctl.cli.build_view import BuildView, show_verified

if TYPE_CHECKING:
    from inferctl.image.verify import Verified


EPILOG = """\b
Examples:
  # Check an image that contains its weights
  inferctl verify registry.example.com/ml/minilm:bf16
  # Check an image that mounts its weights
  inferctl verify registry.example.com/ml/minilm:bf16 --model DIR
"""


def verify(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="Name, name@digest or id of the image; pulled if absent.")
    ],
    spec_file: options.SpecFile = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="SOURCE", help="Mount the weights of this model folder or hub id."),
    ] = None,
    ready_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.1, max=86_400, help="Wait up to SECONDS for the started image to be ready."
        ),
    ] = 900.0,
    network: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run the containers on the network of the host (`host`).")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Start an image, compare its output for eight texts with fp32, and print the image id.

    The image does not change. If it mounts its weights, they come from --model or from the spec.
    """
    from inferctl.image import container, lint
    from inferctl.image.docker import DockerEngine
    from inferctl.image.plan import raise_for
    from inferctl.image.verify import VerifyOptions
    from inferctl.image.verify import verify as verified

    network = options.network_of(network)
    engine = DockerEngine.connect()
    image = container.get_or_pull(engine, reference, console.note)
    container.check_inferctl_image(image, reference)
    findings = lint.check_built_image(image.environment, image.user, None)
    for finding in findings:
        console.warn(finding.text())
    raise_for([finding for finding in findings if finding.level == "error"])
    has_model = options.names_model(spec_file, {"model.source": model})
    spec = options.load(spec_file, {"model.source": model}).spec if has_model else None
    folder = container.weights(
        image,
        container.ServeOptions(
            address=container.Address("127.0.0.1", 0),
            model=spec.model.source if spec else None,
            revision=spec.model.revision if spec else None,
            replaces_model=model is not None,
        ),
        download.fetch,
    )
    checks = VerifyOptions(
        model=folder,
        network=network,
        gpu=engine.info().gpu and "NVIDIA_VISIBLE_DEVICES" in image.environment,
        ready_seconds=ready_timeout,
        compare=image.labels.get("io.inferctl.model.weights") != "download",
    )
    with BuildView(live=sys.stderr.isatty()) as view:
        result = view.follow(verified(engine, image, checks))
    show_verified(result)
    _print(reference, image.id, result, as_json)


def _print(reference: str, image: str, result: Verified, as_json: bool) -> None:
    if as_json:
        console.document({"image": image, "reference": reference, "verified": result.document()})
    else:
        console.data(image)
