"""What the machine did while a load ran: GPUs through NVML, energy counters of the kernel. Nothing is filled in where a source is silent.

Watch (a thread, twice a second) ─► samples ─► between(start, end) ─► a plain document ─► judge ─► reasons, cautions
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from inferctl.bench.judge.validity import Validity
from inferctl.bench.load import procfs
from inferctl.bench.measure.nvml import Described, GpuSample, NoNvmlError, Nvml

THROTTLED_LIMIT = 0.05
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons (nvml.h): what holds the clocks down, by cause. Idle and clocks set by hand are no throttling.
THROTTLES = {
    "heat": 0x20 | 0x40,
    "power brake": 0x80,
    "board limit": 0x200 | 0x400,
    "power limit": 0x04,
}
_HARDWARE_SLOWDOWN = 0x08
_POWERCAP = Path("/sys/class/powercap")


class Gpus(Protocol):
    """What telemetry asks of NVML (`nvml.Nvml`)."""

    def devices(self) -> list[Described]: ...

    def sample(self, index: int, at_ns: int) -> GpuSample: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Zone:
    """An energy counter of the kernel (powercap): microjoules that start again at 0 after `range_uj`."""

    name: str
    counter: Path
    range_uj: int


def zones(root: Path = _POWERCAP) -> tuple[list[Zone], str | None]:
    """Counters of CPU packages and of memory beside them, and why there are none when there are none.

    Cores and graphics are parts of a package, `psys` contains it: counting them too would count twice.
    """
    found: list[Zone] = []
    locked = None
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            (folder / "energy_uj").read_text()
            found.append(Zone(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except PermissionError:
            locked = folder
        except (OSError, ValueError):
            continue
    if locked is not None:
        return [], f"the kernel lets only root read its energy counters ({locked}/energy_uj)"
    return found, None if found else f"the kernel offers no energy counters ({root}; usual in a virtual machine)"


@dataclass
class Sensors:
    """What can be read on this machine; `absent` says why of what cannot (`gpu`, `cpu_energy`)."""

    gpus: Gpus | None = None
    zones: Sequence[Zone] = ()
    absent: dict[str, str] = field(default_factory=dict)


def sensors() -> Sensors:
    """Everything that this machine offers."""
    found, why = zones()
    made = Sensors(zones=found, absent={"cpu_energy": why} if why else {})
    try:
        made.gpus = Nvml()
    except NoNvmlError as error:
        made.absent["gpu"] = str(error)
    return made


def slices() -> list[str]:
    """UUIDs of the MIG devices of the first GPU in slices; none where there is no such GPU."""
    try:
        gpus = Nvml()
    except NoNvmlError:
        return []
    try:
        return next((list(one.slices) for one in gpus.devices() if one.slices), [])
    finally:
        gpus.close()


@dataclass(frozen=True)
class Look:
    """One look at everything: samples by GPU, counters by zone (microjoules), and our processes at that moment."""

    at_ns: int
    gpus: tuple[GpuSample, ...]
    energy_uj: tuple[int | None, ...]
    ours: frozenset[int]


class Watch:
    """Watches from a thread while a run lasts. The first look, before anything is started, tells who was on the GPUs already.

    `ours` are roots of process trees that may be on a GPU; add to it when a server has started.
    """

    def __init__(self, made: Sensors | None = None, every_s: float = 0.5) -> None:
        self._sensors = made or sensors()
        self._every = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.devices = self._sensors.gpus.devices() if self._sensors.gpus else []
        self.ours: set[int] = set()
        self.looks: list[Look] = [self._look()]

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._sensors.gpus:
            self._sensors.gpus.close()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.looks.append(self._look())

    def _look(self) -> Look:
        now = time.monotonic_ns()
        gpus = self._sensors.gpus
        return Look(
            now,
            tuple(gpus.sample(one.index, now) for one in self.devices) if gpus else (),
            tuple(_number(zone.counter) for zone in self._sensors.zones),
            frozenset(pid for root in self.ours for pid in procfs.tree(root)) if gpus else frozenset(),
        )

    def window(
        self, start_ns: int, end_ns: int, info: Mapping[str, Any], *, here: bool = True, ours: bool = True
    ) -> dict[str, Any]:
        """The document of the window [start, end] (CLOCK_MONOTONIC) of a server whose `GET /info` is `info`.

        `here`: it runs on this machine; `ours`: it was started after the first look. What a server on the CPU did not use, the GPUs, is left out.
        """
        if not here:
            return elsewhere()
        kind = (info.get("device") or {}).get("kind")
        inside = [look for look in self.looks if start_ns <= look.at_ns <= end_ns]
        before = self.looks[0] if ours else None
        gpus = []
        for place, device in enumerate(() if kind == "cpu" else self.devices):
            own = frozenset(pid for look in inside for pid in look.ours)
            earlier = before.gpus[place].processes if before else None
            samples = [look.gpus[place] for look in inside]
            if (figures := gpu(device, samples, own, earlier or ())) is not None:
                gpus.append(figures)
        return {
            "gpus": used(gpus),
            "cpu_energy": cpu_energy(self._sensors.zones, inside),
            "absent": dict(self._sensors.absent),
        }


def elsewhere() -> dict[str, Any]:
    """The document of a run whose server is on another machine."""
    why = "the server runs on another machine, which was not watched"
    return {"gpus": [], "cpu_energy": None, "absent": {"gpu": why, "cpu_energy": why}}


def gpu(
    device: Described, samples: Sequence[GpuSample], ours: Iterable[int], earlier: Iterable[Any]
) -> dict[str, Any] | None:
    """Figures of one GPU over its samples; None for fewer than two. `ours` are process ids of ours, `earlier` who was there before us."""
    if len(samples) < 2:
        return None
    seconds = (samples[-1].at_ns - samples[0].at_ns) / 1e9
    joules, source = _joules(samples)
    return {
        "index": device.index,
        "name": device.name,
        "sliced": device.sliced,
        "samples": len(samples),
        "seconds": round(seconds, 3),
        "utilisation_percent": _spread(one.utilisation_percent for one in samples),
        "memory_bytes": _spread(one.memory_bytes for one in samples),
        "power_w": _spread(one.power_w for one in samples),
        "power_limit_w": device.power_limit_w,
        "default_power_limit_w": device.default_power_limit_w,
        "sm_clock_mhz": _spread(one.sm_clock_mhz for one in samples),
        "temperature_c": _spread(one.temperature_c for one in samples),
        "throttled": _throttled(samples),
        "joules": joules,
        "joules_from": source,
        **_company(samples, set(ours), {one.pid for one in earlier}),
    }


def used(gpus: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The GPUs that a server of ours was seen on; all of them where that cannot be told."""
    return [one for one in gpus if one["ours"]] or list(gpus)


