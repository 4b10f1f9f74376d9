"""Tests of several load workers: they send one schedule, and a crash loses no record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import known_server
import numpy as np
import pytest
from test_load import measure

from inferctl.bench.judge import summary
from inferctl.bench.load import load_run, records
from inferctl.core.errors import InferctlError
from tests.processes import until


def offsets(part: summary.RunRecords) -> list[int]:
    return [int(at) for at in part.measured["intended_ns"].astype(np.int64) - part.start_ns]


def test_workers_send_the_drawn_schedule_together(answering: Callable[..., str], tmp_path: Path) -> None:
    result, part, work = measure(
        answering("--median-ms", "2"), tmp_path / "run", mode="open", rate=150, duration_s=2, workers=2, warmup_s=1
    )
    assert offsets(part) == work.schedule_ns.astype(np.int64).tolist()
    assert part.measured["index"].tolist() == list(range(len(work.schedule_ns)))
    each = [records.read(path) for path in records.files(tmp_path / "run")]
    assert [len(rows) > 0 for rows in each] == [True, True]
    assert [set(rows["index"] % 2) for rows in each] == [{0}, {1}]
    workers = result.state["workers"]
    assert [worker["worker"] for worker in workers] == [0, 1]
    assert result.state["cpu_ns"] == max(worker["cpu_ns"] for worker in workers)
    assert (load_run.cores_used(result.state) or 0) * 100 > (summary.client_cpu_percent(result.state) or 0)


def test_users_of_a_closed_loop_are_distributed_over_workers(answering: Callable[..., str], tmp_path: Path) -> None:
    result, part, _ = measure(
        answering("--median-ms", "20", "--sigma", "0"), tmp_path / "run", users=5, duration_s=1, workers=2
    )
    assert sorted(worker["users"] for worker in result.state["workers"]) == [2, 3]
    rows = part.measured
    assert len(set(rows["index"].tolist())) == len(rows)
    middle = part.start_ns + 500_000_000
    busy = [int(np.sum((rows["sent_ns"] <= at) & (rows["end_ns"] > at))) for at in range(middle, middle + 10**8, 10**6)]
    assert max(busy) == 5


RUN = """
import sys
from pathlib import Path
from inferctl.bench.load import load_run, target
from inferctl.bench.plan import shape, workload
load = shape.Load.model_validate({"mode": "open", "rate": 50, "duration_s": 600, "warmup_s": 0})
work = workload.draw(load, "short", 1)
description = load_run.prepare(load, work, target.connect(sys.argv[1]), 100_000, Path(sys.argv[2]))
load_run.run(load, description, lambda progress: None, lambda: None)
"""


def writer(file: Path) -> int:
    """Return the process that writes a records file."""
    with file.open("rb") as stream:
        return int(json.loads(stream.readlines(300)[1])["pid"])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_load_ends_with_the_benchmark_that_started_it(answering: Callable[..., str], tmp_path: Path) -> None:
    bench = subprocess.Popen([sys.executable, "-c", RUN, answering("--median-ms", "2"), str(tmp_path)])
    try:
        until(lambda: load_run.read_state(tmp_path).get("phase") == "measure", 30)
        pid = writer(tmp_path / "requests-0.bin")
        assert is_running(pid)
    finally:
        bench.kill()
        bench.wait()
    until(lambda: not is_running(pid), 10)


def test_a_killed_worker_ends_the_run_and_loses_no_record(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(live: load_run.LoadProgress) -> None:
        state = load_run.read_state(tmp_path)
        rows = records.read(tmp_path / "requests-1.bin") if state.get("phase") == "measure" else []
        if len(rows) > 100 and not killed:
            killed.append(writer(tmp_path / "requests-1.bin"))
            os.kill(killed[0], signal.SIGKILL)

    with (
        known_server.run_server("--median-ms", "2") as server,
        pytest.raises(InferctlError, match=r"load worker \d was killed \(signal 9\)"),
    ):
        measure(server.url, tmp_path, kill, mode="open", rate=200, duration_s=20, workers=2)
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)
    answered = {index for index in server.truth_ms(100) if index % 2 == 1}
    recorded = set(records.read(tmp_path / "requests-1.bin")["index"].tolist())
    assert len(answered) > 100
    # Responses in flight at the time of the kill were never read. A buffer of 8 KB would have lost all records.
    assert len(answered - recorded) <= 20
    assert (records.merge(tmp_path)["end_ns"] > 0).all()


def test_an_error_in_the_coordinator_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    script = """
import json, sys
from types import SimpleNamespace
from inferctl.bench.loadgen.coordinator import Coordinator
runner = SimpleNamespace(register_message=lambda *_: None, quit=lambda: print("quit"))
load = {"output": sys.argv[1], "workers": 1, "mode": "open"}
coordinator = Coordinator(SimpleNamespace(runner=runner), load)
coordinator._ready = {"node": {}}
coordinator.run()
"""
    line = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.stdout == "quit\n"
    assert load_run.read_state(tmp_path)["problem"] == "KeyError: 'worker'"
