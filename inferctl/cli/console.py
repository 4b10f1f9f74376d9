"""The one place that prints. stdout carries data and nothing else; everything for people goes to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from inferctl.errors import EXIT_INTERRUPTED, InferctlError, SpecError

if TYPE_CHECKING:
    import typer
    from rich.console import Console, RenderableType


def data(text: str) -> None:
    """Write data to stdout, ending in one line break."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


_owes_document = False


def expect_document(wanted: bool) -> None:
    """Whether the command was called with `--json`: a failure before its document then prints one."""
    global _owes_document
    _owes_document = wanted


def document(value: Any) -> None:
    """Write one JSON document to stdout (what `--json` asks for)."""
    global _owes_document
    _owes_document = False
    # Text in another encoding than UTF-8 is no JSON; escapes are.
    escaped = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    data(json.dumps(value, indent=2, ensure_ascii=escaped, default=str))


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


def fail(problem: InferctlError) -> int:
    """Print the error, with `--json` also as the document that the command owes; returns the exit code."""
    error(problem)
    return _settle(failure(problem), problem.exit_code)


def interrupt() -> int:
    """Say that the command was interrupted, with `--json` also as the document that it owes; returns the exit code."""
    note("interrupted")
    return _settle(_failure("interrupted", None, EXIT_INTERRUPTED, []), EXIT_INTERRUPTED)


def failure(problem: InferctlError) -> dict[str, Any]:
    """The error as JSON: message, hint, exit code, and the problems of a file one by one."""
    listed = [{"file": problem.file, **vars(one)} for one in problem.problems] if isinstance(problem, SpecError) else []
    return _failure(problem.message, problem.hint, problem.exit_code, listed)


def _failure(message: str, hint: str | None, exit_code: int, problems: list[dict[str, Any]]) -> dict[str, Any]:
    return {"error": {"message": message, "hint": hint, "exit_code": exit_code, "problems": problems}}


def _settle(found: dict[str, Any], exit_code: int) -> int:
    if _owes_document:
        try:
            document(found)
        except InferctlError as unwritten:
            error(unwritten)
            return unwritten.exit_code
    return exit_code


def help_without_command(context: typer.Context) -> None:
    """Print the help of a group that was called without a command, on stdout, and end the command."""
    if context.invoked_subcommand is None:
        data(context.get_help())


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
