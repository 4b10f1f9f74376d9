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
from inferctl.image import pin as pinning
from inferctl.image import registry
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
    changes, moved = _resolve(current, pins, update)
    if changes:
        edited = pinning.edit(file.read_bytes().decode("utf-8"), changes, str(spec_file_path))
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
                "pinned": not dry_run or all(each.pinned for each in pins),
                "changes": [
                    {"path": each.path, "old": each.current, "new": changes[each.path]}
                    for each in pins
                    if each.path in changes
                ],
                "moved": [{"path": path, "pinned": old, "current": new} for path, old, new in moved],
            }
        )
    else:
        _print_changes(str(spec_file_path), pins, changes, moved, dry_run)


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


def _resolve(spec: Spec, pins: list[Pin], update: bool) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Return the changes to write, and the pins with a newer version.

    If the registry or the hub cannot be reached, existing pins stay, and a missing one is an error.
    """
    changes: dict[str, str] = {}
    moved: list[tuple[str, str, str]] = []
    for each in pins:
        if each.pinned and each.path != pinning.MODEL and each.tracked is None:
            continue
        try:
            with console.progress(f"resolving {each.path}"):
                current = each.value(_current(spec, each))
        except InferctlError as error:
            if not each.pinned:
                raise
            console.note(f"{each.path} is unchanged, because its current version is unknown: {error.message}")
            continue
        if each.pinned and each.pinned_to != current:
            moved.append((each.path, each.pinned_to or "", current))
        if (update or not each.pinned) and each.pinned_to != current:
            changes[each.path] = current
    return changes, moved


def _current(spec: Spec, each: Pin) -> str:
    if each.path == pinning.MODEL:
        return hub.commit(spec.model.source, each.tracked)
    return registry.digest((each.tracked or "").removeprefix(IMAGE_SCHEME))


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
