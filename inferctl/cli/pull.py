"""`inferctl pull`: pull an image into the engine; tell a missing image from a registry that cannot be read."""

from __future__ import annotations

from typing import Annotated

import typer

from inferctl.cli import console
from inferctl.cli.options import Json


def pull(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="Name of the image, as in registry.example.com/team/name:tag.")
    ],
    if_exists: Annotated[
        bool,
        typer.Option("--if-exists", help="If the registry has no such image, print nothing and exit with 0."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Pull an image and print its name@digest.

    A registry that does not respond or denies access is always an error.

    Example: baseline=$(inferctl pull --if-exists registry.example.com/ml/minilm:main)
    """
    from inferctl.cli.build import full_reference
    from inferctl.image.docker import DockerEngine
    from inferctl.image.failures import MissingImageError

    name = full_reference(reference)
    pulled: str | None = None
    try:
        with console.progress(f"pulling {name}"):
            pulled = DockerEngine.connect().pull(name)
    except MissingImageError as error:
        if not if_exists:
            raise
        console.note(error.message)
    if as_json:
        console.document({"pulled": pulled})
    elif pulled:
        console.data(pulled)
