"""Samples of this machine while a load runs: GPUs through NVML, and the kernel's energy counters.

    MachineMonitor (a thread, twice per second) ─► samples ─► window(start, end) ─► Telemetry

A value that a sensor does not report is None. Nothing replaces it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from inferctl.bench.load import process_usage
from inferctl.bench.measure import telemetry
from inferctl.bench.measure.nvml import GpuDevice, GpuSample, Nvml, NvmlUnavailableError
from inferctl.bench.measure.telemetry import Telemetry

_POWERCAP = Path("/sys/class/powercap")


class Gpus(Protocol):
    """What a monitor requests from NVML (`nvml.Nvml`)."""

    def devices(self) -> list[GpuDevice]: ...

    def sample(self, index: int, at_ns: int) -> GpuSample: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Zone:
    """An energy counter of the kernel (powercap), in microjoules. It restarts at 0 after `range_uj`."""

    name: str
    counter: Path
    range_uj: int


def zones(root: Path = _POWERCAP) -> tuple[list[Zone], str | None]:
    """Return the energy counters of CPU packages and of memory, and the reason if there are none.

    Counters of cores and of graphics are part of a package, and `psys` contains the package. They would count twice.
    """
    found: list[Zone] = []
    unreadable = None
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            (folder / "energy_uj").read_text()
            found.append(Zone(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except PermissionError:
            unreadable = folder
        except (OSError, ValueError):
            continue
    if unreadable is not None:
        return [], f"the kernel lets only root read its energy counters ({unreadable}/energy_uj)"
    return found, None if found else f"the kernel offers no energy counters ({root}; usual in a virtual machine)"


@dataclass
class Sensors:
    """The sensors of this machine. `absent` has the reason for each that is missing (`gpu`, `cpu_energy`)."""

    gpus: Gpus | None = None
    zones: Sequence[Zone] = ()
    absent: dict[str, str] = field(default_factory=dict)


def detect() -> Sensors:
    """Return all sensors of this machine."""
    found, reason = zones()
    sensors = Sensors(zones=found, absent={"cpu_energy": reason} if reason else {})
    try:
        sensors.gpus = Nvml()
    except NvmlUnavailableError as error:
        sensors.absent["gpu"] = str(error)
    return sensors


@dataclass(frozen=True)
class MachineSample:
    """All sensors at one time: a sample per GPU, a counter per zone (microjoules), and the server process ids."""

    at_ns: int
    gpus: tuple[GpuSample, ...]
    energy_uj: tuple[int | None, ...]
    server_pids: frozenset[int]


class MachineMonitor:
    """Samples the machine in a thread while a run lasts.

    The first sample, before any server starts, shows which processes were on the GPUs already. `process_roots` are the
    roots of the process trees that the benchmark measures. Add the process of a server when it has started.
    """

    def __init__(self, sensors: Sensors | None = None, every_s: float = 0.5) -> None:
        self._sensors = sensors or detect()
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.devices = self._sensors.gpus.devices() if self._sensors.gpus else []
        self.process_roots: set[int] = set()
        self.samples: list[MachineSample] = [self._sample()]

    def __enter__(self) -> MachineMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._sensors.gpus:
            self._sensors.gpus.close()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.samples.append(self._sample())

    def _sample(self) -> MachineSample:
        now = time.monotonic_ns()
        gpus = self._sensors.gpus
        return MachineSample(
            now,
            tuple(gpus.sample(device.index, now) for device in self.devices) if gpus else (),
            tuple(_read_counter(zone.counter) for zone in self._sensors.zones),
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
            return telemetry.of_another_machine()
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
        return Telemetry(
            gpus=telemetry.used_gpus(gpus),
            cpu_energy=_cpu_energy(self._sensors.zones, samples),
            absent=dict(self._sensors.absent),
        )


def _cpu_energy(counted: Sequence[Zone], samples: Sequence[MachineSample]) -> telemetry.CpuEnergy | None:
    """Return the energy of all zones over the samples; None if a counter is missing in one of them."""
    if not counted or len(samples) < 2:
        return None
    joules = telemetry.counted_joules([sample.energy_uj for sample in samples], [zone.range_uj for zone in counted])
    if joules is None:
        return None
    return telemetry.CpuEnergy(
        joules=joules,
        seconds=round((samples[-1].at_ns - samples[0].at_ns) / 1e9, 3),
        zones=tuple(zone.name for zone in counted),
    )


def _read_counter(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
