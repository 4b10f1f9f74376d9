"""`inferctl convert`: make a model folder that can be served of one with pickles or without tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console, download
from inferctl.cli.options import Json, Revision
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.models import convert as conversion
from inferctl.models import hub
from inferctl.models import model as model_folder
from inferctl.models.model import ModelFolder

EPILOG = """\b
Examples:
  # Write ./labse-safe, then serve it
  inferctl convert ./LaBSE ./labse-safe && inferctl serve --model ./labse-safe
  # Download BGE-M3 and convert it
  inferctl convert BAAI/bge-m3 ./bge-m3
"""


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Model folder or hub id.")],
    folder: Annotated[Path, typer.Argument(metavar="NEW_FOLDER", help="Folder to create for the converted model.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Convert pytorch_model.bin to safetensors, and write a missing tokenizer.json.

    Also writes the layers of BGE-M3 for its other outputs, and unites the folders of a Router. Runs no code of the
    model. A pickle that contains anything but tensors is rejected.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already exists", "name a new folder")
    outputs.check_folder(folder, "NEW_FOLDER")
    if model_folder.is_hub_id(source):
        with download.shown(source) as progress:
            place = hub.download(source, revision, progress)
    else:
        place = _local(source)
    if not conversion.needed(ModelFolder(place)):
        raise UsageError(
            f"{source} has safetensors and tokenizer.json, so there is nothing to convert",
            f"use it as it is: `inferctl serve --model {source}`",
        )
    with download.shown(source, "convert") as progress:
        found = conversion.convert(place, folder, progress)
    console.result({"folder": str(found.path), "model_sha256": found.digest}, str(found.path), as_json=as_json)


def _local(source: str) -> Path:
    """Return the folder `source`. Raises `UsageError` if it is not a model."""
    try:
        return model_folder.find(source).path
    except model_folder.UnconvertedError as error:
        return error.folder
