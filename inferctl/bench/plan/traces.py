"""Read a recorded load (trace): one JSON object per line, `{"at_s": 0.25, "input": "text or list of texts"}`.

`tokens` can replace an unknown `input`.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace: seconds after the start of the trace, and its texts.

    `tokens` is the approximate number of tokens if the texts are unknown.
    """

    at_s: float
    inputs: tuple[str, ...]
    tokens: int | None = None


def read(path: str) -> list[TraceRequest]:
    """Return the requests of a trace, sorted by time. Raises `ValueError` with the file and the line."""
    try:
        stat = Path(path).stat()
        return list(_read(path, stat.st_mtime_ns, stat.st_size))
    except OSError as error:
        raise ValueError(f"the trace {path} cannot be read: {error.strerror}") from None


@functools.lru_cache(maxsize=4)
def _read(path: str, _changed: int, _size: int) -> tuple[TraceRequest, ...]:
    requests = []
    # splitlines() would also split at U+2028 and other separators, which JSON strings may contain.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            try:
                requests.append(_request(json.loads(line)))
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: {_reason(error)}") from None
    if not requests:
        raise ValueError(f"the trace {path} is empty")
    return tuple(sorted(requests, key=lambda request: request.at_s))


def _request(line: Any) -> TraceRequest:
    at_s, tokens, given = float(line["at_s"]), line.get("tokens"), line.get("input")
    if not math.isfinite(at_s) or at_s < 0:
        raise ValueError("at_s must be a number of seconds, 0 or more")
    if given is None and (not isinstance(tokens, int) or tokens < 1):
        raise ValueError("the line needs input or tokens (a positive integer)")
    inputs = (given,) if isinstance(given, str) else tuple(given or ())
    if not all(isinstance(text, str) for text in inputs) or (given is not None and not inputs):
        raise ValueError("input must be a text or a list of texts, not empty")
    return TraceRequest(at_s, inputs, tokens)


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
