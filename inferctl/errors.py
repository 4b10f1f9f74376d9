"""What can go wrong, and the exit code each kind ends with.

Everything a user can cause or mend is an `InferctlError` with a hint; anything else is a bug and keeps its traceback.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | failed, or a regression was found |
| 2 | usage or spec error |
| 3 | Docker, registry, GPU, port or disk not ready, or stdout cannot be written |
| 4 | not enough evidence |
| 5 | invalid run |
| 130 | interrupted by Ctrl-C or SIGTERM |
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

EXIT_INTERRUPTED = 130
# A file of another kind can have thousands of errors; nobody reads more than a screen.
_MOST_LINES = 20


class InferctlError(Exception):
    """Something failed in a way the user can understand. `message` says what happened, `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(InferctlError):
    """The command line or a file given to it is wrong."""

    exit_code = 2


class NotReadyError(InferctlError):
    """The outside world is not ready: Docker, a registry, a GPU, a port, a disk."""

    exit_code = 3


class NotEnoughEvidenceError(InferctlError):
    """The samples do not support a verdict either way."""

    exit_code = 4


class InvalidRunError(InferctlError):
    """A measurement happened under conditions that make its numbers worthless."""

    exit_code = 5


@dataclass(frozen=True)
class Problem:
    """One mistake in a file: where it is (`line` counts from 1; None when the file says nothing there), what, and the way out."""

    path: str
    message: str
    line: int | None = None
    hint: str | None = None


class SpecError(UsageError):
    """All the mistakes of one file at once; `file` is None when there is only the command line and the environment."""

    def __init__(self, file: str | None, problems: list[Problem]) -> None:
        self.file = file
        self.problems = problems
        if len(problems) == 1:
            message, hint = f"{_at(file, problems[0])}{problems[0].message}", problems[0].hint
        else:
            lines = [f"{_at(file, p)}{p.message}" + (f" - {p.hint}" if p.hint else "") for p in problems[:_MOST_LINES]]
            if more := len(problems) - len(lines):
                lines.append(f"and {more:,} more")
            message, hint = "\n".join([f"{len(problems)} mistakes", *lines]), None
        super().__init__(message, hint or "`inferctl schema` prints every key; docs/reference.md explains them")


def _at(file: str | None, problem: Problem) -> str:
    return f"{file}:{problem.line}: " if file and problem.line else f"{file}: " if file else ""


def shown(value: object) -> str:
    """The value as an error shows it: its `repr`, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def did_you_mean(word: str, words: Iterable[str]) -> str | None:
    """`did you mean x?` for what starts with `word`, else for the closest of `words`; None when nothing is close."""
    known = list(words)
    # Somebody who types `a100` means one of the a100s, not an `a10`, however close that is. Slices are named whole.
    longer = [candidate for candidate in known if candidate.startswith(word.lower()) and "-mig-" not in candidate]
    close = (longer if word else []) or difflib.get_close_matches(word, known, 1, cutoff=0.5)
    if not close:
        return None
    return f"did you mean {'one of ' if len(close) > 1 else ''}{', '.join(close)}?"
