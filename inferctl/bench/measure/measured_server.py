"""One server under measurement: send it one load at a time, and return the records and the state of the machine."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from inferctl.bench import privacy
from inferctl.bench.judge import summary
from inferctl.bench.load import child_server, load_run, process_usage, records
from inferctl.bench.load.server_activity import ServerActivity
from inferctl.bench.load.target import ServerConnection, connect, is_local, local_pid
from inferctl.bench.measure.outcome import Measurement, WorkloadRecord
from inferctl.bench.measure.sensors import MachineMonitor
from inferctl.bench.plan.plan import Run
from inferctl.bench.plan.workload import Workload
from inferctl.core.errors import NotReadyError


class NotifyPhase(Protocol):
    """Receives the phase of a run; `done` is a line on what has ended."""

    def __call__(
        self, phase: str, seconds: float = 0.0, live: load_run.LoadProgress | None = None, done: str | None = None
    ) -> None: ...


def new_serial() -> int:
    """Return a random cache-busting prefix: a multiple of four, since a run uses the next two too. Always six digits.

    It is not drawn from the seed: a server that serves several benchmarks must not receive an input twice. With six
    digits the inputs of all runs have the same length.
    """
    return 100_000 + 4 * secrets.randbelow(225_000)


@dataclass(frozen=True)
class MeasuredServer:
    """A ready server and the `connection` to it; `child` is its process if inferctl started it.

    `monitor` sampled the machine before the server started.
    """

    connection: ServerConnection
    child: child_server.ChildServer | None
    monitor: MachineMonitor
    notify: NotifyPhase

    @property
    def on_this_machine(self) -> bool:
        """Whether the server shares this machine with the load generator."""
        return self.child is not None or is_local(self.connection.url)

    def labeled(self, label: str) -> MeasuredServer:
        """Return this server with a label for each phase that it reports; `label` contains `{phase}`."""
        notify = self.notify

        return replace(self, notify=lambda phase, *details: notify(label.format(phase=phase), *details))

    def measure(self, work: Workload, run: Run, folder: Path) -> Measurement:
        """Send one load to the server; records and logs go into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        load, serial = work.load, new_serial()
        description = load_run.prepare(load, work, self.connection, serial, folder)
        pid = self.child.process.pid if self.child else local_pid(self.connection.url)
        self.monitor.process_roots |= {pid} if pid else set()

        connection = self.connection
        activity = ServerActivity(connection.url, connection.info, connection.access)

        def follow(live: load_run.LoadProgress) -> None:
            self.notify(live.phase, 0.0, live)
            activity.follow(live.phase, live.left_s)

        with process_usage.Sampler({"server": pid} if pid else {}) as sampler:
            try:
                check = self.child.check if self.child else lambda: None
                measured = load_run.run(load, description, follow, check, connection.access.headers)
            finally:
                load_run.delete_inputs(folder)
        if connection.access.headers and (measured.rows["status"] == records.REJECTED).any():
            connection.check_limit()
        window = measured.state["measure_start_ns"], measured.state["measure_end_ns"]
        used = sampler.between(*window) | activity.between(*window)
        return Measurement(
            run=run,
            started=0.0,
            records=summary.RunRecords(
                measured.rows,
                *window,
                load.inputs_per_request,
                offered=len(work.schedule_ns) if load.mode == "open" else None,
                events=measured.events,
                bounds=load.generation.bounds if load.generation else {},
                inputs_by_name=[load.of_name(name).inputs_per_request for name in load.names or ()],
            ),
            state=measured.state,
            resources=self._resources(used, measured.state, pid),
            folder=folder,
            info=connection.info,
            serial=serial,
            telemetry=self.monitor.window(
                *window, connection.info, on_this_machine=self.on_this_machine, started_by_bench=self.child is not None
            ),
            load=load,
            workload=WorkloadRecord(
                work.digest, privacy.name_of(work.corpus), work.corpus_sha256, work.seed, load.inputs, work.approximate
            ),
            pace=self._pace(load.names or [connection.model]),
        )

    def _resources(self, used: dict[str, float], state: load_run.LoadState, pid: int | None) -> dict[str, float]:
        """Return what was `used` in the window, with the load generator apart from other processes."""
        if pid is None and is_local(self.connection.url):
            # The cores of an unknown local server cannot be told apart from those of other processes.
            used.pop("other_cores", None)
        if (client := summary.client_cpu_percent(state)) is not None:
            used["client_cpu_percent"] = client
            if "other_cores" in used:
                used["other_cores"] = round(max(0.0, used["other_cores"] - (load_run.cores_used(state) or 0)), 3)
        return used

    def _pace(self, names: Iterable[str]) -> Mapping[str, Any] | None:
        """Return the server's batch latency model (seconds per batch, tokens/s); None if it does not report one."""
        if "pace" not in self.connection.info:
            return None
        with contextlib.suppress(NotReadyError):
            found = connect(self.connection.url, access=self.connection.access).of_names(names)
            pace: Mapping[str, Any] | None = found.info.get("pace")
            return pace
        return None
