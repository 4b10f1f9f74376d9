"""Runs Locust as a process of its own, which leaves exact records; Locust is never imported (it patches the process it is in)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl import assets
from inferctl.bench import records, stats
from inferctl.bench.plan import Load
from inferctl.bench.server import last_words
from inferctl.bench.target import Target
from inferctl.bench.workload import Workload
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
    """What a load left: all records, and the load generator's account of the run (`state-0.json`)."""

    rows: records.Rows
    state: dict[str, Any]


def prepare(load: Load, workload: Workload, target: Target, serial: int, folder: Path) -> Path:
    """Write everything the load generator reads into `folder`; returns the file that describes the load."""
    (folder / "bodies.jsonl").write_bytes(b"\n".join(workload.bodies(target.model)) + b"\n")
    parts: dict[str, npt.NDArray[Any]] = {
        "order": workload.order,
        "schedule": workload.schedule_ns,
        "warmup_schedule": workload.warmup_schedule_ns,
    }
    for name, values in parts.items():
        (folder / f"{name}.bin").write_bytes(values.astype(values.dtype.newbyteorder("<")).tobytes())
    description: dict[str, Any] = load.model_dump()
    description |= {name: str(folder / f"{name}.bin") for name in parts}
    description |= {
        "url": target.embeddings_url,
        "bodies": str(folder / "bodies.jsonl"),
        "output": str(folder),
        "serial": serial,
    }
    file = folder / "load.json"
    file.write_text(json.dumps(description, indent=1))
    return file


def command(load: Load) -> list[str]:
    """How Locust is started; our own file ends the run, so it gets no run time."""
    users = str(load.users if load.mode == "closed" else 1)
    locustfile = str(assets.root() / "benchmarks" / "locustfile.py")
    options = [
        "--headless",
        "--users",
        users,
        "--spawn-rate",
        users,
        "--only-summary",
        "--reset-stats",
        "--exit-code-on-error",
        "0",
    ]
    return [sys.executable, "-m", "locust", "-f", locustfile, *options, "--loglevel", "WARNING"]


def run(load: Load, description: Path, watch: Callable[[Live], None], check: Callable[[], None]) -> Measured:
    """Run the load that `description` names; `watch` hears of it twice a second, `check` may raise to end it.

    Raises `InferctlError` when Locust fails or hangs. Locust has ended when this returns or raises.
    """
    folder = description.parent
    # Locust takes options from LOCUST_* variables and a locust.conf in its folder: neither may change what a plan says.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LOCUST_")}
    environment["INFERCTL_LOAD_FILE"] = str(description)
    log = folder / "locust.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(load),
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _follow(process, load, folder, watch, check)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    state = read_state(folder)
    if process.returncode or state.get("phase") != "done":
        raise InferctlError(
            f"the load generator failed (exit code {process.returncode}): {last_words(log)}", f"its log is {log}"
        )
    return Measured(records.merge(folder), state)


def read_state(folder: Path) -> dict[str, Any]:
    """The load generator's account so far; empty before it begins."""
    with contextlib.suppress(OSError, ValueError):
        state: dict[str, Any] = json.loads((folder / "state-0.json").read_text())
        return state
    return {}


def _follow(
    process: subprocess.Popen[bytes], load: Load, folder: Path, watch: Callable[[Live], None], check: Callable[[], None]
) -> None:
    tail = records.Tail(folder / "requests-0.bin")
    recent: list[tuple[int, float]] = []
    limit = time.monotonic() + load.warmup_s + load.duration_s + 2 * load.timeout_s + 60
    while process.poll() is None:
        if time.monotonic() > limit:
            raise InferctlError("the load generator did not end in time", f"its log is {folder / 'locust.log'}")
        check()
        rows = tail.new()
        now = time.monotonic_ns()
        if len(rows):
            recent += zip(rows["end_ns"].tolist(), records.latency_ms(rows).tolist(), strict=True)
        recent = [entry for entry in recent if entry[0] > now - 5_000_000_000]
        watch(_live(recent, read_state(folder), load, now))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)


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
        left = max(0.0, (state["measure_end_ns"] - now_ns) / 1e9)
    return Live(phase, rate, figures[0], figures[1], left)
