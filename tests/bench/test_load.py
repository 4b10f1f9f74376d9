"""Tests of loads that real Locust processes send to a server with known latencies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_samples import SECOND, row, table

from inferctl.bench.judge import summary, validity
from inferctl.bench.load import load_run, records, target
from inferctl.bench.plan import shape, workload


def measure(
    url: str, folder: Path, on_progress: Callable[[Any], None] = lambda live: None, **settings: object
) -> tuple[load_run.LoadResult, summary.RunRecords, workload.Workload]:
    load = shape.Load.model_validate({"warmup_s": 0, "timeout_s": 10, **settings})
    work = workload.draw(load, "short", seed=3)
    folder.mkdir(exist_ok=True)
    description = load_run.prepare(load, work, target.ServerConnection(url, "test"), 100, folder)
    result = load_run.run(load, description, on_progress, lambda: None)
    offered = len(work.schedule_ns) if load.mode == "open" else None
    part = summary.RunRecords(result.rows, result.state["measure_start_ns"], result.state["measure_end_ns"], 1, offered)
    return result, part, work


def test_every_request_is_recorded_once_with_the_figures_of_the_server_after_a_warm_up(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    """The warm-up ends when windows agree, and is not measured."""
    url = answering("--median-ms", "5", "--sigma", "0")
    result, part, _ = measure(url, tmp_path / "run", users=4, duration_s=1, warmup_s=20, window_s=0.5)
    rows = part.measured
    warm = result.rows[result.rows["phase"] == records.WARMUP]
    assert len(warm) > 0
    assert warm["sent_ns"].max() <= rows["sent_ns"].max()
    indexes = rows["index"].tolist()
    assert sorted(indexes) == list(range(min(indexes), min(indexes) + len(rows)))
    assert (rows["status"] == 200).all()
    assert (rows["tokens"] >= 4).all()
    assert np.allclose(rows["queue_ms"], 0.1)
    assert np.isnan(rows["tokenize_ms"]).all()
    assert (rows["sent_ns"] <= rows["first_ns"]).all()
    assert (rows["first_ns"] <= rows["end_ns"]).all()
    assert result.state["phase"] == "done"
    assert 0 < (summary.client_cpu_percent(result.state) or 0) <= 110
    if result.state["steady"]:
        last = result.state["windows"][-3:]
        assert max(last) - min(last) <= 0.1 * sum(last) / 3 + 1e-9


def test_sends_beyond_the_outstanding_limit_are_dropped_and_counted(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    url = answering("--median-ms", "400", "--sigma", "0")
    _, part, work = measure(
        url, tmp_path / "run", mode="open", arrivals="constant", rate=50, duration_s=2, max_outstanding=5
    )
    found = summary.summarize([part])
    assert found["dropped"] > 50
    assert found["requests"] == len(work.schedule_ns) == 100
    assert found["errors"]["dropped"] == found["dropped"]


def test_failures_are_recorded_by_kind(answering: Callable[..., str], tmp_path: Path) -> None:
    _, part, _ = measure(
        answering("--median-ms", "5", "--fail-after", "20"), tmp_path / "status", users=2, duration_s=1
    )
    assert set(part.measured["status"].tolist()) == {200, 500}
    assert summary.summarize([part])["errors"]["HTTP status"] > 0
    slow = answering("--median-ms", "3000", "--sigma", "0")
    _, part, _ = measure(slow, tmp_path / "slow", users=1, duration_s=1, timeout_s=0.5)
    assert set(part.measured["error"].tolist()) == {records.TIMEOUT}


def test_the_measurement_does_not_wait_for_the_warm_ups_next_request(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    _, part, _ = measure(
        answering("--median-ms", "1"),
        tmp_path / "run",
        mode="open",
        arrivals="constant",
        rate=0.5,
        warmup_s=1,
        duration_s=2,
    )
    first = part.measured[0]
    # The warm-up's next request would have been due a second later.
    assert first["sent_ns"] - first["intended_ns"] < 500_000_000


def test_a_late_load_generator_is_a_reason_or_a_warning() -> None:
    def judged(late_ms: float, answered: int, **state: float) -> validity.Validity:
        rows = [row(10 * n, 5 + late_ms, late_ms=late_ms) for n in range(400)]
        found = summary.summarize([summary.RunRecords(table(*rows), 0, 4 * SECOND, 1, 400)])
        return validity.judge(found | {"answered": answered}, {"client_cpu_percent": 40}, state, 2)

    assert "the server fell behind" in judged(0, 300).reasons[0]
    assert "the load generator was late" in judged(5, 300).reasons[0]
    assert "busiest second" in judged(0, 400, cpu_peak_percent=97).cautions[0]
    assert judged(0, 400, cpu_peak_percent=80) == validity.Validity((), ())
