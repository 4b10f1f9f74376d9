"""Converts errors of pydantic to problems of a YAML file: with lines, in the style of inferctl's errors."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inferctl.core.document import Document, dotted
from inferctl.core.errors import Problem, did_you_mean, shown

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Location = Sequence[str | int]
KeysAt = Callable[[Location], Sequence[str]]
# Returns the label of a setting in a message and its line.
Where = Callable[[Location], tuple[str, int | None]]
# Returns the hint for a kind of error of pydantic, a setting (dotted path) and its value; None without one.
HintFor = Callable[[str, str, Any], str | None]


def problems(
    error: ValidationError,
    document: Document | None,
    keys_at: KeysAt,
    hint: str | HintFor,
    where: Where | None = None,
) -> list[Problem]:
    """Return what is wrong with a file, by line. Repeated problems are left out: members of a union report one each.

    `keys_at`: returns the known keys of the section at a path. `where`: if other places than the file set values.
    """

    def line_of(location: Location) -> tuple[str, int | None]:
        return dotted(location), document.line(location) if document else None

    hint_for: HintFor = (lambda *_: hint) if isinstance(hint, str) else hint
    found = [_problem(dict(each), keys_at, hint_for, where or line_of) for each in error.errors()]
    unique: dict[tuple[str, str], Problem] = {}
    for problem in found:
        unique.setdefault((problem.path, problem.message), problem)
    return sorted(unique.values(), key=lambda problem: problem.line or 0)


def section_keys(model: type[BaseModel], location: Location) -> list[str]:
    """Return the keys of the section at `location`, which may go through items of lists; empty if it is no section."""
    section: Any = model
    for key in location:
        if isinstance(key, int):
            section = next(iter(typing.get_args(section)), None)
        elif key in getattr(section, "model_fields", {}):
            section = section.model_fields[key].annotation
        else:
            return []
    return list(getattr(section, "model_fields", ()))


def first_message(error: ValidationError) -> tuple[str, str]:
    """Return where the first error is, such as `load.rate` or "", and what is wrong there."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), message(first["msg"])


def message(text: str) -> str:
    """Return a message of pydantic in the style of inferctl's errors, such as `must be greater than 0`."""
    return re.sub(r"^(Input|String|List|Value|Dictionary) should", "must", text.removeprefix("Value error, "))


def _problem(error: Mapping[str, Any], keys_at: KeysAt, hint_for: HintFor, where: Where) -> Problem:
    location, kind, value = list(error["loc"]), error["type"], error.get("input")
    path, (label, line) = dotted(location), where(location)
    hint = hint_for(kind, path, value)
    if kind == "extra_forbidden":
        section = f" in {dotted(location[:-1])}" if location[:-1] else ""
        known = keys_at(location[:-1])
        names = f"known{section}: {', '.join(known)}" if known else "remove it: this section has no keys"
        hint = did_you_mean(str(location[-1]), known) or names
        return Problem(path, f"unknown key {str(location[-1])!r}{section}", line, hint)
    if kind == "missing":
        return Problem(path, f"{path} is missing", where(location[:-1])[1] if location[:-1] else None, hint)
    if kind == "value_error":
        return Problem(path, message(error["msg"]), line, hint)
    if kind == "address":
        return Problem(path, f"{label}: {error['msg']}", line, error["ctx"]["hint"] or hint)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        what = f"{shown(value)} is not one of {', '.join(allowed)}"
        hint = did_you_mean(str(value), allowed) or hint
    elif kind == "string_pattern_mismatch":
        *rest, name = (str(part) for part in location)
        name = f"item of {rest[-1]}" if isinstance(location[-1], int) else name
        what = f"{shown(value)} is not a valid {name.replace('_', ' ').strip('[]')}"
    elif kind == "model_type":
        got = value if isinstance(value, int | float) else "text" if isinstance(value, str) else "a list"
        what, hint = f"expected `key: value` lines, got {got}", f"known in {path}: {', '.join(keys_at(location))}"
    elif kind == "string_type" and isinstance(value, int | float):
        what, hint = f"expected text, got the number {value!r}", f'write it in quotes: "{value}"'
    else:
        what = f"{message(error['msg'])}, got {shown(value)}"
    return Problem(path, f"{label}: {what}", line, hint)
