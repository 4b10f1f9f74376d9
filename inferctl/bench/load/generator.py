"""Runs a load: writes what is to be sent, follows Locust's processes, and gathers the exact records that they leave."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.load import locust, records
from inferctl.bench.load.child_server import last_words
from inferctl.bench.load.target import Target
from inferctl.bench.plan.plan import Load
from inferctl.bench.plan.workload import Workload
from inferctl.errors import InferctlError


@dataclass(frozen=True)
class Live:
    """What is known while a load runs: `phase` warm-up, measure or drain; requests/s and latencies (ms) of the last five seconds."""

    phase: str
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    left_s: float


@dataclass(frozen=True)
class Measured:
    """What a load left: all records, on this machine's clock, and the load generator's account of the run (`state-0.json`)."""

    rows: records.Rows
    state: dict[str, Any]


def prepare(load: Load, workload: Workload, target: Target, serial: int, folder: Path) -> Path:
    """Write everything the load generator reads into `folder`; returns the file that describes the load."""
    (folder / "bodies.jsonl").write_bytes(b"\n".join(workload.bodies(target.body)) + b"\n")
    parts: dict[str, npt.NDArray[Any]] = {
        "order": workload.order,
        "schedule": workload.schedule_ns,
        "warmup_schedule": workload.warmup_schedule_ns,
    }
    for name, values in parts.items():
        (folder / f"{name}.bin").write_bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())
    closed = load.mode == "closed"
    description: dict[str, Any] = load.model_dump(exclude={"stages", "spike", "trace"})
    description |= {name: str(folder / f"{name}.bin") for name in parts}
    description |= {
        "url": target.embeddings_url,
        "bodies": str(folder / "bodies.jsonl"),
        "output": str(folder),
        "serial": serial,
        "users": load.peak_users if closed else load.workers + load.remote_workers,
        "timeline": [stage.model_dump(include={"duration_s", "users"}) for stage in load.timeline] if closed else [],
    }
    file = folder / "load.json"
    file.write_text(json.dumps(description, indent=1))
    return file


def run(
    load: Load,
    description: Path,
    watch: Callable[[Live], None],
    check: Callable[[], None],
    headers: Mapping[str, str] | None = None,
) -> Measured:
    """Run the load that `description` names; `watch` hears of it twice a second, `check` may raise to end it.

    `headers` go with each request. They may hold secrets, so no file has them.

    Raises `InferctlError` when Locust or one of its workers fails, is killed or hangs; what they had recorded stays in the folder.
    All processes have ended when this returns or raises.
    """
    folder = description.parent
    for old in (*records.files(folder), folder / "state-0.json", folder / "master.json"):
        old.unlink(missing_ok=True)
    with locust.processes(load, description, folder, headers) as processes:
        _follow(processes, load, folder, watch, check)
    (folder / "master.json").unlink(missing_ok=True)
    state = read_state(folder)
    if problem := processes.problem() or state.get("problem"):
        raise InferctlError(f"the load generator failed: {problem}", f"its log is {processes.log}")
    if state.get("phase") != "done":
        raise InferctlError(f"the load generator failed: {last_words(processes.log)}", f"its log is {processes.log}")
    return Measured(merged(folder, state), state)


def merged(folder: Path, state: Mapping[str, Any]) -> records.Rows:
    """All records in `folder`, on this machine's clock. `state` is the load generator's account; before its end it names no workers."""
    workers = state.get("workers", ())
    return records.merge(folder, {int(one["worker"]): int(one["clock_offset_ns"]) for one in workers})


def cores_used(state: Mapping[str, Any]) -> float | None:
    """Cores of this machine that the whole load generator used while it measured: all its processes here together."""
    wall = state.get("cpu_wall_ns")
    return float(state.get("cpu_here_ns", state["cpu_ns"])) / float(wall) if wall else None


def read_state(folder: Path) -> dict[str, Any]:
    """The load generator's account so far; empty before it begins."""
    with contextlib.suppress(OSError, ValueError):
        state: dict[str, Any] = json.loads((folder / "state-0.json").read_text())
        return state
    return {}


def _follow(
    processes: locust.Processes,
    load: Load,
    folder: Path,
    watch: Callable[[Live], None],
    check: Callable[[], None],
) -> None:
    tails: dict[Path, records.Tail] = {}
    recent: list[tuple[int, float]] = []
    patience = 60 + (locust.WORKERS_S if load.remote_workers else 0)
    limit = time.monotonic() + load.warmup_s + load.duration_s + 2 * load.timeout_s + patience
    while processes.running():
        if time.monotonic() > limit:
            raise InferctlError("the load generator did not end in time", f"its log is {processes.log}")
        check()
        now = time.monotonic_ns()
        for path in records.files(folder):
            rows = tails.setdefault(path, records.Tail(path)).new()
            recent += zip(rows["end_ns"].tolist(), records.latency_ms(rows).tolist(), strict=True) if len(rows) else []
        recent = [entry for entry in recent if now - 5_000_000_000 < entry[0] <= now + 1_000_000_000]
        watch(_live(recent, read_state(folder), load, now))
        processes.wait(0.5)


def _live(recent: list[tuple[int, float]], state: dict[str, Any], load: Load, now_ns: int) -> Live:
    phase = str(state.get("phase", "warm-up"))
    ends = [end for end, _ in recent]
    rate = (len(ends) - 1) / (max(ends) - min(ends)) * 1e9 if len(ends) > 1 and max(ends) > min(ends) else 0.0
    ascending = np.sort([latency for _, latency in recent])
    figures = [float(ascending[stats.rank(len(ascending), q) - 1]) if len(ascending) else None for q in (0.5, 0.99)]
    if phase == "warm-up":
        passed = (now_ns - state["warmup_start_ns"]) / 1e9 if "warmup_start_ns" in state else 0.0
        left = max(0.0, load.warmup_s - passed) + load.duration_s
    else:
        # A load that failed before it measured has no end.
        left = max(0.0, (state.get("measure_end_ns", now_ns) - now_ns) / 1e9)
    return Live(phase, rate, figures[0], figures[1], left)
