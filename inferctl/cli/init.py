"""`inferctl init`: a commented spec to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console
from inferctl.errors import UsageError


def init(
    directory: Annotated[Path, typer.Argument(help="Folder to write into.")] = Path(),
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="SOURCE", help="Hub id or local model folder.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    name: Annotated[str | None, typer.Option(help="Name of the model; default is taken from its source.")] = None,
    base: Annotated[str, typer.Option(help="Base image: an entry of `inferctl catalog bases`.")] = "cuda13.0",
    hardware: Annotated[
        list[str] | None, typer.Option(help="Hardware it must run on (repeatable); default t4 and half an A100.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a spec that is already there.")] = False,
) -> None:
    """Write a commented inferctl.yaml and print its path.

    Example: inferctl init --model ./models/all-MiniLM-L6-v2 --hardware t4
    """
    import jinja2

    from inferctl import assets, catalog, settings, spec

    target = directory / spec.DEFAULT_FILE
    if target.exists() and not force:
        raise UsageError(f"{target} is already there", "edit it, or overwrite it with --force")
    template = (assets.root() / "templates" / "inferctl.yaml.j2").read_text(encoding="utf-8")
    text = (
        jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        .from_string(template)
        .render(
            name=name or spec.slug(model),
            source=model,
            revision=None,
            base=base,
            hardware=hardware or ["t4", "a100-40gb-mig-3g.20gb"],
        )
    )
    settings.resolve(settings.parse(text, str(target)), {}, {}, catalog.vocabulary())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written: {error.strerror}", "name another folder: `inferctl init FOLDER`"
        ) from None
    console.note("next: `inferctl check`, then `inferctl render` or `inferctl serve`")
    console.data(str(target))
