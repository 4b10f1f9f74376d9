"""Lines on stderr for build and push events: one per step, with its seconds, bytes moved and whether it was cached."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from inferctl.cli import console
from inferctl.core.sizes import size
from inferctl.image.events import (
    Event,
    Note,
    Phase,
    Retry,
    StepBytes,
    StepFinished,
    StepLog,
    StepStarted,
)

if TYPE_CHECKING:
    from inferctl.image.library import LibraryComparison
    from inferctl.image.verify import Verified

Result = TypeVar("Result")
# Columns next to the step's name: indentation, a space, the result, two spaces, the bytes moved.
_OTHER_COLUMNS = 2 + 1 + 7 + 2 + 8


class BuildView:
    """Shows build and push events. On a terminal, running steps are below the lines, with a clock."""

    def __init__(self, live: bool) -> None:
        self._progress: Progress | None = None
        if live:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._progress = Progress(*columns, console=console.rich(stderr=True), transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._names: dict[str, str] = {}
        self._last_printed: dict[str, float] = {}
        self._repeats_build = False

    def __enter__(self) -> BuildView:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def follow(self, running: Generator[Event, None, Result]) -> Result:
        """Show the events of the generator `running`, close it and return its result."""
        with closing(running):
            while True:
                try:
                    event = next(running)
                except StopIteration as end:
                    result: Result = end.value
                    return result
                self.show(event)

    def show(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Phase(name, detail):
                # A push repeats the build from the cache, so only new steps get a line.
                self._repeats_build = name == "push"
                for key in list(self._tasks):
                    self._done(key)
                self._line(f"{name}: {detail}" if detail else name)
            case Note(text):
                self._line(f"  {text}")
            case StepStarted(id, name):
                self._names[id] = name
                self._last_printed.pop(id, None)
                if not _is_quiet(name):
                    self._run(id, short(name))
            case StepBytes(id, item, current, total):
                of = f" of {size(total)}" if total else ""
                self._run(
                    id, f"{short(self._names.get(id, ''))}  {item.removeprefix('sha256:')[:12]} {size(current)}{of}"
                )
            case StepLog(id, name, text):
                self._run(id, f"{short(name, name_width() // 2)}  {text[: name_width() // 2]}")
            case StepFinished():
                self._finished(event)
            case Retry(attempt, attempts, delay, reason):
                self._line(f"  attempt {attempt} of {attempts} failed, retry in {delay:.0f} s: {reason}")

    def _finished(self, step: StepFinished) -> None:
        self._done(step.id)
        if step.error is not None and "context canceled" in step.error:
            return
        moved = f"  {size(step.bytes)}" if step.bytes > 1000 else ""
        if not step.error and (
            _is_quiet(step.name) or (self._repeats_build and (step.cached or step.name.startswith("[")))
        ):
            return
        result = "FAILED" if step.error else "CACHED" if step.cached else f"{step.seconds:.1f}s"
        self._line(f"  {short(step.name):<{name_width()}} {result:>7}{moved}")

    def _run(self, key: str, text: str) -> None:
        if self._progress is None:
            self._print_if_slow(key, text)
            return
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=None)
        else:
            self._progress.update(self._tasks[key], description=text)

    def _print_if_slow(self, key: str, text: str) -> None:
        """Print a line for a running step every 30 s: CI systems kill jobs without output."""
        now = time.monotonic()
        if now - self._last_printed.setdefault(key, now) >= 30:
            self._last_printed[key] = now
            console.note(f"  ... {text}")

    def _done(self, key: str) -> None:
        self._last_printed.pop(key, None)
        task = self._tasks.pop(key, None)
        if self._progress and task is not None:
            self._progress.remove_task(task)

    def _line(self, text: str) -> None:
        if self._progress:
            self._progress.console.print(text, markup=False, overflow="ignore", crop=False)
        else:
            console.note(text)


def follow(running: Generator[Event, None, Result]) -> Result:
    """Show the events of the generator `running` on stderr, close it and return its result."""
    with BuildView(live=sys.stderr.isatty()) as view:
        return view.follow(running)


def _is_quiet(name: str) -> bool:
    """Return whether a step belongs to the builder, not to a line of the Dockerfile."""
    return bool(re.match(r"\[internal\] (?!load build context)|\[[^\]]*\] (?:LINK |load \.dockerignore)", name))


def name_width() -> int:
    """Return the columns for a step's name, so that its line fits the terminal (COLUMNS, or 80 without a terminal)."""
    return max(30, min(100, shutil.get_terminal_size().columns) - _OTHER_COLUMNS)


def short(name: str, width: int | None = None) -> str:
    """Return a step's name on one line without mounts, options and the preparation of pip, truncated to `width`."""
    width = width or name_width()
    text = re.sub(r"\s--(?:mount|link|chown|chmod)(?:=\S+)?", "", name)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"RUN if \[ .*?; fi; (?:env -u \S+ )?", "RUN ", text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def show_verified(result: Verified, *, several: bool) -> None:
    """Print the result of the verification of a model on stderr, with its name if there are `several`."""
    closeness = "not compared with fp32"
    if result.cosine_min is not None:
        closeness = f"cosine to fp32 at least {result.cosine_min:.6f}"
    elif result.score_difference is not None:
        closeness = f"relative score difference to fp32 at most {result.score_difference:.2g}"
    elif result.kl is not None:
        closeness = f"KL divergence from fp32 at least {result.kl:.2g} nats, top-1 agreement {result.top_1:.1%}"
    output = {"rerank": "scores", "classify": "scores", "generate": f"{result.tokens} tokens"}.get(
        result.task, f"{result.dimensions} dimensions"
    )
    name = f"{result.name}: " if several else ""
    console.note(
        f"verified: {name}{result.precision} ({result.level}) on {result.device}, {result.texts} texts, {output}, {closeness}"
    )
    if result.library:
        show_compared(result.library)


def show_compared(result: LibraryComparison) -> None:
    """Print the result of a comparison with a library on stderr."""
    console.note(f"equals {result.library}: {result.texts} texts, {result.figures}")
