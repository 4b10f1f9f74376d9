"""`inferctl merge`: make one model of a base and a LoRA adapter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from inferctl.cli import console, download
from inferctl.cli.options import Json, Revision
from inferctl.config.spec import Adapter, slug
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.models import adapter_effect, hub
from inferctl.models import merge as merging

EPILOG = """\b
Examples:
  # Write ./support, then serve it
  inferctl merge ./Qwen3-0.6B ./support-lora --output ./support && inferctl serve --model ./support
  # Download both
  inferctl merge Qwen/Qwen3-0.6B example/support-lora --output ./support
"""


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Model folder, or hub id at --revision.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or hub id of an adapter of PEFT (LoRA).")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to create for the model.")],
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Write the model that an adapter makes of its base, with the adapter in its weights.

    Files, number formats, tokenizer and configuration are those of the base. The next tokens of the new model are
    compared with those of the adapter on its base in fp32, which needs 4 bytes of memory per parameter.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} already exists", "name a new folder")
    outputs.check_folder(output, "--output")
    folder, say = download.fetch(base, revision), functools.cache(console.note)
    wanted = [Adapter(name=slug(adapter), source=adapter, revision=None)]
    (found,) = hub.fetch_adapters(wanted, folder, lambda source: hub.Lines(source, console.note))
    origin: dict[str, Any] = {
        "base": base,
        "base_sha256": folder.digest,
        "adapter": adapter,
        "adapter_sha256": found.digest,
    }
    with download.shown(base, "merg") as progress:
        new = merging.merge(
            folder, found, origin, output, progress, lambda _: say("comparing with the adapter in fp32")
        )
    console.note(adapter_effect.line(origin["next_tokens"]))
    console.result({"folder": str(output), "model_sha256": new.digest, **origin}, str(output), as_json=as_json)
