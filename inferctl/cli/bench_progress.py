"""Progress of a benchmark on stderr: one live line on a terminal, else a line for each phase."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from inferctl.cli import console

if TYPE_CHECKING:
    from inferctl.bench.runner import Progress


class Show:
    """Shows what `runner.run` tells; use it as a context manager. `run_s` is a first guess of what one run takes."""

    def __init__(self, run_s: float) -> None:
        self._guess = run_s
        self._live: Any = None
        self._task: Any = None
        self._last: tuple[str, int, str] | None = None
        self._began: dict[int, float] = {}

    def __enter__(self) -> Show:
        if sys.stderr.isatty():
            from rich.progress import Progress as Bar
            from rich.progress import SpinnerColumn, TextColumn
            from rich.table import Column

            text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            self._live = Bar(SpinnerColumn(), text, console=console.rich(stderr=True), transient=True)
            self._task = self._live.add_task("preparing", total=None)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def tell(self, progress: Progress) -> None:
        """Take in what is happening now."""
        self._began.setdefault(progress.number, time.monotonic())
        key = (progress.name, progress.number, progress.phase)
        if self._live:
            self._live.update(self._task, description=line(progress, self.left_s(progress)))
        elif key != self._last:
            console.note(line(progress, self.left_s(progress)))
        self._last = key

    def left_s(self, progress: Progress) -> float:
        """Seconds left: what the runs so far took on average (before one has ended: the guess), times the runs to come."""
        now, first = time.monotonic(), self._began.get(1)
        if first is None:
            return self._guess * progress.total
        begun, done = self._began[progress.number], progress.number - 1
        each = (begun - first) / done if done else self._guess
        return max(each - (now - begun), 0) + each * (progress.total - progress.number)


def line(progress: Progress, left_s: float) -> str:
    """As in `[2/6] bf16 · measure · 312 req/s · p50 24.1 p99 40.0 ms · ~50 s left`; fits 80 columns."""
    parts = [
        f"[{progress.number}/{progress.total}] {progress.name}" if progress.number else progress.name,
        progress.phase,
    ]
    live = progress.live
    if live and live.p50_ms is not None and live.p99_ms is not None:
        parts += [f"{live.rate:.0f} req/s", f"p50 {live.p50_ms:.1f} p99 {live.p99_ms:.1f} ms"]
    elif progress.seconds >= 1:
        parts.append(f"{progress.seconds:.0f} s")
    return " · ".join([*parts, f"~{left_s:.0f} s left"])
