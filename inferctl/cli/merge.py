"""`inferctl merge`: make one model of a base and a LoRA adapter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console, download
from inferctl.cli.options import Json, Revision
from inferctl.config.spec import Adapter
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.models import adapter_effect, hub
from inferctl.models import merge as merging
from inferctl.models.model import ModelFolder

EPILOG = """\b
Examples:
  # Write ./support, then serve it
  inferctl merge ./Qwen3-0.6B ./support-lora --output ./support && inferctl serve --model ./support
  # Download both
  inferctl merge Qwen/Qwen3-0.6B example/support-lora --output ./support
"""


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Model folder or hub id.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or hub id of an adapter of PEFT (LoRA).")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to create for the model.")],
    revision: Revision = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the model with the adapter in fp32.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the model that an adapter makes of its base, with the adapter in its weights.

    The files, number formats, tokenizer and configuration are those of the base. In fp32, the next tokens of the new
    model are compared with those of the adapter on its base. A merged model is faster than an adapter, but each one
    needs the memory of a whole model.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} already exists", "name a new folder")
    outputs.check_folder(output, "--output")
    folder = download.fetch(base, revision)
    wanted = [Adapter(name="adapter", source=adapter, revision=None)]
    (found,) = hub.fetch_adapters(wanted, folder, lambda source: hub.Lines(source, console.note))
    with download.shown(base, "merg") as progress:
        say = functools.cache(console.note)
        waiting = None if no_verify else lambda _seconds: say("comparing with the adapter in fp32")
        origin = merging.merge(folder, found, (base, adapter), output, progress, waiting)
    if not no_verify:
        console.note(adapter_effect.line(origin["next_tokens"]))
    merged = ModelFolder(output)
    document = {"folder": str(output), "model_sha256": merged.digest, **origin}
    console.result(document, str(output), as_json=as_json)
