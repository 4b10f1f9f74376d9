"""Options that several verbs share, and how they become settings. The only reader of the process environment's INFERCTL_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import completion

if TYPE_CHECKING:
    from inferctl.settings import Resolved

SpecFile = Annotated[
    Path | None,
    typer.Option("--spec", "-f", metavar="FILE", help="Spec file; default is ./inferctl.yaml if there is one."),
]
# An hour is longer than any client waits; a larger number is a slip, and infinity makes a verdict of nothing.
MIN_SLO_MS, MAX_SLO_MS = 0.001, 3_600_000
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ModelSource = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="SOURCE", help="Local model folder or hub id; no spec file is needed then."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        metavar="NAME",
        autocompletion=completion.PRECISIONS,
        help="auto, fp32, fp16, bf16 or int8.",
    ),
]


def names_model(spec_file: Path | None, flags: dict[str, Any]) -> bool:
    """Whether anything says which model is meant: a spec file, named or found, `--model`, or the environment."""
    from inferctl import spec

    named = spec_file or os.environ.get("INFERCTL_SPEC") or os.environ.get("INFERCTL_MODEL_SOURCE")
    return bool(named or flags.get("model.source") or Path(spec.DEFAULT_FILE).exists())


def network_of(name: str | None) -> str | None:
    """The value of `--network`: `host`, or None if it is not given. Raises `UsageError`."""
    from inferctl.errors import UsageError

    if name not in (None, "host"):
        raise UsageError(f"--network {name!r} is not supported", "leave it out, or give `--network host`")
    return name


def spec_path(spec_file: Path | None) -> Path:
    """Return the spec file in force, which need not exist: `spec_file`, else INFERCTL_SPEC, else ./inferctl.yaml."""
    from inferctl import spec

    return spec_file or Path(os.environ.get("INFERCTL_SPEC") or spec.DEFAULT_FILE)


def load(spec_file: Path | None, flags: dict[str, Any]) -> Resolved:
    """Settings in force: `flags` (dotted path -> value, None is not given) over INFERCTL_* over the spec file over the defaults.

    Without `--spec`, `./inferctl.yaml` is read if it is there; with `--model` none is needed. Warnings are printed.
    """
    from inferctl import catalog, settings
    from inferctl.cli import console

    chosen, path = spec_file or os.environ.get("INFERCTL_SPEC"), spec_path(spec_file)
    without_file = (
        not chosen and not path.exists() and (flags.get("model.source") or os.environ.get("INFERCTL_MODEL_SOURCE"))
    )
    document = None if without_file else settings.read(path)
    resolved = settings.resolve(document, os.environ, flags, catalog.vocabulary())
    for warning in resolved.warnings:
        console.warn(warning)
    return resolved
