"""Progress of a benchmark on stderr: one live line on a terminal, else a line for each phase."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from inferctl.cli import console

if TYPE_CHECKING:
    from inferctl.bench.runner import Progress


class Show:
    """Shows what `runner.run` tells; use it as a context manager."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._last: tuple[str, int, str] | None = None
        self._started = time.monotonic()
        self._first_run: float | None = None

    def __enter__(self) -> Show:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(12), TimeElapsedColumn())
            self._bar = Bar(*columns, console=console.rich(stderr=True), transient=True)
            self._task = self._bar.add_task("preparing", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def tell(self, progress: Progress) -> None:
        """Take in what is happening now."""
        if progress.number == 1 and self._first_run is None:
            self._first_run = time.monotonic()
        key = (progress.name, progress.number, progress.phase)
        if self._bar:
            done = max(0, progress.number - 1)
            self._bar.update(
                self._task, description=line(progress, self.left_s(progress)), completed=done, total=progress.total
            )
        elif key != self._last:
            console.note(line(progress, None))
        self._last = key

    def left_s(self, progress: Progress) -> float | None:
        """Seconds left, by what the runs so far took; None before one has ended."""
        done = progress.number - 1
        if done < 1 or self._first_run is None:
            return None
        each = (time.monotonic() - self._first_run) / (done + 0.5)
        return max(0.0, each * (progress.total - done - 0.5))


def line(progress: Progress, left_s: float | None) -> str:
    """As in `[2/6] bf16 · measure · 312 req/s · p50 24.1 p99 40.0 ms · about 50 s left`."""
    parts = [
        f"[{progress.number}/{progress.total}] {progress.name}" if progress.number else progress.name,
        progress.phase,
    ]
    if live := progress.live:
        if live.p50_ms is not None and live.p99_ms is not None:
            parts += [f"{live.rate:.0f} req/s", f"p50 {live.p50_ms:.1f} p99 {live.p99_ms:.1f} ms"]
    elif progress.seconds >= 1:
        parts.append(f"{progress.seconds:.0f} s")
    if left_s is not None:
        parts.append(f"about {left_s:.0f} s left")
    elif live and live.left_s:
        parts.append(f"{live.left_s:.0f} s left")
    return " · ".join(parts)
