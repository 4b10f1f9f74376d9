"""The one place that prints. stdout carries data and nothing else; everything for people goes to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from inferctl.errors import InferctlError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def data(text: str) -> None:
    """Write data to stdout, ending in one line break."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def document(value: Any) -> None:
    """Write one JSON document to stdout (what `--json` asks for)."""
    data(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something that works but should be known, on stderr."""
    print(f"{_paint('warning:', '33')} {text}", file=sys.stderr, flush=True)


def error(problem: InferctlError) -> None:
    """`error: what happened`, a blank line, `hint: what to type next`, on stderr."""
    print(f"{_paint('error:', '1;31')} {problem.message}", file=sys.stderr)
    if problem.hint:
        print(f"\n{_paint('hint:', '1;36')} {problem.hint}", file=sys.stderr)
    sys.stderr.flush()


def rich(stderr: bool = False) -> Console:
    """A Rich console; NO_COLOR, TERM and COLUMNS are honoured by Rich itself."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def report(renderable: RenderableType) -> None:
    """A table or another Rich renderable that is the command's result, on stdout."""
    rich().print(renderable)


@contextmanager
def progress(description: str) -> Iterator[None]:
    """A spinner with the time passed while the body runs; only on a terminal, otherwise one line."""
    if not sys.stderr.isatty():
        note(description)
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=rich(stderr=True),
        transient=True,
    ) as bar:
        bar.add_task(description, total=None)
        yield


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else text
