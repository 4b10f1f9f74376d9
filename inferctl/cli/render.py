"""`inferctl render`, and the inputs of rendering: catalog entries, locks, the commit of the repository."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

import inferctl
from inferctl.cli import completion, console
from inferctl.cli.options import Json, ModelSource, PrecisionOption, SpecFile, load
from inferctl.config.settings import Resolved
from inferctl.config.spec import Spec
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.facts import catalog
from inferctl.image import locks
from inferctl.image import render as rendering
from inferctl.image.render import Provenance, Rendered, server_files
from inferctl.models import model
from inferctl.models.model import ModelFolder, is_hub_id, resolve_task


def render(
    spec_file: SpecFile = None,
    model: ModelSource = None,
    precision: PrecisionOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            autocompletion=completion.BASES,
            help="Use this base image of `inferctl catalog bases`. [default: the spec's]",
        ),
    ] = None,
    base_image: Annotated[
        str | None, typer.Option(metavar="REF", help="Pull the base from your mirror; add a digest to pin it.")
    ] = None,
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
    settings = {"model.source": model, "serve.precision": precision, "image.base": base, "image.base_image": base_image}
    if output is not None:
        outputs.check_folder(output, "--output")
    resolved = load(spec_file, settings)
    rendered = rendered_image(resolved)
    if output is None:
        if as_json:
            console.document(
                {
                    "dockerfile": rendered.dockerfile,
                    "labels": rendered.labels,
                    "contexts": rendered.contexts,
                    "files": sorted(rendered.files),
                }
            )
        else:
            console.data(rendered.dockerfile)
        return

    contents = {
        "Dockerfile": rendered.dockerfile.encode(),
        ".dockerignore": rendered.dockerignore.encode(),
        **rendered.files,
    }
    if not force:
        _check_overwrite(output / "Dockerfile")
    write_files(output, {**contents, **{name: file.read_bytes() for name, file in server_files().items()}})
    paths = [str(output / name) for name in contents]
    if as_json:
        console.document({"paths": paths, "server": str(output / "layers" / "server")})
        return
    console.data("\n".join([*paths, str(output / "layers" / "server")]))
    flags = [flag for name, value in rendered.contexts.items() for flag in ("--build-context", f"{name}={value}")]
    flags += [flag for name, value in rendered.build_args.items() for flag in ("--build-arg", f"{name}={value}")]
    console.note(f"next: {shlex.join(['docker', 'buildx', 'build', *flags, str(output)])}")


def _check_overwrite(dockerfile: Path) -> None:
    """Raise `UsageError` if `dockerfile` exists and inferctl did not render it."""
    if dockerfile.is_file() and b"Rendered by inferctl" not in dockerfile.read_bytes()[:4096]:
        raise UsageError(
            f"{dockerfile} exists and was not written by inferctl",
            "pass another folder with `--output`, or overwrite it with `--force`",
        )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name -> content) below `folder`, and create folders as needed. Raises `NotReadyError`."""
    for name, content in files.items():
        outputs.write(folder / name, content, "--output")


def rendered_image(resolved: Resolved, labels: Mapping[str, str] | None = None) -> Rendered:
    """Return the image of the spec, rendered with the facts of the catalog and the locks."""
    spec = resolved.spec
    base = catalog.base(spec.image.base)
    stack = catalog.stack(base.stack)
    model = _local_model(spec)
    check_task(spec, model)
    folder = Path(spec.image.locks) if spec.image.locks else None
    package_locks = locks.load(base, folder, int8=spec.serve.precision == "int8")
    provenance = _provenance(Path(resolved.file or ".").resolve().parent)
    baked = model.digest if model and spec.model.weights == "bake" and not is_hub_id(spec.model.source) else None
    return rendering.render(spec, base, stack, package_locks, provenance, baked, labels, model.bytes if model else None)


def _local_model(spec: Spec) -> ModelFolder | None:
    """Return the folder of the model, or its snapshot in the hub's cache; None if it is not on this machine."""
    try:
        return model.find(spec.model.source, spec.model.revision)
    except UsageError:
        return None


def check_task(spec: Spec, folder: ModelFolder | None) -> None:
    """Raise `UsageError` if images on the base of the spec cannot serve its task.

    For the task `auto`, it is that of the model, or accepted if the model is not on this machine.
    """
    task: str = spec.model.task
    if task == "auto" and folder is not None:
        task = resolve_task("auto", folder.config, spec.model.source, has_modules=folder.has_modules)
    base = catalog.base(spec.image.base)
    catalog.check_task(task, base, catalog.stack(base.stack))


def _provenance(folder: Path) -> Provenance:
    """Return the commit and remote of the repository of the spec. The fields are None without a repository."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return result.stdout.strip() or None if result.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        revision += "-dirty"
    url = git("config", "--get", "remote.origin.url")
    return Provenance(
        source=public_url(url) if url else None,
        revision=revision,
        created=git("log", "-1", "--format=%cI"),
        version=inferctl.__version__,
        epoch=_epoch(git("log", "-1", "--format=%ct")),
    )


def _epoch(commit: str | None) -> int:
    """Return the creation time of the image: SOURCE_DATE_EPOCH, the time of the commit, or the start of today (UTC)."""
    for seconds in (os.environ.get("SOURCE_DATE_EPOCH"), commit):
        if seconds and seconds.isdecimal():
            return int(seconds)
    return int(time.time()) // 86_400 * 86_400


def public_url(remote: str) -> str | None:
    """Return scheme, host and path of a git remote, without credentials; None for a local folder.

    `git@host:team/repo` becomes `https://host/team/repo`. User, password, query and fragment are left out.
    """
    short = re.fullmatch(r"(?:[^@/]+@)?([A-Za-z0-9.-]+):(?!/)(.+)", remote)
    if short and "://" not in remote:
        return f"https://{short.group(1)}/{short.group(2)}"
    try:
        parts = urlsplit(remote)
        port = f":{parts.port}" if parts.port and parts.scheme != "ssh" else ""
    except ValueError:
        return None
    if parts.scheme not in ("http", "https", "ssh") or not parts.hostname:
        return None
    return f"{'https' if parts.scheme == 'ssh' else parts.scheme}://{parts.hostname}{port}{parts.path}"
