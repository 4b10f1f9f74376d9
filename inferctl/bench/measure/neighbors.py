"""`--neighbors N`: measure one server with N idle and with N loaded neighbors on the same device, interleaved.

for each pair:  start the server and its N neighbors, all idle
                without: warm up, measure            (the run that the receipt describes)
                with:    load the neighbors ─► warm up, measure ─► check that the load lasted ─► stop it
                (every second pair in reverse order, so that slow drifts cancel out)
all pairs:      inflation of the latencies, and the requests/s of the neighbors
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inferctl.bench.judge import interference, summary, validity
from inferctl.bench.load import load_run, process_usage, records
from inferctl.bench.load.child_server import ChildServer
from inferctl.bench.measure import digests, measured_server, sensors
from inferctl.bench.measure.measured_server import MeasuredServer
from inferctl.bench.measure.outcome import Measurement, NeighborLoad
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Run
from inferctl.bench.plan.shape import Load
from inferctl.core.errors import InferctlError, UsageError

START_TIMEOUT_S = 30.0
# A response after the end of a run shows that a neighbor was under load to the end. Timeout for that response.
LAST_RESPONSE_TIMEOUT_S = 10.0


class _RunEnded(Exception):  # noqa: N818 - not an error: the measured run has ended
    """Ends the load on a neighbor."""


class NeighborLoader:
    """Sends load to a neighbor from a thread. `failure` says why the load ended early; None if it did not."""

    def __init__(self, number: int, server: ChildServer, folder: Path, description: Path, load: Load) -> None:
        self.number, self.folder = number, folder
        self.ended = threading.Event()
        self.failure: str | None = None
        self._server = server
        self.thread = threading.Thread(target=self._run, args=(description, load), daemon=True)

    def _run(self, description: Path, load: Load) -> None:
        try:
            load_run.run(load, description, lambda live: None, self._check)
            self.failure = "its load ended before the run"
        except _RunEnded:
            pass
        except (InferctlError, OSError) as error:
            self.failure = str(error)

    def _check(self) -> None:
        if self.ended.is_set():
            raise _RunEnded
        self._server.check()

    def rows(self) -> records.Rows | None:
        """Return the records so far; None if there are none."""
        with contextlib.suppress(InferctlError, OSError, ValueError):
            found = records.merge(self.folder)
            return found if len(found) else None
        return None

    def wait_for_response(self, after_ns: int, timeout_s: float) -> bool:
        """Wait for a response after `after_ns` (CLOCK_MONOTONIC); return False if none came within `timeout_s`."""
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit and self.failure is None:
            rows = self.rows()
            if rows is not None and int(rows["end_ns"].max()) >= after_ns:
                return True
            time.sleep(0.1)
        return False

    def result(self, start_ns: int, end_ns: int) -> NeighborLoad:
        """Return what the neighbor completed within [start, end), after a response that came later."""
        outlived = self.wait_for_response(end_ns, LAST_RESPONSE_TIMEOUT_S)
        rows = self.rows()
        if rows is None:
            return NeighborLoad(self.number, outlived, self.failure)
        return NeighborLoad(self.number, outlived, self.failure, *interference.achieved(rows, start_ns, end_ns))


@dataclass(frozen=True)
class NeighborSetup:
    """How to measure a pair of runs: the server, its workload, and `start`, which starts neighbor n in a folder."""

    server: MeasuredServer
    work: workload.Workload
    count: int
    start: Callable[[int, Path], AbstractContextManager[ChildServer]]


def measure(setup: NeighborSetup, run: Run, folder: Path) -> Measurement:
    """Measure both runs of a pair; return the one without load, which contains the other as `with_neighbors`.

    Raises `InferctlError` if a server does not start or a neighbor cannot be loaded.
    """
    without: Measurement | None = None
    loaded: Measurement | None = None
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(1, setup.count + 1):
            place = folder / f"neighbour-{number}"
            place.mkdir(parents=True, exist_ok=True)
            servers.append(stack.enter_context(setup.start(number, place)))
        setup.server.monitor.process_roots |= {server.process.pid for server in servers}
        for with_load in load_order(run.repeat):
            if with_load:
                loaded = _measure_with_load(setup, servers, run, folder)
            else:
                without = setup.server.labeled("{phase}, idle neighbors").measure(setup.work, run, folder)
    assert without  # `load_order` has both
    return replace(without, with_neighbors=loaded)


def load_order(repeat: int) -> tuple[bool, bool]:
    """Return whether the neighbors are under load in the first and in the second run of a pair."""
    return (False, True) if repeat % 2 == 0 else (True, False)


def _measure_with_load(setup: NeighborSetup, servers: Sequence[ChildServer], run: Run, folder: Path) -> Measurement:
    """Measure the run with loaded neighbors. Its records are in a folder of their own."""
    server = setup.server.labeled("{phase}, loaded neighbors")
    with contextlib.ExitStack() as stack:
        loaders = []
        for number, neighbor in enumerate(servers, 1):
            setup.server.notify(f"loading neighbor {number}")
            place = folder / f"neighbour-{number}"
            loaders.append(stack.enter_context(_under_load(setup.work, number, neighbor, place)))
        # The sampler counts this process and its children (server, neighbors, all loads), so that the rest is foreign.
        with process_usage.Sampler({"bench": os.getpid()}) as everything:
            measurement = server.measure(setup.work, run, folder / "with-neighbours")
        window = (measurement.records.start_ns, measurement.records.end_ns)
        completed = [loader.result(*window) for loader in loaders]
    used = everything.between(*window)
    resources = {**measurement.resources, **{key: used[key] for key in ("other_cores",) if key in used}}
    return replace(measurement, resources=resources, neighbors=completed)


@contextlib.contextmanager
def _under_load(
    measured: workload.Workload, number: int, server: ChildServer, folder: Path
) -> Iterator[NeighborLoader]:
    """Keep a neighbor under load until the block ends. The block begins after its first response."""
    load = background(measured.load)
    work = workload.draw(load, measured.corpus, measured.seed + number)
    description = load_run.prepare(load, work, server.connection, measured_server.new_serial(), folder)
    loader = NeighborLoader(number, server, folder, description, load)
    loader.thread.start()
    try:
        if not loader.wait_for_response(0, START_TIMEOUT_S):
            raise InferctlError(f"neighbor {number} is not under load: {loader.failure or 'it returned no response'}")
        yield loader
    finally:
        loader.ended.set()
        loader.thread.join()
        load_run.delete_inputs(folder)


def background(load: Load) -> Load:
    """Return the load on a neighbor: a closed loop of the plan's users that lasts longer than any run of `load`."""
    longest = 2 * load.warmup_s + load.duration_s + 4 * load.timeout_s + 120
    return load.as_single_stage(duration_s=min(longest, 86_400), warmup_s=0, workers=1)


