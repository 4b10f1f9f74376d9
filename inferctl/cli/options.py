"""Options that several commands share. Only this module reads the INFERCTL_* environment variables."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inferctl.cli import completion, lazy

if TYPE_CHECKING:
    from inferctl.settings import Resolved
    from inferctl.spec import Metering

SpecFile = Annotated[
    Path | None,
    typer.Option("--spec", "-f", metavar="FILE", help="Read this spec file. [default: ./inferctl.yaml if it exists]"),
]
# One hour is longer than any client waits. A larger number is a typing error, and every result meets an infinite SLO.
MIN_SLO_MS, MAX_SLO_MS = 0.001, 3_600_000
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ModelSource = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="SOURCE", help="Use this model folder or hub id; no spec file is required."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        metavar="NAME",
        autocompletion=completion.PRECISIONS,
        help="Set the precision: auto, fp32, fp16, bf16, int8 or fp8 (generation). [default: the spec's, else auto]",
    ),
]
LedgerUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Use this ledger: sqlite:///FILE or postgresql://... [default: the spec's, else metering/ledger.sqlite]",
    ),
]


def without_password(text: str) -> str:
    """Return a URL with `***` in place of its password."""
    return re.sub(r"(://[^:@/\s]*):[^@/\s]*@", r"\1:***@", text)


def metering(spec_file: Path | None, flags: dict[str, Any]) -> Metering:
    """Return the section `metering` of the settings, also without a spec or a model. Raises `UsageError`."""
    if not names_model(spec_file, flags):
        flags = {**flags, "model.source": "."}
    return load(spec_file, flags).spec.metering


def names_model(spec_file: Path | None, flags: dict[str, Any]) -> bool:
    """Return whether a spec file, `--model` or the environment specifies a model."""
    from inferctl import spec

    specified = spec_file or os.environ.get("INFERCTL_SPEC") or os.environ.get("INFERCTL_MODEL_SOURCE")
    return bool(specified or flags.get("model.source") or Path(spec.DEFAULT_FILE).exists())


def network_of(name: str | None) -> str | None:
    """Return `host`, or None if `--network` is absent. Raises `UsageError` for another value."""
    from inferctl.errors import UsageError

    if name not in (None, "host"):
        raise UsageError(f"--network {name!r} is not supported", "remove `--network`, or pass `--network host`")
    return name


def spec_path(spec_file: Path | None) -> Path:
    """Return the path of the spec: `spec_file`, else INFERCTL_SPEC, else ./inferctl.yaml. The file may not exist."""
    from inferctl import spec

    return spec_file or Path(os.environ.get("INFERCTL_SPEC") or spec.DEFAULT_FILE)


def key_file(file: Path | None, spec_file: Path | None) -> Path:
    """Return the key file: `file` (an option), else `access.keys` of the environment or of the spec, else keys.json."""
    if file is None and (spec_file or spec_path(None).exists()):
        keys = load(spec_file, {}).spec.access.keys
        file = Path(keys) if keys else None
    return file or Path(os.environ.get("INFERCTL_ACCESS_KEYS") or "keys.json")


def load(spec_file: Path | None, flags: dict[str, Any]) -> Resolved:
    """Return the settings and print their warnings.

    `flags` maps dotted paths to values; None means absent. Flags override INFERCTL_* variables, which override the spec
    file, which overrides the defaults. With `--model`, the spec file may be absent. Raises `UsageError`.
    """
    with lazy.deferred_signals():
        from inferctl import catalog, settings
        from inferctl.cli import console

        vocabulary = catalog.vocabulary()
    explicit, path = spec_file or os.environ.get("INFERCTL_SPEC"), spec_path(spec_file)
    without_file = (
        not explicit and not path.exists() and (flags.get("model.source") or os.environ.get("INFERCTL_MODEL_SOURCE"))
    )
    document = None if without_file else settings.read(path)
    resolved = settings.resolve(document, os.environ, flags, vocabulary)
    for warning in resolved.warnings:
        console.warn(warning)
    return resolved
