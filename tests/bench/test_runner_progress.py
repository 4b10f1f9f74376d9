"""The progress of a benchmark on stderr."""

from __future__ import annotations

import pytest

from inferctl.bench.load.generator import LoadProgress
from inferctl.bench.measure.runner import Progress
from inferctl.cli import bench_progress


def test_the_time_left_is_of_the_whole_bench_and_learns_from_the_runs_that_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(bench_progress.time, "monotonic", lambda: now[0])
    view = bench_progress.ProgressView([10, 30, 20])
    with view:
        first = Progress("a", 1, 3, "starting")
        view.update(first)
        now[0] = 4
        assert view.remaining_s(first) == 56
        now[0] = 20  # twice what was expected
        second = Progress("b", 2, 3, "measure", live=LoadProgress("measure", 312.4, 24.12, 40.0, 3))
        view.update(second)
        assert view.remaining_s(second) == 100
        view.update(Progress("b", 2, 3, "measured", done="measured: 312.4 req/s"))
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] a · starting · ~60 s left",
        "[2/3] b · measure · 312 req/s · p50 24.1 p99 40.0 ms · ~2 min left",
        "[2/3] b · measured: 312.4 req/s",
    ]


def test_the_line_of_a_long_name_fits_a_terminal() -> None:
    progress = Progress("n" * 30, 16, 16, "measure", live=LoadProgress("measure", 1234, 123.4, 567.8, 3))
    assert len(bench_progress.line(progress)) <= 80
