"""`inferctl pin`: write the digest of the base image and the commit of the hub model into the spec."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from inferctl.cli import console, options
from inferctl.cli.options import Json, SpecFile
from inferctl.config import settings
from inferctl.config.spec import DEFAULT_FILE, IMAGE_SCHEME, Spec
from inferctl.core import outputs
from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.facts import catalog
from inferctl.image import buildx
from inferctl.image import pin as pinning
from inferctl.image.pin import Pin
from inferctl.models import hub


def pin(
    spec_file: SpecFile = None,
    update: Annotated[
        bool, typer.Option("--update", help="Also update existing pins to the current digest and commit.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if a pin is missing. Needs no network.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes without writing them.")] = False,
    as_json: Json = False,
) -> None:
    """Write the digest of the base image and the commit of the hub model into the spec.

    Comments and the order of keys do not change.

    Example: inferctl pin --update
    """
    spec_file_path = options.spec_path(spec_file)
    file = spec_file_path.resolve() if spec_file_path.exists() else spec_file_path
    document = settings.read(spec_file_path)
    current = settings.resolve(document, {}, {}, catalog.vocabulary()).spec
    pins = pinning.pins(current, catalog.base(current.image.base))
    if check:
        _check(str(spec_file_path), pins, as_json)
        return
    changes, moved, failed = _resolve(current, pins, update)
    if changes:
        text = file.read_bytes().decode("utf-8")
        edited = pinning.edit(text, changes, str(spec_file_path))
        if not dry_run:
            try:
                outputs.replace(file, edited)
            except OSError as error:
                raise NotReadyError(
                    f"cannot write {spec_file_path}: {error.strerror}", "check its permissions"
                ) from None
    if as_json:
        console.document(
            {
                "file": str(spec_file_path),
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
    _print_changes(str(spec_file_path), pins, changes, moved, dry_run)
    for path, further in list(failed.items())[1:]:
        console.warn(f"{path} is not pinned: {further.message}")
    if failed:
        path, first = next(iter(failed.items()))
        write_status = f"; {', '.join(changes)} was written" if changes and not dry_run else "; nothing was written"
        kind = type(first)
        raise kind(f"{path} is not pinned: {first.message}{write_status}", first.hint)


def _check(file: str, pins: list[Pin], as_json: bool) -> None:
    missing_pins = [pin.path for pin in pins if not pin.pinned]
    if as_json:
        console.document({"file": file, "pinned": not missing_pins, "missing": missing_pins})
        if missing_pins:
            raise typer.Exit(1)
    elif missing_pins:
        command = ["inferctl", "pin"] if file == DEFAULT_FILE else ["inferctl", "pin", "--spec", file]
        raise InferctlError(f"{file} does not pin {' and '.join(missing_pins)}", f"run `{shlex.join(command)}`")
    else:
        console.note(f"{file} has every pin that it can have")


def _resolve(
    spec: Spec, pins: list[Pin], update: bool
) -> tuple[dict[str, str], list[tuple[str, str, str]], dict[str, InferctlError]]:
    """Return the changes to write, the pins with a newer version, and the pins that could not be resolved.

    If the registry or the hub cannot be reached, existing pins stay.
    """
    changes: dict[str, str] = {}
    moved: list[tuple[str, str, str]] = []
    failed: dict[str, InferctlError] = {}
    for each in pins:
        if each.pinned and each.path != pinning.MODEL and each.tracked is None:
            continue
        try:
            with console.progress(f"resolving {each.path}"):
                current = each.value(_current(spec, each))
        except InferctlError as error:
            if each.pinned:
                console.note(f"{each.path} is unchanged, because its current version is unknown: {error.message}")
            else:
                failed[each.path] = error
            continue
        if each.pinned and each.pinned_to != current:
            moved.append((each.path, each.pinned_to or "", current))
        if (update or not each.pinned) and each.pinned_to != current:
            changes[each.path] = current
    return changes, moved, failed


def _current(spec: Spec, each: Pin) -> str:
    if each.path == pinning.MODEL:
        return hub.commit(spec.model.source, each.tracked)
    return buildx.digest((each.tracked or "").removeprefix(IMAGE_SCHEME))


def _print_changes(
    file: str, pins: list[Pin], changes: dict[str, str], moved: list[tuple[str, str, str]], dry_run: bool
) -> None:
    for each in pins:
        if each.path in changes:
            console.data(f"{each.path}: {each.current or 'not set'} -> {changes[each.path]}")
    for path, old, new in moved:
        if path not in changes:
            console.note(f"{path} is pinned to {old}, current is {new}; to update it: `inferctl pin --update`")
    if not changes:
        console.note(f"{file} is unchanged")
    elif dry_run:
        console.note(f"{file} is unchanged: --dry-run")
