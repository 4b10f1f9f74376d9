"""Run a load: write the input files of the load generator, follow Locust's processes and read the records."""

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
from inferctl.bench.load.child_server import last_error
from inferctl.bench.load.target import ServerConnection
from inferctl.bench.plan.shape import Load
from inferctl.bench.plan.workload import Workload
from inferctl.core.errors import InferctlError

# The content of state-0.json: the phase of the run and, at its end, the figures of the load generator itself.
LoadState = dict[str, Any]
# The large input files of the load generator: the bodies, and an array in each `NAME.bin`.
_BODIES, _PARTS = "bodies.jsonl", ("order", "schedule", "warmup_schedule")


@dataclass(frozen=True)
class LoadProgress:
    """Figures of a running load.

    `phase` is warm-up, measure or drain. `rate` is the good responses per second since the start of the measured
    window, as in the result; in the warm-up that of the last 5 s, since the first response. None in the first second of
    each, and after the window.
    Latencies (ms) are those of the good responses of the last 5 s. `left_s` is the remaining time in seconds.
    `rejected_percent` is the share of the responses of the window that are 429.
    """

    phase: str
    rate: float | None
    p50_ms: float | None
    p99_ms: float | None
    left_s: float
    rejected_percent: float = 0.0


@dataclass(frozen=True)
class LoadResult:
    """All records of a load, and the final state of the load generator.

    `events` has the events with tokens of a generation server; None for other servers.
    """

    rows: records.Rows
    state: LoadState
    events: records.Rows | None = None


def prepare(load: Load, workload: Workload, server: ServerConnection, serial: int, folder: Path) -> Path:
    """Write all files that the load generator reads into `folder`. Return load.json, which describes them.

    Raises `InferctlError` if a request has more tokens than the server accepts, and `UsageError` if it has no such
    prompt.
    """
    context = (server.info.get("limits") or {}).get("max_context_tokens")
    longest = max((sum(pair) for pair in zip(workload.input_tokens, workload.output_tokens, strict=True)), default=0)
    if context and longest > context:
        raise InferctlError(
            f"a request has {longest} tokens (input and output), but the server accepts {context}",
            "use shorter `--lengths`, or set `max_request_tokens` in the plan",
        )
    names, bodies = [], list[bytes]()
    for name, part in (workload.mix or {server.model: workload}).items():
        own = server.of_name(name, part.load.task) if workload.mix else server
        if own.task == "embed":
            own.check_prompts(load.prompt_name, load.query_share)
        names.append({"name": name, "url": own.endpoint_url, "first": len(bodies)})
        bodies += part.bodies(own.body)
    (folder / _BODIES).write_bytes(b"\n".join(bodies) + b"\n")
    arrays: tuple[npt.NDArray[Any], ...] = (workload.order, workload.schedule_ns, workload.warmup_schedule_ns)
    for name, values in zip(_PARTS, arrays, strict=True):
        (folder / f"{name}.bin").write_bytes(values.tobytes())
    closed = load.mode == "closed"
    description: dict[str, Any] = load.model_dump(exclude={"stages", "spike", "lengths", "bounds"})
    description |= {name: str(folder / f"{name}.bin") for name in _PARTS}
    description |= {
        "names": names,
        "bodies": str(folder / _BODIES),
        "output": str(folder),
        "serial": serial,
        "events": load.task == "generate",
        "users": load.peak_users if closed else load.workers,
        "timeline": [stage.model_dump(include={"duration_s", "users"}) for stage in load.timeline] if closed else [],
    }
    file = folder / "load.json"
    file.write_text(json.dumps(description, indent=1))
    return file


def delete_inputs(folder: Path) -> None:
    """Delete the files that the load generator reads. They are large, and the plan can draw them again."""
    for name in (_BODIES, *(f"{part}.bin" for part in _PARTS)):
        (folder / name).unlink(missing_ok=True)


def run(
    load: Load,
    description: Path,
    on_progress: Callable[[LoadProgress], None],
    check: Callable[[], None],
    headers: Mapping[str, str] | None = None,
) -> LoadResult:
    """Run the load that the file `description` describes.

    `on_progress` is called twice a second. `check` is called at the same rate and may raise to end the load. `headers`
    are sent with each request; they may contain secrets, so no file contains them.

    Raises `InferctlError` if Locust or one of its workers fails, is killed or hangs. Raises `OSError` if one of them
    cannot write its records, for example on a full disk. The records stay in the folder. All processes have ended when
    this returns or raises.
    """
    folder = description.parent
    for old in (*records.files(folder), *records.event_files(folder), folder / "state-0.json", folder / "master.json"):
        old.unlink(missing_ok=True)
    with locust.processes(load, description, folder, headers) as processes:
        _follow(processes, load, folder, on_progress, check)
    (folder / "master.json").unlink(missing_ok=True)
    processes.check_written()
    state = read_state(folder)
    if problem := processes.problem() or state.get("problem"):
        raise InferctlError(f"the load generator failed: {problem}", f"see {processes.log}")
    if state.get("phase") != "done":
        raise InferctlError(f"the load generator failed: {last_error(processes.log)}", f"see {processes.log}")
    return LoadResult(records.merge(folder), state, records.merge_events(folder))


