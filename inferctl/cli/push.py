"""`inferctl push`: push an image of the local engine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from inferctl.cli import console
from inferctl.cli.build_view import BuildView
from inferctl.cli.options import Json
from inferctl.image.image_name import full_reference


def push(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="Name of the image, such as registry.example.com/team/name:tag.")
    ],
    as_json: Json = False,
) -> None:
    """Push an image and print its name@digest.

    Example: inferctl push registry.example.com/ml/minilm:bf16
    """
    from inferctl.image.docker import DockerEngine
    from inferctl.image.publish import push_named

    name = full_reference(reference)
    engine = DockerEngine.connect()
    with BuildView(live=sys.stderr.isatty()) as view:
        outcome = view.follow(push_named(engine, name))
    if as_json:
        console.document(outcome.document())
    else:
        console.data(outcome.digest or reference)
