"""A recorded load: one JSON object a line, `{"at_s": 0.25, "input": "text or list of texts"}`; `tokens` may stand in for an input."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sent:
    """One request of a trace: seconds after its start, and its texts; `tokens` about as many as they were when the texts are not known."""

    at_s: float
    inputs: tuple[str, ...]
    tokens: int | None = None


def read(path: str) -> list[Sent]:
    """The requests of a trace, by time. Raises `ValueError` that names the file and line, also when there is no file."""
    try:
        stat = Path(path).stat()
        return list(_read(path, stat.st_mtime_ns, stat.st_size))
    except OSError as error:
        raise ValueError(f"the trace {path} cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=4)
def _read(path: str, _changed: int, _size: int) -> tuple[Sent, ...]:
    found = []
    # Not splitlines(): JSON strings may hold U+2028 and others that it takes for the end of a line.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            try:
                found.append(_sent(json.loads(line)))
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: {_reason(error)}") from None
    if not found:
        raise ValueError(f"the trace {path} is empty")
    return tuple(sorted(found, key=lambda sent: sent.at_s))


def _sent(line: Any) -> Sent:
    at_s, tokens, given = float(line["at_s"]), line.get("tokens"), line.get("input")
    if not math.isfinite(at_s) or at_s < 0:
        raise ValueError("at_s is a number of seconds, 0 or more")
    if given is None and (not isinstance(tokens, int) or tokens < 1):
        raise ValueError("a line needs an input, or tokens")
    inputs = (given,) if isinstance(given, str) else tuple(given or ())
    if not all(isinstance(text, str) for text in inputs) or (given is not None and not inputs):
        raise ValueError("input is a text or a list of texts")
    return Sent(at_s, inputs, tokens)


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
