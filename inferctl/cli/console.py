"""All output of inferctl. The result of a command goes to stdout, messages for people go to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from inferctl.core import streams
from inferctl.core.errors import EXIT_INTERRUPTED, InferctlError, NotReadyError, SpecError

if TYPE_CHECKING:
    import typer
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text


def data(text: str) -> None:
    """Write `text` and a line break to stdout."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


_json_pending = False
# The width of tables without a terminal: no cell is wrapped.
_PIPE_COLUMNS = 10_000


def expect_document(expected: bool) -> None:
    """Set whether the command must print a JSON document (`--json`), even if it fails."""
    global _json_pending
    _json_pending = expected


def document(value: Any) -> None:
    """Write the JSON document of `--json` to stdout."""
    global _json_pending
    _json_pending = False
    # JSON must be UTF-8. If stdout has another encoding, escapes keep the document valid.
    escaped = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    data(json.dumps(value, indent=2, ensure_ascii=escaped, default=str))


def result(value: Any, text: str, *, as_json: bool) -> None:
    """Write the result of a command: the JSON document `value` with `--json`, else `text`."""
    document(value) if as_json else data(text)


def check_read() -> None:
    """Raise `NotReadyError` if nobody reads what was written to stdout. For what is shown only once."""
    if streams.stdout_is_lost():
        raise NotReadyError("stdout is closed", "redirect stdout, or write to a file with `--output FILE`")


def note(text: str) -> None:
    """Write a message to stderr."""
    print(streams.printable(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Write a warning to stderr: what will go wrong, and how to avoid it."""
    _print_label("warning:", "33")
    note(f" {text}")


def error(problem: InferctlError) -> None:
    """Write `error: what happened`, a blank line and `hint: what to do next` to stderr."""
    _print_label("error:", "1;31")
    note(f" {problem.message}")
    if problem.hint:
        note("")
        _print_label("hint:", "1;36")
        note(f" {problem.hint}")


def fail(problem: InferctlError) -> int:
    """Print the error, with `--json` also as a JSON document, and return the exit code."""
    error(problem)
    return _print_pending(failure(problem), problem.exit_code)


def interrupt() -> int:
    """Print that the command was interrupted, with `--json` also as a JSON document, and return the exit code."""
    note("interrupted")
    return _print_pending(_failure("interrupted", None, EXIT_INTERRUPTED, []), EXIT_INTERRUPTED)


def failure(problem: InferctlError) -> dict[str, Any]:
    """Return the error as JSON: message, hint, exit code, and each error of a file."""
    file_problems: list[dict[str, Any]] = []
    if isinstance(problem, SpecError):
        file_problems = [{"file": problem.file, **vars(each)} for each in problem.problems]
    return _failure(problem.message, problem.hint, problem.exit_code, file_problems)


def _failure(message: str, hint: str | None, exit_code: int, problems: list[dict[str, Any]]) -> dict[str, Any]:
    return {"error": {"message": message, "hint": hint, "exit_code": exit_code, "problems": problems}}


def _print_pending(value: dict[str, Any], exit_code: int) -> int:
    if _json_pending:
        try:
            document(value)
        except InferctlError as write_error:
            error(write_error)
            return write_error.exit_code
    return exit_code


def help_without_command(context: typer.Context) -> None:
    """Print the help of a command group to stdout if it was called without a command."""
    if context.invoked_subcommand is None:
        data(context.get_help())


def plain(text: str) -> str:
    """Return `text` on one line, with escapes in place of line breaks and of what the streams escape."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def rich(stderr: bool = False) -> Console:
    """Return a Rich console, which reads no markup. Rich itself respects NO_COLOR, TERM and COLUMNS."""
    from rich.console import Console
    from rich.segment import Segment

    class Printable(Console):
        """A console whose own escape sequences reach the terminal, but not those in texts."""

        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for text, style, control in super().render(*arguments, **options):
                yield Segment(text if control else streams.printable(text), style, control)

    file = sys.stderr if stderr else sys.stdout
    file = getattr(file, "rich_proxied_file", file)  # while a progress bar is shown
    return Printable(file=streams.raw(file), highlight=False, markup=False, emoji=False)


def table(
    headings: Sequence[str],
    rows: Iterable[Iterable[str | Text]] = (),
    whole: Collection[str] = (),
    *,
    right: Collection[str] = (),
    narrow: bool = False,
) -> Table:
    """Return a table. A cell that is too long is folded, except in the columns `whole`. No text is read as markup.

    `right`: the columns that are aligned to the right. `narrow`: with one space between two columns.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=narrow)
    for heading in headings:
        side: Literal["left", "right"] = "right" if heading in right else "left"
        found.add_column(heading, justify=side, no_wrap=heading in whole, overflow="fold")
    for row in rows:
        found.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return found


def report(renderable: RenderableType, least: int = 0) -> None:
    """Print the result of a command, such as a table, to stdout.

    Without a terminal, as in a pipe, each row is one line without spaces at its end. COLUMNS sets another width.
    `least`: columns without which figures would be truncated. A narrower terminal breaks the lines.
    """
    console = rich()
    console.width = max(console.width, least)
    if console.is_terminal:
        console.print(renderable)
        return
    if not os.environ.get("COLUMNS", "").isdigit():
        console.width = _PIPE_COLUMNS
    with console.capture() as captured:
        console.print(renderable)
    data("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def progress(description: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner and the elapsed time while the body runs. Without a terminal, print one line.

    Yields a function that changes the description on the terminal.
    """
    if not sys.stderr.isatty():
        note(description)
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=rich(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda text: bar.update(task, description=text)


def duration(seconds: float) -> str:
    """Return `~50 s`, `~7 min` or `~2.5 h`, rounded because the value is a forecast."""
    if seconds < 100:
        return f"~{seconds:.0f} s"
    return f"~{seconds / 60:.0f} min" if seconds < 5400 else f"~{seconds / 3600:.1f} h"


def _print_label(text: str, code: str) -> None:
    colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    streams.raw(sys.stderr).write(f"\x1b[{code}m{text}\x1b[0m" if colored else text)