def cpu_energy(counted: Sequence[Zone], looks: Sequence[Look]) -> dict[str, Any] | None:
    """Joules of all CPU packages (and memory where it has a counter) over the looks: of the whole machine, load generator included."""
    if not counted or len(looks) < 2:
        return None
    total = 0
    for place, zone in enumerate(counted):
        values = [look.energy_uj[place] for look in looks]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        steps = (later - earlier for earlier, later in itertools.pairwise(known))
        total += sum(step if step >= 0 else step + zone.range_uj for step in steps)
    return {
        "joules": round(total / 1e6, 3),
        "seconds": round((looks[-1].at_ns - looks[0].at_ns) / 1e9, 3),
        "zones": [zone.name for zone in counted],
        "scope": "whole machine, load generator included",
    }


def judge(document: Mapping[str, Any]) -> Validity:
    """Reasons (others on the GPU, clocks held down by heat or by somebody) and cautions out of a run's telemetry."""
    reasons: list[str] = []
    cautions: list[str] = []
    for one in document.get("gpus", ()):
        _judge_company(one, reasons, cautions)
        _judge_clocks(one, reasons, cautions)
    return Validity(tuple(reasons), tuple(cautions))


def _judge_company(one: Mapping[str, Any], reasons: list[str], cautions: list[str]) -> None:
    if foreign := one["foreign"]:
        who = ", ".join(f"{other['name'] or 'process'} {other['pid']}" for other in foreign)
        many = "another process was" if len(foreign) == 1 else f"{len(foreign)} other processes were"
        reasons.append(f"{many} on {one['name']} meanwhile ({who})")
    if one["neighbours"]:
        cautions.append(f"other slices of {one['name']} were in use meanwhile")
    if one["untold"] > 1:
        cautions.append(
            f"{one['untold']} processes were on {one['name']}, and which of them are the server's cannot be told from here"
        )


