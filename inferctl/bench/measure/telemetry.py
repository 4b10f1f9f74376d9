"""Figures of GPUs over one run, and whether they make the run invalid.

The field names of the classes are the keys of a receipt (docs/receipts.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from inferctl.bench.judge.validity import Validity
from inferctl.bench.load import process_usage
from inferctl.bench.measure.nvml import GpuDevice, GpuProcess, GpuSample

THROTTLED_LIMIT = 0.05
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons (nvml.h), by cause.
# An idle GPU and clocks that a user sets have bits of their own, and are no throttling.
THROTTLES = {"heat": 0x20 | 0x40, "power brake": 0x80, "board limit": 0x200 | 0x400, "power limit": 0x04}
_HARDWARE_SLOWDOWN = 0x08
_ACTIONS = {
    "heat": "improve its cooling",
    "power brake": "check the power supply of the machine",
    "board limit": "`nvidia-smi -q -d PERFORMANCE` shows the cause",
    "hardware": "`nvidia-smi -q -d PERFORMANCE` shows the cause",
}


@dataclass(frozen=True)
class Spread:
    """Lowest, mean and highest value of a sensor over the samples."""

    min: int | float
    mean: int | float
    max: int | float


@dataclass(frozen=True)
class OtherProcess:
    """A process that the benchmark did not start."""

    pid: int
    name: str | None


@dataclass(frozen=True)
class GpuTelemetry:
    """Figures of one GPU over a run; None for what the GPU does not report.

    `ours`: a measured server was on the GPU. `foreign`: other processes on the same GPU or MIG slice. `neighbours`: the
    number of processes in other slices. `untold`: the number of processes that may or may not be the server, because
    the ids are those of another PID namespace.
    """

    index: int
    name: str
    sliced: bool
    samples: int
    seconds: float
    utilisation_percent: Spread | None
    memory_bytes: Spread | None
    power_w: Spread | None
    power_limit_w: float | None
    default_power_limit_w: float | None
    sm_clock_mhz: Spread | None
    temperature_c: Spread | None
    throttled: dict[str, float] | None
    joules: float | None
    joules_from: str | None
    ours: bool
    foreign: tuple[OtherProcess, ...]
    neighbours: int
    untold: int


@dataclass(frozen=True)
class Telemetry:
    """What the GPUs of the machine showed during one run. `absent` has the reason if there are none."""

    gpus: tuple[GpuTelemetry, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the `telemetry` key of a run in a receipt."""
        return asdict(self)


def of_gpu(
    device: GpuDevice, samples: Sequence[GpuSample], server_pids: Iterable[int], earlier: Iterable[GpuProcess]
) -> GpuTelemetry | None:
    """Return the figures of one GPU over its samples; None for fewer than two samples.

    `server_pids` are the processes of the measured servers, `earlier` those on the GPU before a server started.
    """
    if len(samples) < 2:
        return None
    joules, source = _joules(samples)
    return GpuTelemetry(
        index=device.index,
        name=device.name,
        sliced=device.sliced,
        samples=len(samples),
        seconds=round((samples[-1].at_ns - samples[0].at_ns) / 1e9, 3),
        utilisation_percent=_spread(sample.utilisation_percent for sample in samples),
        memory_bytes=_spread(sample.memory_bytes for sample in samples),
        power_w=_spread(sample.power_w for sample in samples),
        power_limit_w=device.power_limit_w,
        default_power_limit_w=device.default_power_limit_w,
        sm_clock_mhz=_spread(sample.sm_clock_mhz for sample in samples),
        temperature_c=_spread(sample.temperature_c for sample in samples),
        throttled=_throttled(samples),
        joules=joules,
        joules_from=source,
        **_processes(samples, set(server_pids), {process.pid for process in earlier}),
    )


def gpu_validity(telemetry: Telemetry) -> Validity:
    """Return the validity of a run by its telemetry.

    A run is invalid if another process was on its GPU, or if heat or a lowered power limit reduced the clocks.
    """
    reasons: list[str] = []
    cautions: list[str] = []
    for gpu in telemetry.gpus:
        _judge_processes(gpu, reasons, cautions)
        _judge_clocks(gpu, reasons, cautions)
    return Validity(tuple(reasons), tuple(cautions))


