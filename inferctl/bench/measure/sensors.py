"""Samples of the GPUs of this machine while a load runs, through NVML.

    MachineMonitor (a thread, twice per second) ─► samples ─► window(start, end) ─► Telemetry

A value that a sensor does not report is None. Nothing replaces it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inferctl.bench.load import process_usage
from inferctl.bench.measure import telemetry
from inferctl.bench.measure.nvml import GpuSample, Nvml, NvmlUnavailableError
from inferctl.bench.measure.telemetry import Telemetry


@dataclass(frozen=True)
class MachineSample:
    """All sensors at one time: a sample per GPU, and the server process ids."""

    at_ns: int
    gpus: tuple[GpuSample, ...]
    server_pids: frozenset[int]


class MachineMonitor:
    """Samples the machine in a thread while a run lasts.

    The first sample, before any server starts, shows which processes were on the GPUs already. `process_roots` are the
    roots of the process trees that the benchmark measures. Add the process of a server when it has started. `gpus`:
    None for those of this machine.
    """

    def __init__(self, gpus: Nvml | None = None, every_s: float = 0.5) -> None:
        self._gpus, self._absent, self._every_s = gpus, dict[str, str](), every_s
        if gpus is None:
            try:
                self._gpus = Nvml()
            except NvmlUnavailableError as error:
                self._absent = {"gpu": str(error)}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.devices = self._gpus.devices() if self._gpus else []
        self.process_roots: set[int] = set()
        self.samples: list[MachineSample] = [self._sample()]

    def __enter__(self) -> MachineMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._gpus:
            self._gpus.close()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.samples.append(self._sample())

    def _sample(self) -> MachineSample:
        now = time.monotonic_ns()
        gpus = self._gpus
        return MachineSample(
            now,
            tuple(gpus.sample(device.index, now) for device in self.devices) if gpus else (),
            frozenset(pid for root in self.process_roots for pid in process_usage.tree(root)) if gpus else frozenset(),
        )

    def window(
        self,
        start_ns: int,
        end_ns: int,
        info: Mapping[str, Any],
        *,
        on_this_machine: bool = True,
        started_by_bench: bool = True,
    ) -> Telemetry:
        """Return the telemetry of [start, end] (CLOCK_MONOTONIC) for the server whose `GET /info` is `info`.

        `started_by_bench`: the server started after the first sample. A server on the CPU has no GPU figures.
        """
        if not on_this_machine:
            return Telemetry(absent={"gpu": "the server runs on another machine, which was not watched"})
        kind = (info.get("device") or {}).get("kind")
        samples = [sample for sample in self.samples if start_ns <= sample.at_ns <= end_ns]
        before = self.samples[0] if started_by_bench else None
        server_pids = frozenset(pid for sample in samples for pid in sample.server_pids)
        gpus = []
        for place, device in enumerate(() if kind == "cpu" else self.devices):
            earlier = before.gpus[place].processes if before else None
            figures = telemetry.of_gpu(device, [sample.gpus[place] for sample in samples], server_pids, earlier or ())
            if figures is not None:
                gpus.append(figures)
        # Those that a measured server was on, or all if that is not known.
        return Telemetry(tuple(gpu for gpu in gpus if gpu.ours) or tuple(gpus), dict(self._absent))