def _judge_clocks(one: Mapping[str, Any], reasons: list[str], cautions: list[str]) -> None:
    limit, default = one["power_limit_w"], one["default_power_limit_w"]
    lowered = bool(limit and default and limit < 0.99 * default)
    for cause, share in (one["throttled"] or {}).items():
        if not share:
            continue
        said = f"{one['name']} held its clocks down in {share:.0%} of the samples: {cause}"
        if cause == "power limit" and not lowered:
            # A part at its own limit is what that part is: a T4 lives there.
            cautions.append(f"{said}, its own{f' ({limit:.0f} W)' if limit else ''}")
        elif cause == "power limit":
            said = f"{said}, lowered to {limit:.0f} W of {default:.0f} W"
            (reasons if share > THROTTLED_LIMIT else cautions).append(said)
        else:
            (reasons if share > THROTTLED_LIMIT else cautions).append(said)
    if lowered and not (one["throttled"] or {}).get("power limit"):
        cautions.append(f"the power limit of {one['name']} is lowered to {limit:.0f} W of {default:.0f} W")


def _company(samples: Sequence[GpuSample], ours: set[int], earlier: set[int]) -> dict[str, Any]:
    """Who else computed there: `foreign` for certain, `neighbours` in other slices, `untold` when ids say nothing (another namespace)."""
    seen = {one for sample in samples for one in sample.processes or ()}
    own = {one for one in seen if one.pid in ours}
    others = seen - own
    if own:
        instances = {one.instance for one in own}
        foreign = {one for one in others if one.instance in instances}
    else:
        foreign = {one for one in others if one.pid in earlier and one.instance is None}
    listed = [{"pid": one.pid, "name": procfs.name(one.pid)} for one in sorted(foreign, key=lambda one: one.pid)]
    return {
        "ours": bool(own),
        "foreign": listed,
        "neighbours": len(others - foreign) if own else 0,
        "untold": 0 if own else len(others - foreign),
    }


def _throttled(samples: Sequence[GpuSample]) -> dict[str, float] | None:
    """Share of the samples in which each cause held the clocks down; None when NVML does not say."""
    masks = [one.throttle for one in samples if one.throttle is not None]
    if not masks:
        return None
    shares = {cause: sum(bool(mask & bits) for mask in masks) / len(masks) for cause, bits in THROTTLES.items()}
    # The slowdown bit comes with the bit of its cause; alone it names none.
    explained = THROTTLES["heat"] | THROTTLES["power brake"]
    alone = sum(bool(mask & _HARDWARE_SLOWDOWN) and not mask & explained for mask in masks)
    return {**{cause: round(share, 4) for cause, share in shares.items()}, "hardware": round(alone / len(masks), 4)}


def _joules(samples: Sequence[GpuSample]) -> tuple[float | None, str | None]:
    """Energy over the samples, J, and where it comes from: the part's own counter, else power integrated (trapezoids)."""
    first, last = samples[0].energy_j, samples[-1].energy_j
    if first is not None and last is not None and last >= first:
        return round(last - first, 3), "counter"
    known = [(one.at_ns / 1e9, one.power_w) for one in samples if one.power_w is not None]
    if len(known) < len(samples):
        return None, None
    pairs = itertools.pairwise(known)
    return round(math.fsum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairs), 3), "power, integrated"


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"min": min(known), "mean": round(math.fsum(known) / len(known), 2), "max": max(known)}


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
