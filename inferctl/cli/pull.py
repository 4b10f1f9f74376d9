"""`inferctl pull`: pull an image. A missing image and an unreachable registry are different results."""

from __future__ import annotations

from typing import Annotated

import typer

from inferctl.cli import console
from inferctl.cli.options import Json
from inferctl.image.failures import MissingImageError
from inferctl.image.image_name import full_reference

EPILOG = """\b
Examples:
  # Pull the published image, if there is one
  baseline=$(inferctl pull --if-exists registry.example.com/ml/minilm:main)
"""


def pull(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="Name of the image, such as registry.example.com/team/name:tag.")
    ],
    if_exists: Annotated[
        bool,
        typer.Option("--if-exists", help="Print nothing and exit with 0 if the registry has no such image."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Pull an image and print its name@digest.

    If the registry does not respond or denies access, the exit code is 3, also with --if-exists.
    """
    from inferctl.image.docker import DockerEngine

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
