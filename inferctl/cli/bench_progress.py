"""Progress of a benchmark on stderr.

On a terminal, one live line is below the lines of completed runs. Elsewhere each phase prints one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from inferctl.bench.measure import search
from inferctl.bench.measure.bench import Bench, Progress
from inferctl.cli import console
from inferctl.receipts import shares

# Seconds of a run outside its load: before it (server and Locust start), and after it (quality check, end of the
# server). The first quality check computes the fp32 reference.
BEFORE_S, AFTER_S, REFERENCE_S = 8.0, 4.0, 8.0
# Start of the phase of `users: auto`. The forecast does not contain it: the number of its steps is unknown.
FINDING_USERS = "finding users"
# The phases of a run after its load.
_AFTER = ("checking quality", "computing the fp32 reference", "embedding the collection", "stopping")


def expected(benchmark: Bench) -> list[float]:
    """Return the seconds that each run will take, in the order of the runs."""
    loads = {target.name: benchmark.load_of(target) for target in benchmark.targets}
    settings = benchmark.plan.search

    def load_s(name: str) -> float:
        load = loads[name]
        if settings:
            return search.forecast(settings, load, benchmark.search_s).seconds
        closed = load.warmup_s / 2 + load.capacity_s + BEFORE_S / 2 if load.capacity_percent else 0.0
        return closed + load.warmup_s / 2 + load.duration_s

    reference_s = REFERENCE_S if benchmark.plan.quality and benchmark.model else 0.0
    return [
        BEFORE_S + load_s(run.configuration) + AFTER_S + (0.0 if number else reference_s)
        for number, run in enumerate(benchmark.order)
    ]


def forecast(benchmark: Bench) -> str:
    """Return how long the benchmark will take and, for a search, how close its rates will be.

    The forecast is for a machine without other load, and says so on a busy one.
    """
    machine = benchmark.environment
    busy = f"; longer on this busy machine (load average {machine.load_1m:g})" * (machine.load_1m > machine.cores / 2)
    busy += "; retrieval is not in this time" * bool(benchmark.collection)
    total = console.duration(sum(expected(benchmark))).removeprefix("~")
    settings = benchmark.plan.search
    if not settings:
        finding = any(benchmark.load_of(target).auto_users for target in benchmark.targets)
        return f"this benchmark takes about {total}{' and the search for the number of users' * finding}{busy}"
    forecasts = [
        search.forecast(settings, benchmark.load_of(target), benchmark.search_s) for target in benchmark.targets
    ]
    resolution = f"{max(each.resolution for each in forecasts):.0%}"
    if settings.budget_s is None:
        return f"this search takes about {total}; near the limit, its rates differ by about {resolution}{busy}"
    budget_use = "uses all of" if any(each.short for each in forecasts) else "needs less than"
    return (
        f"this search {budget_use} its budget of {settings.budget_s:g} s;"
        f" near the limit, its rates differ by about {resolution}"
    )


class ProgressView:
    """Shows the progress that `runner.run` reports. Use it as a context manager.

    `expected` is the forecast of each run.
    """

    def __init__(self, expected: Sequence[float]) -> None:
        self._expected = expected
        self._live: Any = None
        self._spinner: Any = None
        self._start = time.monotonic()
        self._last: tuple[str, int, str] | None = None
        self._number, self._run_start = 0, 0.0

    def __enter__(self) -> ProgressView:
        if sys.stderr.isatty():
            self._spinner = Spinner("dots")
            self._live = Live(console=console.rich(stderr=True), transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Show a new state of the benchmark."""
        if progress.number != self._number:
            self._number, self._run_start = progress.number, time.monotonic()
        if progress.done is not None:
            self._print(f"[{progress.number}/{progress.total}] {progress.name} · {progress.done}")
            return
        remaining = None if progress.phase.startswith(FINDING_USERS) else self.remaining_s(progress)
        key = (progress.name, progress.number, progress.phase)
        if self._live:
            self._live.update(self._rendered(progress, remaining))
        elif key != self._last:
            self._print(" · ".join([line(progress), *_left(remaining)]))
        self._last = key

    def _rendered(self, progress: Progress, remaining_s: float | None) -> Any:
        """Return two rows: the whole benchmark with the time left (None if unknown), and the current phase."""
        elapsed = time.monotonic() - self._start
        whole = Table.grid(padding=(0, 1))
        total = None if remaining_s is None else max(elapsed + remaining_s, 1e-9)
        bar = ProgressBar(total=total, completed=elapsed, width=24)
        runs = f"{max(0, progress.number - 1)} of {progress.total} run{'' if progress.total == 1 else 's'}"
        whole.add_row(bar, " · ".join([runs, *_left(remaining_s)]))
        self._spinner.update(text=Text(line(progress), no_wrap=True, overflow="ellipsis"))
        return Group(whole, self._spinner)

    def remaining_s(self, progress: Progress) -> float:
        """Return the seconds left: of the forecast, and at least those of a load that runs."""
        if not progress.number:
            return sum(self._expected)
        current = self._expected[progress.number - 1] - (time.monotonic() - self._run_start)
        if progress.live:
            current = max(current, progress.live.left_s + AFTER_S)
        elif progress.phase in _AFTER:
            current = min(current, AFTER_S)
        return max(current, 0.0) + sum(self._expected[progress.number :])

    def _print(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            console.note(text)


def line(progress: Progress) -> str:
    """Return a line such as `[2/6] bf16 · measure · 312 req/s · p50 24.1 p99 40.0 ms`, at most 80 columns wide.

    Names longer than 22 characters are truncated.
    """
    name = progress.name if len(progress.name) <= 22 else f"{progress.name[:21]}…"
    parts = [
        f"[{progress.number}/{progress.total}] {name}" if progress.number else name,
        progress.phase,
    ]
    live = progress.live
    if live:
        if live.rate is None:
            return " · ".join(parts)
        parts.append(f"{live.rate:.0f} req/s")
        if live.rejected_percent:
            parts.append(f"{shares.percent(live.rejected_percent, 100)} rejected (429)")
        if live.p50_ms is not None and live.p99_ms is not None:
            latencies = f"p50 {live.p50_ms:.1f} p99 {live.p99_ms:.1f} ms"
            parts += [latencies] if len(" · ".join([*parts, latencies])) <= 80 else []
    elif progress.seconds >= 1:
        parts.append(f"{progress.seconds:.0f} s")
    return " · ".join(parts)


def _left(remaining_s: float | None) -> list[str]:
    return [] if remaining_s is None else [f"{console.duration(remaining_s)} left"]
