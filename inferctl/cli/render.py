"""`inferctl render`, and what rendering needs from the outside: the catalog's entries, the locks, the repository's commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferctl.cli import console
from inferctl.cli.options import Json, ModelSource, PrecisionOption, SpecFile, load

if TYPE_CHECKING:
    from inferctl.render import Provenance, Rendered
    from inferctl.settings import Resolved


def render(
    spec_file: SpecFile = None,
    model: ModelSource = None,
    precision: PrecisionOption = None,
    base: Annotated[str | None, typer.Option(help="Base image: an entry of `inferctl catalog bases`.")] = None,
    base_image: Annotated[str | None, typer.Option(help="Your mirror of the base image.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write Dockerfile, .dockerignore, locks and config into DIR."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the Dockerfile, or write it with all it needs into --output DIR.

    Example: inferctl render --output build && docker buildx build build
    """
    settings = {"model.source": model, "serve.precision": precision, "image.base": base, "image.base_image": base_image}
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
    from inferctl.render import server_files

    written = [output / "Dockerfile", output / ".dockerignore", *(output / name for name in sorted(rendered.files))]
    contents = [
        rendered.dockerfile.encode(),
        rendered.dockerignore.encode(),
        *(rendered.files[name] for name in sorted(rendered.files)),
    ]
    for file, content in zip(written, contents, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for name, source in server_files().items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(source.read_bytes())
    if as_json:
        console.document({"paths": [str(path) for path in written], "server": str(output / "layers" / "server")})
        return
    console.data("\n".join(str(path) for path in [*written, output / "layers" / "server"]))
    flags = [
        *(f"--build-context {k}={v}" for k, v in rendered.contexts.items()),
        *(f"--build-arg {k}={v}" for k, v in rendered.build_args.items()),
    ]
    console.note(f"next: docker buildx build {' '.join([*flags, str(output)])}")


def rendered_image(resolved: Resolved) -> Rendered:
    """What `inferctl render` and `inferctl build` build on: the spec's image, rendered with the catalog's facts and its locks."""
    from inferctl import catalog, locks
    from inferctl import render as rendering

    spec = resolved.spec
    base = catalog.base(spec.image.base)
    stack = catalog.stack(base.stack)
    folder = Path(spec.image.locks) if spec.image.locks else None
    chosen = locks.load(base, folder, int8=spec.serve.precision == "int8")
    return rendering.render(spec, base, stack, chosen, _provenance(Path(resolved.file or ".").resolve().parent))


def _provenance(folder: Path) -> Provenance:
    """The repository that the spec lies in, when there is one: without credentials in its URL."""
    import re

    import inferctl
    from inferctl.render import Provenance

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() or None if done.returncode == 0 else None

    source = git("config", "--get", "remote.origin.url")
    return Provenance(
        source=re.sub(r"://[^/@]*@", "://", source) if source else None,
        revision=git("rev-parse", "HEAD"),
        created=git("log", "-1", "--format=%cI"),
        version=inferctl.__version__,
    )
