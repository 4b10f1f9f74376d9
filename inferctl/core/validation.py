"""Converts errors of pydantic to problems of a YAML file: with lines, in the style of inferctl's errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inferctl.core.document import Document, dotted
from inferctl.core.errors import Problem, did_you_mean, shown

if TYPE_CHECKING:
    from pydantic import ValidationError

KeysAt = Callable[[Sequence[str | int]], Sequence[str]]


def problems(error: ValidationError, document: Document, keys_at: KeysAt, hint: str) -> list[Problem]:
    """Return what is wrong with a file, by line. `keys_at`: returns the known keys of the section at a path."""
    found = [_problem(dict(each), document, keys_at, hint) for each in error.errors()]
    return sorted(found, key=lambda problem: problem.line or 0)


def first_message(error: ValidationError) -> tuple[str, str]:
    """Return where the first error is, such as `load.rate` or "", and what is wrong there."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), message(first["msg"])


def message(text: str) -> str:
    """Return a message of pydantic in the style of inferctl's errors, such as `must be greater than 0`."""
    return re.sub(r"^(Input|String|List|Value|Dictionary) should", "must", text.removeprefix("Value error, "))


def _problem(error: Mapping[str, Any], document: Document, keys_at: KeysAt, hint: str) -> Problem:
    location = list(error["loc"])
    path, line = dotted(location), document.line(location)
    if error["type"] == "extra_forbidden":
        known = keys_at(location[:-1])
        close = did_you_mean(str(location[-1]), known) or f"known: {', '.join(known)}"
        return Problem(path, f"unknown key {str(location[-1])!r}", line, close)
    if error["type"] == "missing":
        return Problem(path, f"{path} is missing", line, hint)
    if error["type"] == "address":
        return Problem(path, f"{path}: {error['msg']}", line, error["ctx"]["hint"] or hint)
    if error["type"] == "value_error":
        return Problem(path, message(error["msg"]), line, hint)
    return Problem(path, f"{path}: {message(error['msg'])}, got {shown(error.get('input'))}", line, hint)
