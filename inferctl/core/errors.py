"""The errors that users can cause or fix, each with a hint and an exit code.

Any other exception is a bug and keeps its traceback.

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
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_INTERRUPTED = 130
# A file of another format can have thousands of errors. This many fit on one screen.
_MAX_PROBLEMS = 20


class InferctlError(Exception):
    """A failure that the user can understand. `message` says what happened, `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(InferctlError):
    """The command line, or a file that it names, is wrong."""

    exit_code = 2


class NotReadyError(InferctlError):
    """Something outside inferctl is not ready: Docker, a registry, a GPU, a port or a disk."""

    exit_code = 3


class NotEnoughEvidenceError(InferctlError):
    """The samples are too few or too noisy for a verdict."""

    exit_code = 4


class InvalidRunError(InferctlError):
    """A measurement is invalid because of the conditions under which it ran."""

    exit_code = 5


@dataclass(frozen=True)
class Problem:
    """One error in a file: the key (`path`), the message, the line (from 1; None if the key is absent) and a hint."""

    path: str
    message: str
    line: int | None = None
    hint: str | None = None


class SpecError(UsageError):
    """All errors of one file. `file` is None if the settings come only from the command line and the environment.

    `hint`: if there are several errors, or one without a hint.
    """

    def __init__(
        self, file: str | None, problems: list[Problem], hint: str = "`inferctl schema` describes every key"
    ) -> None:
        self.file = file
        self.problems = problems
        if len(problems) == 1:
            message, hint = f"{_at(file, problems[0])}{problems[0].message}", problems[0].hint or hint
        else:
            lines = [
                f"{_at(file, p)}{p.message}" + (f" - {p.hint}" if p.hint else "") for p in problems[:_MAX_PROBLEMS]
            ]
            if more := len(problems) - len(lines):
                lines.append(f"and {more:,} more")
            where = f" in {file}" if file else ""
            message = "\n".join([f"{len(problems)} errors{where}", *lines])
        super().__init__(message, hint)


def _at(file: str | None, problem: Problem) -> str:
    return f"{file}:{problem.line}: " if file and problem.line else f"{file}: " if file else ""


def without_addresses(text: str) -> str:
    """Return a text that quotes what someone typed, up to the first address that may have a password.

    In linear time: a request can be quoted, and one pattern for all of it would take minutes for 100 kB.
    """
    before, separator, after = text.partition("://")
    if not separator or not {"@", "?"} & set(after):
        return text
    scheme = re.split(r"[\s'\"(]", before)[-1]
    return f"{before.removesuffix(scheme)}***"


def shown(value: object) -> str:
    """Return the `repr` of a value, without addresses and truncated to 80 characters, for an error message."""
    text = without_addresses(repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"


def install_hint(extra: str) -> str:
    """Return how to install an extra of inferctl. It names a clone because inferctl is not on PyPI."""
    return f"in a clone of inferctl: `pip install '.[{extra}]'`"


@contextmanager
def needs_packages(what: str, extra: str) -> Iterator[None]:
    """Convert the error of an import in the body to a `NotReadyError`: `what` requires a package of the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise NotReadyError(f"{what} requires the package {error.name}, not installed", install_hint(extra)) from None


def did_you_mean(word: str, words: Iterable[str]) -> str | None:
    """Return `did you mean x?` for words that start with `word`, else for the closest one; None if none is close."""
    known = list(words)
    # `a100` means one of the a100 keys, although `a10` is closer. MIG slices are left out: each GPU has several.
    longer = [candidate for candidate in known if candidate.startswith(word.lower()) and "-mig-" not in candidate]
    close = (longer if word else []) or difflib.get_close_matches(word, known, 1, cutoff=0.5)
    if not close:
        return None
    return f"did you mean {'one of ' if len(close) > 1 else ''}{', '.join(close)}?"
