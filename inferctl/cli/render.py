"""`inferctl render`, and the inputs of rendering: catalog entries, locks, the commit of the repository."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console
from inferctl.cli.options import Flags, Json, SpecFile, load, with_settings
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.image.from_spec import rendered_image
from inferctl.image.render import server_files


@with_settings("model.source", "serve.precision", "image.base", "image.base_image")
def render(
    flags: Flags,
    spec_file: SpecFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write Dockerfile, .dockerignore, locks and config into DIR."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a Dockerfile that inferctl did not write.")] = False,
    as_json: Json = False,
) -> None:
    """Print the Dockerfile or, with --output, write its build context.

    Example: inferctl render --output build && docker buildx build build
    """
    if output is not None:
        outputs.check_folder(output, "--output")
    resolved = load(spec_file, flags, several=True)
    rendered = rendered_image(resolved)
    if output is None:
        facts = {"labels": rendered.labels, "contexts": rendered.contexts, "files": sorted(rendered.files)}
        console.result({"dockerfile": rendered.dockerfile, **facts}, rendered.dockerfile, as_json=as_json)
        return

    contents = {
        "Dockerfile": rendered.dockerfile.encode(),
        ".dockerignore": rendered.dockerignore.encode(),
        **rendered.files,
    }
    if not force:
        _check_overwrite(output / "Dockerfile")
    server = {name: file.read_bytes() for name, file in server_files(resolved.spec.image.embed).items()}
    outputs.write_all(output, {**contents, **server}, "--output")
    paths, folder = [str(output / name) for name in contents], str(output / "layers" / "server")
    console.result({"paths": paths, "server": folder}, "\n".join([*paths, folder]), as_json=as_json)
    if as_json:
        return
    arguments = [flag for name, value in rendered.contexts.items() for flag in ("--build-context", f"{name}={value}")]
    arguments += [flag for name, value in rendered.build_args.items() for flag in ("--build-arg", f"{name}={value}")]
    console.note(f"next: {shlex.join(['docker', 'buildx', 'build', *arguments, str(output)])}")


def _check_overwrite(dockerfile: Path) -> None:
    """Raise `UsageError` if `dockerfile` exists and inferctl did not render it."""
    if dockerfile.is_file() and b"Rendered by inferctl" not in dockerfile.read_bytes()[:4096]:
        raise UsageError(
            f"{dockerfile} exists and was not written by inferctl",
            "pass another folder with `--output`, or overwrite it with `--force`",
        )
