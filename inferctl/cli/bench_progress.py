"""Progress of a benchmark on stderr: what has ended stays as a line, below it one live line; without a terminal a line for each phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inferctl.cli import console

if TYPE_CHECKING:
    from inferctl.bench.measure.runner import Bench, Progress

# What a run takes beside its load: the server's start and end, Locust's start, the quality check.
AROUND_S = 12.0


def expected(work: Bench) -> list[float]:
    """Seconds that each run of a bench should take, in order: a guess, corrected by the runs as they end."""
    from inferctl.bench.measure import search

    named = {target.name: work.load_of(target) for target in work.targets}
    settings = work.plan.search

    def seconds(name: str) -> float:
        load = named[name]
        if settings:
            return search.forecast(settings, load, work.search_s).seconds + AROUND_S
        closed = load.warmup_s / 2 + load.capacity_s + AROUND_S / 4 if load.capacity_percent else 0.0
        return closed + load.warmup_s / 2 + load.duration_s + AROUND_S

    return [seconds(run.configuration) for run in work.order]


def forecast(work: Bench) -> str | None:
    """Return how long a search will take and how close its rates will be; None for other benches."""
    from inferctl.bench.measure import search

    settings = work.plan.search
    if not settings:
        return None
    each = [search.forecast(settings, work.load_of(target), work.search_s) for target in work.targets]
    took = duration(sum(one.seconds for one in each) + AROUND_S * len(each))
    close = f"rates about {max(one.resolution for one in each):.0%} apart around the limit"
    if settings.budget_s is None:
        return f"this search takes about {took.removeprefix('~')}: {close}"
    used = "all of" if any(one.short for one in each) else "less than"
    return f"the budget of {settings.budget_s:g} s buys {close}; the search takes {used} it"


class Show:
    """Shows what `runner.run` tells; use it as a context manager. `expected_s` is a first guess of what each run takes, `done` how many are."""

    def __init__(self, expected_s: Sequence[float], done: int = 0) -> None:
        self._expected, self._done = list(expected_s), done
        self._live: Any = None
        self._spinner: Any = None
        self._start = time.monotonic()
        self._last: tuple[str, int, str] | None = None
        self._number, self._began = 0, 0.0
        self._took: list[tuple[float, float]] = []

    def __enter__(self) -> Show:
        if sys.stderr.isatty():
            from rich.live import Live
            from rich.spinner import Spinner

            self._spinner = Spinner("dots")
            self._live = Live(console=console.rich(stderr=True), transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def tell(self, progress: Progress) -> None:
        """Take in what is happening now."""
        if progress.number != self._number:
            if self._number and progress.number:
                self._took.append((self._expected[self._number - 1], time.monotonic() - self._began))
            self._number, self._began = progress.number, time.monotonic()
        if progress.done is not None:
            self._say(f"[{progress.number}/{progress.total}] {progress.name} · {progress.done}")
            return
        left = self.left_s(progress)
        key = (progress.name, progress.number, progress.phase)
        if self._live:
            self._live.update(self._drawn(progress, left))
        elif key != self._last:
            self._say(f"{line(progress)} · {duration(left)} left")
        self._last = key

    def _drawn(self, progress: Progress, left_s: float) -> Any:
        """Two rows: the whole bench with the time left, and what happens now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        passed = time.monotonic() - self._start
        whole = Table.grid(padding=(0, 1))
        share = ProgressBar(total=max(passed + left_s, 1e-9), completed=passed, width=24)
        whole.add_row(share, f"{self._done + len(self._took)} of {progress.total} runs · {duration(left_s)} left")
        self._spinner.update(text=Text(line(progress), no_wrap=True, overflow="ellipsis"))
        return Group(whole, self._spinner)

    def left_s(self, progress: Progress) -> float:
        """Seconds left of the whole bench: what is to come by the guess, times how wrong the guess was for the runs that ended."""
        guessed, took = (sum(column) for column in zip(*self._took, strict=True)) if self._took else (1.0, 1.0)
        ratio = took / guessed
        if not progress.number:
            return ratio * sum(self._expected[self._done :])
        this = ratio * self._expected[progress.number - 1] - (time.monotonic() - self._began)
        return max(this, 0) + ratio * sum(self._expected[progress.number :])

    def _say(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            console.note(text)


def line(progress: Progress) -> str:
    """As in `[2/6] bf16 · measure · 312 req/s · p50 24.1 p99 40.0 ms`; fits 80 columns, of long names the beginning is shown."""
    name = progress.name if len(progress.name) <= 22 else f"{progress.name[:21]}…"
    parts = [
        f"[{progress.number}/{progress.total}] {name}" if progress.number else name,
        progress.phase,
    ]
    live = progress.live
    if live and live.p50_ms is not None and live.p99_ms is not None:
        parts += [f"{live.rate:.0f} req/s", f"p50 {live.p50_ms:.1f} p99 {live.p99_ms:.1f} ms"]
    elif progress.seconds >= 1:
        parts.append(f"{progress.seconds:.0f} s")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """As in `50 s`, `7 min`, `2.5 h`: no more digits than a guess has."""
    if seconds < 100:
        return f"~{seconds:.0f} s"
    return f"~{seconds / 60:.0f} min" if seconds < 5400 else f"~{seconds / 3600:.1f} h"