def _judge_processes(gpu: GpuTelemetry, reasons: list[str], cautions: list[str]) -> None:
    if gpu.foreign:
        names = ", ".join(f"{process.name or 'process'} {process.pid}" for process in gpu.foreign)
        count = "another process was" if len(gpu.foreign) == 1 else f"{len(gpu.foreign)} other processes were"
        stop = "stop it" if len(gpu.foreign) == 1 else "stop them"
        reasons.append(f"{count} on {gpu.name} during the run ({names}): {stop} and measure again")
    if gpu.neighbours:
        cautions.append(
            f"other slices of {gpu.name} were in use during the run, which can lower the clocks of all slices: "
            "stop their processes"
        )
    if gpu.untold > 1:
        cautions.append(
            f"{gpu.untold} processes were on {gpu.name}, and their ids do not show which are the server's; "
            "others slow it down: stop them"
        )


def _judge_clocks(gpu: GpuTelemetry, reasons: list[str], cautions: list[str]) -> None:
    limit, default = gpu.power_limit_w, gpu.default_power_limit_w
    lowered = f"{limit:.0f} W of {default:.0f} W" if limit and default and limit < 0.99 * default else None
    reset = f"reset it with `nvidia-smi -i {gpu.index} -pl {default:.0f}`" if default else ""
    for cause, share in (gpu.throttled or {}).items():
        # A GPU at its default power limit is not disturbed. A T4 always runs at it.
        if not share or (cause == "power limit" and not lowered):
            continue
        detail, action = (f", lowered to {lowered}", reset) if cause == "power limit" else ("", _ACTIONS[cause])
        text = f"{gpu.name} reduced its clocks in {share:.0%} of the samples ({cause}{detail}): {action}"
        (reasons if share > THROTTLED_LIMIT else cautions).append(text)
    if lowered and not (gpu.throttled or {}).get("power limit"):
        cautions.append(f"the power limit of {gpu.name} is lowered to {lowered}, so a higher load is slower: {reset}")


def _processes(samples: Sequence[GpuSample], server_pids: set[int], earlier: set[int]) -> dict[str, Any]:
    """Return whether a server was on the GPU, and the processes there that are not the server's.

    If no process id is the server's (NVML returns ids of another namespace), only the processes that were on the whole
    GPU before are certain to be foreign.
    """
    seen = {process for sample in samples for process in sample.processes or ()}
    servers = {process for process in seen if process.pid in server_pids}
    others = seen - servers
    if servers:
        instances = {process.instance for process in servers}
        foreign = {process for process in others if process.instance in instances}
    else:
        foreign = {process for process in others if process.pid in earlier and process.instance is None}
    rest = len(others - foreign)
    return {
        "ours": bool(servers),
        "foreign": tuple(OtherProcess(pid, process_usage.name(pid)) for pid in sorted(each.pid for each in foreign)),
        "neighbours": rest if servers else 0,
        "untold": 0 if servers else rest,
    }


def _throttled(samples: Sequence[GpuSample]) -> dict[str, float] | None:
    """Return the share of the samples in which each cause reduced the clocks; None if NVML does not report it."""
    masks = [sample.throttle for sample in samples if sample.throttle is not None]
    if not masks:
        return None
    shares = {cause: sum(bool(mask & bits) for mask in masks) / len(masks) for cause, bits in THROTTLES.items()}
    # The hardware-slowdown bit is set together with the bit of its cause. Without that bit the cause is not known.
    explained = THROTTLES["heat"] | THROTTLES["power brake"]
    unexplained = sum(bool(mask & _HARDWARE_SLOWDOWN) and not mask & explained for mask in masks)
    rounded = {cause: round(share, 4) for cause, share in shares.items()}
    return {**rounded, "hardware": round(unexplained / len(masks), 4)}


def _joules(samples: Sequence[GpuSample]) -> tuple[float | None, str | None]:
    """Return the energy over the samples in J and its source: the GPU's counter, else power integrated (trapezoids)."""
    first, last = samples[0].energy_j, samples[-1].energy_j
    if first is not None and last is not None and last >= first:
        return round(last - first, 3), "counter"
    known = [(sample.at_ns / 1e9, sample.power_w) for sample in samples if sample.power_w is not None]
    if len(known) < len(samples):
        return None, None
    pairs = itertools.pairwise(known)
    return round(math.fsum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairs), 3), "power, integrated"


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(min(known), round(math.fsum(known) / len(known), 2), max(known)) if known else None