def cores_used(state: Mapping[str, Any]) -> float | None:
    """Return the cores that all load generator processes used during the measurement."""
    wall = state.get("cpu_wall_ns")
    return float(state.get("cpu_here_ns", state["cpu_ns"])) / float(wall) if wall else None


def read_state(folder: Path) -> LoadState:
    """Return the state of the load generator; empty before it starts."""
    with contextlib.suppress(OSError, ValueError):
        state: LoadState = json.loads((folder / "state-0.json").read_text())
        return state
    return {}


def _follow(
    processes: locust.Processes,
    load: Load,
    folder: Path,
    on_progress: Callable[[LoadProgress], None],
    check: Callable[[], None],
) -> None:
    tails: dict[Path, records.Tail] = {}
    recent: list[tuple[int, float]] = []
    ends = _Ends()
    limit = time.monotonic() + load.warmup_s + load.duration_s + 2 * load.timeout_s + 60
    while processes.running():
        if time.monotonic() > limit:
            raise InferctlError("the load generator did not end in time", f"see {processes.log}")
        check()
        now = time.monotonic_ns()
        for path in records.files(folder):
            rows = tails.setdefault(path, records.Tail(path)).read_new()
            if len(rows):
                ends.add(rows)
            # A server that fails all requests has no throughput.
            good = rows[rows["error"] == records.OK] if len(rows) else rows
            recent += zip(good["end_ns"].tolist(), records.latency_ms(good).tolist(), strict=True) if len(good) else []
        recent = [entry for entry in recent if now - 5_000_000_000 < entry[0] <= now + 1_000_000_000]
        on_progress(_progress(recent, ends, read_state(folder), load, now))
        processes.wait(0.5)


class _Ends:
    """The times (ns) at which responses ended: all, the good ones, and the rejected ones."""

    def __init__(self) -> None:
        self._all: list[npt.NDArray[Any]] = []
        self._good: list[npt.NDArray[Any]] = []
        self._rejected: list[npt.NDArray[Any]] = []

    def add(self, rows: records.Rows) -> None:
        """Add new records."""
        self._all.append(rows["end_ns"].copy())
        self._good.append(rows["end_ns"][rows["error"] == records.OK])
        self._rejected.append(rows["end_ns"][rows["status"] == records.REJECTED])

    def first(self, default_ns: int) -> int:
        """Return the time of the first response, good or not; `default_ns` without one."""
        return min((int(part.min()) for part in self._all), default=default_ns)

    def good(self, start_ns: int, end_ns: int) -> int:
        """Return the number of good responses in a window."""
        return _count(self._good, start_ns, end_ns)

    def rejected_percent(self, start_ns: int, end_ns: int) -> float:
        """Return the percentage of the responses in a window that are 429."""
        return 100 * _count(self._rejected, start_ns, end_ns) / max(1, _count(self._all, start_ns, end_ns))


def _count(times: list[npt.NDArray[Any]], start_ns: int, end_ns: int) -> int:
    return sum(int(np.count_nonzero((part >= start_ns) & (part < end_ns))) for part in times)


def _progress(
    recent: list[tuple[int, float]], received: _Ends, state: LoadState, load: Load, now_ns: int
) -> LoadProgress:
    phase = str(state.get("phase", "warm-up")).replace("done", "drain")
    if phase == "warm-up":
        start_ns, end_ns = max(received.first(now_ns), now_ns - 5_000_000_000), now_ns
    else:
        start_ns, end_ns = int(state.get("measure_start_ns", 0)), min(now_ns, int(state.get("measure_end_ns", now_ns)))
    rate: float | None = None
    if phase in ("warm-up", "measure") and end_ns - start_ns >= 1_000_000_000:
        rate = received.good(start_ns, end_ns) / (end_ns - start_ns) * 1e9
    rejected = received.rejected_percent(start_ns, end_ns) if rate is not None else 0.0
    latencies = np.sort([latency for _, latency in recent])
    figures = [float(latencies[stats.rank(len(latencies), q) - 1]) if len(latencies) else None for q in (0.5, 0.99)]
    if phase == "warm-up":
        elapsed_s = (now_ns - state["warmup_start_ns"]) / 1e9 if "warmup_start_ns" in state else 0.0
        left_s = max(0.0, load.warmup_s - elapsed_s) + load.duration_s
    else:
        # A load that failed before the measurement has no end time.
        left_s = max(0.0, (state.get("measure_end_ns", now_ns) - now_ns) / 1e9)
    return LoadProgress(phase, rate, figures[0], figures[1], left_s, rejected)
