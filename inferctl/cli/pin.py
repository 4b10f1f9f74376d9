"""`inferctl pin`: write the base's digest and the model's commit into the spec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inferctl.cli import console
from inferctl.cli.options import Json, SpecFile
from inferctl.errors import InferctlError

if TYPE_CHECKING:
    from inferctl.pin import Pin
    from inferctl.spec import Spec


def pin(
    spec_file: SpecFile = None,
    update: Annotated[bool, typer.Option("--update", help="Move pins that are set to what is current.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing, ask no registry; exit with 1 if a pin is missing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes without writing them.")] = False,
    as_json: Json = False,
) -> None:
    """Write the digest of the base and the commit of the hub model into the spec. Comments and order stay.

    Example: inferctl pin --update
    """
    from inferctl import catalog, outputs, pin, settings, spec
    from inferctl.errors import NotReadyError

    named = spec_file or (Path(name) if (name := os.environ.get("INFERCTL_SPEC")) else Path(spec.DEFAULT_FILE))
    file = named.resolve() if named.exists() else named
    document = settings.read(file)
    meant = settings.resolve(document, {}, {}, catalog.vocabulary()).spec
    pins = pin.pins(meant, catalog.base(meant.image.base))
    if check:
        _check(str(named), pins, as_json)
        return
    changes, moved, failed = _resolve(meant, pins, update)
    if changes:
        text = file.read_bytes().decode("utf-8")
        edited = pin.edit(text, changes, str(named))
        if not dry_run:
            try:
                outputs.replace(file, edited)
            except OSError as error:
                raise NotReadyError(f"{named} cannot be written: {error.strerror}", "check its permissions") from None
    if as_json:
        console.document(
            {
                "file": str(named),
                "written": bool(changes) and not dry_run,
                "pinned": not failed and not (dry_run and any(not p.pinned for p in pins)),
                "changes": [
                    {"path": p.path, "old": p.current, "new": changes[p.path]} for p in pins if p.path in changes
                ],
                "moved": [{"path": path, "pinned": old, "current": new} for path, old, new in moved],
                "failed": [
                    {"path": path, "message": problem.message, "hint": problem.hint} for path, problem in failed.items()
                ],
            }
        )
        if failed:
            raise typer.Exit(next(iter(failed.values())).exit_code)
        return
    _tell(str(named), pins, changes, moved, dry_run)
    for path, further in list(failed.items())[1:]:
        console.warn(f"{path} is not pinned: {further.message}")
    if failed:
        path, first = next(iter(failed.items()))
        rest = f"; {', '.join(changes)} was written" if changes and not dry_run else "; nothing was written"
        kind = type(first)
        raise kind(f"{path} is not pinned: {first.message}{rest}", first.hint)


def _check(file: str, pins: list[Pin], as_json: bool) -> None:
    missing = [pin.path for pin in pins if not pin.pinned]
    if as_json:
        console.document({"file": file, "pinned": not missing, "missing": missing})
        if missing:
            raise typer.Exit(1)
    elif missing:
        raise InferctlError(f"{file} does not pin {' and '.join(missing)}", "`inferctl pin` writes what is missing")
    else:
        console.note(f"{file} pins all that can be pinned")


def _resolve(
    spec: Spec, pins: list[Pin], update: bool
) -> tuple[dict[str, str], list[tuple[str, str, str]], dict[str, InferctlError]]:
    """What to write, which pins have something newer, and what could not be resolved.

    A pin that is set needs no answer: if nobody can be asked whether there is something newer, it stays.
    """
    from inferctl import pin

    changes: dict[str, str] = {}
    moved: list[tuple[str, str, str]] = []
    failed: dict[str, InferctlError] = {}
    for one in pins:
        if one.pinned and one.path == pin.BASE and one.tracked is None:
            continue
        try:
            with console.progress(f"resolving {one.path}"):
                current = one.value(_current(spec, one))
        except InferctlError as error:
            if one.pinned:
                console.note(f"{one.path} stays as it is; what is current is not known: {error.message}")
            else:
                failed[one.path] = error
            continue
        if one.pinned and one.pinned_to != current:
            moved.append((one.path, one.pinned_to or "", current))
        if (update or not one.pinned) and one.pinned_to != current:
            changes[one.path] = current
    return changes, moved, failed


def _current(spec: Spec, one: Pin) -> str:
    from inferctl import hub, pin
    from inferctl.image import buildx

    if one.path == pin.MODEL:
        return hub.commit(spec.model.source, one.tracked)
    return buildx.digest(one.tracked or "")


def _tell(
    file: str, pins: list[Pin], changes: dict[str, str], moved: list[tuple[str, str, str]], dry_run: bool
) -> None:
    for one in pins:
        if one.path in changes:
            console.data(f"{one.path}: {one.current or 'not set'} -> {changes[one.path]}")
    for path, old, new in moved:
        if path not in changes:
            console.note(f"{path} is pinned to {old}; current is {new}. `inferctl pin --update` moves it")
    if not changes:
        console.note(f"{file} is unchanged")
    elif dry_run:
        console.note(f"{file} is unchanged: --dry-run")
