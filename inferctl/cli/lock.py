"""`inferctl lock`: resolve the hashed locks an image is built from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import completion, console
from inferctl.cli.render import write_files


def lock(
    base: Annotated[
        str,
        typer.Option(
            autocompletion=completion.BASES,
            help="Base image whose stack is resolved: an entry of `inferctl catalog bases`.",
        ),
    ] = "cuda13.0",
    platform: Annotated[
        str, typer.Option(autocompletion=completion.PLATFORMS, help="Platform of the image.")
    ] = "linux/amd64",
    wheels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of wheels that stands in for the package index.")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Search this package index too, instead of the one that the stack names."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where torch.txt, server.txt and int8.txt go.")
    ] = Path("locks"),
    upgrade_package: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Upgrade this package (repeatable); the others keep their versions."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail with code 1 if the locks miss a requirement.")
    ] = False,
) -> None:
    """Resolve the locks with uv and print the paths written; name the folder in the spec as image.locks.

    Examples: inferctl lock --base cpu --output locks; inferctl lock --output locks --upgrade-package transformers
    """
    from inferctl import catalog, locks, outputs
    from inferctl.errors import InferctlError, UsageError

    if wheels is not None and not wheels.is_dir():
        raise UsageError(f"there is no wheel folder {wheels}", "`pip download --dest wheels ...` fills one")
    if index is not None and not re.fullmatch(r"(?:https?|file)://[^\s/]*/?\S+", index):
        raise UsageError(f"--index {index!r} is not a URL", "as in `--index https://download.pytorch.org/whl/cpu`")
    outputs.check_folder(output, "--output")
    chosen = catalog.base(base)
    stack = catalog.stack(chosen.stack)
    named = tuple(upgrade_package or ())
    kept = locks.load(chosen, output, int8=True) if named or check else None
    if kept and (unknown := [name for name in named if locks.normalize(name) not in kept.versions()]):
        raise UsageError(f"the locks in {output} have no package {unknown[0]}", f"{output}/*.txt list what they have")
    with console.progress(f"resolving {stack.key} for Python {chosen.python.version} on {platform}"):
        target = locks.LockTarget(stack, chosen.python.version, platform, wheels, index)
        resolved = locks.resolve(target, chosen.provides, kept, named)
    if check and kept:
        if changes := locks.differences(kept, resolved):
            raise InferctlError(
                f"the locks in {output} do not match what inferctl and {stack.key} require:\n" + "\n".join(changes),
                f"`inferctl lock --base {base} --output {output}` resolves them again",
            )
        return
    files = {Path(name).name: content for name, content in resolved.files().items()}
    write_files(output, files)
    for name in files:
        console.data(str(output / name))
