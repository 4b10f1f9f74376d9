"""`inferctl lock`: resolve the hashed package locks that an image is built from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import completion, console
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.facts import catalog
from inferctl.image import locks

EPILOG = """\b
Examples:
  # Resolve the locks of the CPU base
  inferctl lock --base cpu --output locks
"""


def lock(
    base: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            autocompletion=completion.BASES,
            help="Resolve the torch stack of this base image of `inferctl catalog bases`.",
        ),
    ] = "cuda13.0",
    platform: Annotated[
        str, typer.Option(metavar="NAME", autocompletion=completion.PLATFORMS, help="Resolve for this platform.")
    ] = "linux/amd64",
    wheels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Resolve from this folder of wheels instead of a package index.")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Search this index too. [default: the torch index of the stack]"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Write the locks into DIR.")] = Path(
        "locks"
    ),
) -> None:
    """Resolve the package locks of an image with uv and print their paths.

    To build with them, set `image.locks` in the spec to the folder.
    """
    if wheels is not None and not wheels.is_dir():
        raise UsageError(f"wheel folder {wheels} not found", "create it: `pip download --dest wheels ...`")
    if index is not None and not re.fullmatch(r"(?:https?|file)://[^\s/]*/?\S+", index):
        raise UsageError(
            f"--index {index!r} is not a URL", "pass a URL, such as `--index https://download.pytorch.org/whl/cpu`"
        )
    outputs.check_folder(output, "--output")
    base_entry = catalog.base(base)
    stack = catalog.stack(base_entry.stack)
    with console.progress(f"resolving {stack.key} for Python {base_entry.python.version} on {platform}"):
        target = locks.LockTarget(stack, base_entry.python.version, platform, wheels, index)
        resolved = locks.resolve(target, base_entry.provides)
    files = {Path(name).name: content for name, content in resolved.files().items()}
    outputs.write_all(output, files, "--output")
    for name in files:
        console.data(str(output / name))