def document(measurements: Sequence[Measurement], cores: int, budget_percent: float) -> dict[str, Any] | None:
    """Return the `neighbours` key of a receipt (docs/receipts.md), over all pairs; None if there were no neighbors."""
    pairs = [(run, run.with_neighbors) for run in measurements if run.with_neighbors]
    if not pairs:
        return None
    loads = [loaded for _, loaded in pairs]
    without, with_load = [run.records for run, _ in pairs], [loaded.records for loaded in loads]
    together = summary.summarize(with_load)
    rates = [other.requests_per_s for one in loads for other in one.neighbors if other.requests_per_s is not None]
    return {
        "count": len(loads[0].neighbors),
        "users": loads[0].load and loads[0].load.users,
        **interference.inflation(without, with_load).as_dict(),
        "requests_per_s": {
            "without": summary.summarize(without)["requests_per_s"],
            "with": together["requests_per_s"],
        },
        "neighbour_requests_per_s": {"min": min(rates), "max": max(rates)} if rates else None,
        **_validity(loads, cores, validity.judge_requests(together, budget_percent)).as_dict(),
        "runs": [
            {
                "repeat": loaded.run.repeat,
                "first": "with" if load_order(loaded.run.repeat)[0] else "without",
                "summary": loaded.summary,
                "resources": loaded.resources,
                "telemetry": loaded.telemetry.as_dict(),
                "serial": loaded.serial,
                "others": [other.as_dict() for other in loaded.neighbors],
                "records": digests.of_records(loaded.folder),
            }
            for loaded in loads
        ],
    }


def _validity(loads: Sequence[Measurement], cores: int, together: validity.Validity) -> validity.Validity:
    """Return whether the inflation is valid.

    Each loaded run must be valid, and its neighbors must be under load until its end. `together` judges the requests of
    these runs together.
    """
    reasons, cautions = list(together.reasons), list(together.cautions)
    for loaded in loads:
        found, run = loaded.validity_on(cores), f"run {loaded.run.repeat + 1}"
        reasons += found.labeled(run).reasons
        cautions += found.cautions
        for other in loaded.neighbors:
            if problem := other.problem(loaded.records.seconds):
                reasons.append(f"{run}: neighbor {other.number} {problem}")
    found = validity.Validity(tuple(reasons), tuple(validity.highest_shares(cautions)))
    return found.labeled("with loaded neighbors")


def command_on_device(arguments: Sequence[str], devices: Sequence[str], number: int) -> list[str]:
    """Return the command of server `number` (0 is measured) on its MIG device; unchanged if there are no MIG devices.

    The measured server has the first device exclusively, if there are several.
    """
    if not devices:
        return list(arguments)
    others = devices[1:] or devices
    device = devices[0] if number == 0 else others[(number - 1) % len(others)]
    return ["env", f"CUDA_VISIBLE_DEVICES={device}", *arguments]


def mig_devices(variables: Mapping[str, str]) -> list[str]:
    """Return the MIG devices for the servers; empty if all servers share one device.

    They are those in CUDA_VISIBLE_DEVICES, else those of the first GPU in MIG mode.
    """
    if listed := [name.strip() for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]:
        return listed if all(name.startswith("MIG-") for name in listed) else []
    return sensors.mig_devices()


def reject_running_servers(urls: Sequence[str]) -> None:
    """Raise `UsageError` if a running server is a target: nothing shows which servers share its device."""
    if urls:
        raise UsageError(
            f"`--neighbors` starts the server and its neighbors, but {urls[0]} is already running",
            "remove `--url`; select servers with `--precision`",
        )
