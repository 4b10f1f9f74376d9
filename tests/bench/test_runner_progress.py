"""The progress of a benchmark on stderr."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_samples import row, table

from inferctl.bench.load import load_run, records
from inferctl.bench.load.load_run import LoadProgress
from inferctl.bench.measure import environment
from inferctl.bench.measure.bench import Bench, Progress
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import plan, shape
from inferctl.cli import bench_progress


def test_the_time_left_is_of_the_whole_bench_and_of_the_load_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(bench_progress.time, "monotonic", lambda: now[0])
    view = bench_progress.ProgressView([22.0] * 3)

    def left(at: float, number: int, phase: str, left_s: float | None = None) -> float:
        now[0] = at
        live = None if left_s is None else LoadProgress(phase, 312.4, 24.12, 40.0, left_s)
        progress = Progress("a", number, 3, phase, live=live)
        view.update(progress)
        return view.remaining_s(progress)

    with view:
        assert left(0, 1, "starting") == 66
        assert left(4, 1, "starting") == 62
        # The server took 12 s to start, instead of 8 s; 4 s follow the load.
        assert left(12, 1, "measure", left_s=10) == 10 + 4 + 44
        assert left(17, 1, "measure", left_s=1) == 1 + 4 + 44
        # The load is known to be over, also if it was shorter than the forecast.
        assert left(18, 1, "checking quality") == 4 + 44
        assert left(20, 1, "stopping") == 2 + 44
        assert left(24, 2, "starting") == 44
        view.update(Progress("b", 2, 3, "measured", done="measured: 312.4 req/s"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/3] a · starting · ~66 s left"
    assert lines[1] == "[1/3] a · measure · 312 req/s · p50 24.1 p99 40.0 ms · ~58 s left"
    assert lines[-1] == "[2/3] b · measured: 312.4 req/s"


def test_the_plan_quick_says_that_it_takes_two_minutes(tmp_path: Path) -> None:
    quick = plan.read_plan("quick")
    targets = [BenchTarget(one.name, one.precision) for one in quick.configurations]
    work = Bench(quick, targets, None, tmp_path, tmp_path)
    idle = replace(environment.detect(), cores=2, load_1m=0.9)
    assert bench_progress.forecast(replace(work, environment=idle)) == "this benchmark takes about 2 min"
    busy = replace(work, environment=replace(idle, load_1m=9.5))
    said = bench_progress.forecast(busy)
    assert said == "this benchmark takes about 2 min; longer on this busy machine (load average 9.5)"
    assert sum(bench_progress.expected(work)) <= 130
    # Without a model there is no reference.
    unchecked = Bench(quick, targets, None, None, tmp_path)
    assert bench_progress.expected(unchecked)[0] == bench_progress.expected(work)[0] - bench_progress.REFERENCE_S


def test_no_time_is_left_while_users_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    with bench_progress.ProgressView([22.0]) as view:
        view.update(Progress("a", 0, 1, "finding users: 8"))
    assert capsys.readouterr().err == "a \u00b7 finding users: 8\n"


def test_the_rate_is_that_of_the_window_and_rejections_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """100 of 1,000 responses are good in the 10 s of the window so far, and 50 more came before it."""
    now_ms = load_run.time.monotonic_ns() / 1e6
    rows = [
        row(now_ms - 10_000 + 10 * i, 5, error=records.OK if i % 10 == 0 else records.HTTP_ERROR) for i in range(999)
    ]
    early = [row(now_ms - 12_000 + 10 * i, 5) for i in range(50)]
    made = table(*rows, *early)
    made["status"][made["error"] == records.HTTP_ERROR] = 429
    state = {"phase": "measure", "measure_start_ns": int((now_ms - 10_000) * 1e6), "measure_end_ns": int(9e18)}
    monkeypatch.setattr(load_run.records, "files", lambda _: [Path("requests-0.bin")])
    monkeypatch.setattr(load_run.records, "Tail", lambda _: SimpleNamespace(read_new=lambda: made))
    monkeypatch.setattr(load_run, "read_state", lambda _: state)
    seen: list[LoadProgress] = []

    def follow() -> LoadProgress:
        running = iter((True, False))
        processes = SimpleNamespace(running=lambda: next(running), wait=lambda _: None)
        load_run._follow(processes, shape.Load(mode="closed"), tmp_path, seen.append, lambda: None)
        return seen[-1]

    assert follow().rate == pytest.approx(10, rel=0.05)
    assert bench_progress.line(Progress("a", 1, 1, "measure", live=seen[-1])) == (
        "[1/1] a \u00b7 measure \u00b7 10 req/s \u00b7 90% rejected (429) \u00b7 p50 5.0 p99 5.0 ms"
    )
    all_rejected = replace(seen[-1], rejected_percent=100.0)
    # Before, it was `1e+02%`.
    assert " 100% rejected (429)" in bench_progress.line(Progress("a", 1, 1, "measure", live=all_rejected))
    state["phase"] = "drain"
    assert bench_progress.line(Progress("a", 1, 1, "drain", live=follow())) == "[1/1] a \u00b7 drain"


def test_the_line_of_a_long_name_fits_a_terminal() -> None:
    progress = Progress("n" * 30, 16, 16, "measure", live=LoadProgress("measure", 1234, 123.4, 567.8, 3))
    assert len(bench_progress.line(progress)) <= 80


@pytest.mark.parametrize("count", [0, 1, 8])
def test_a_warm_up_has_no_rate_in_the_first_second_of_responses(count: int) -> None:
    """The first batch ends at almost one time, from which no rate follows."""
    now_ns, ends = 10**12, load_run._Ends()
    if count:
        ends.add(table(*(row(now_ns / 1e6 - 500, 100 + 0.1 * i) for i in range(count))))
    live = load_run._progress([], ends, {"phase": "warm-up"}, shape.Load(mode="closed"), now_ns)
    assert bench_progress.line(Progress("a", 1, 1, "warm-up", live=live)) == "[1/1] a \u00b7 warm-up"
    later = load_run._progress([], ends, {"phase": "warm-up"}, shape.Load(mode="closed"), now_ns + 10**9)
    assert later.rate == (pytest.approx(count / 1.4) if count else None)
    stalled = load_run._progress([], ends, {"phase": "warm-up"}, shape.Load(mode="closed"), now_ns + 10**10)
    assert stalled.rate == (0 if count else None)
