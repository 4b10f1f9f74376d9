"""CPU time and memory of processes, read from /proc; every figure is None or 0 where the kernel does not offer it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Usage:
    """`cpu_seconds` used so far and resident memory `rss_bytes` now, of a process and its descendants."""

    cpu_seconds: float
    rss_bytes: int


@dataclass(frozen=True)
class Machine:
    """CPU seconds since the start of the machine, over all cores: `busy` with anything, `stolen` by the hypervisor."""

    busy: float
    stolen: float


def tree(root: int) -> list[int]:
    """`root` and all its descendants that run now."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def usage(root: int) -> Usage:
    """What `root` and its descendants use; zero when they are gone."""
    seconds, memory = 0.0, 0
    for pid in tree(root):
        if fields := _stat(pid):
            # utime and stime, and those of children that have ended (proc(5), fields 14 to 17; the list starts at field 3).
            seconds += sum(int(value) for value in fields[11:15]) / _TICKS
            memory += int(fields[21]) * _PAGE
    return Usage(seconds, memory)


def machine() -> Machine | None:
    """CPU time of the whole machine; None without /proc/stat."""
    try:
        parts = [int(value) / _TICKS for value in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, interrupt, soft, stolen = parts
    return Machine(user + nice + system + interrupt + soft, stolen)


class Sampler:
    """Watches process trees from a thread while a run lasts: CPU seconds of each, and the highest memory seen."""

    def __init__(self, roots: dict[str, int], every_s: float = 0.5) -> None:
        self._roots = roots
        self._every = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples: list[tuple[int, dict[str, Usage], Machine | None]] = []

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.samples.append(
                (time.monotonic_ns(), {name: usage(pid) for name, pid in self._roots.items()}, machine())
            )
            if self._stop.wait(self._every):
                return

    def between(self, start_ns: int, end_ns: int) -> dict[str, float]:
        """Over [start, end] (CLOCK_MONOTONIC): `<name>_cores` used on average and `<name>_peak_bytes` for each root,
        `other_cores` used by everything else on the machine and `stolen_cores` taken by the hypervisor. Empty with too few samples."""
        inside = [sample for sample in self.samples if start_ns <= sample[0] <= end_ns]
        if len(inside) < 2:
            return {}
        (first_ns, first, machine_first), (last_ns, last, machine_last) = inside[0], inside[-1]
        seconds = (last_ns - first_ns) / 1e9
        figures, ours = {}, 0.0
        for name in self._roots:
            cores = max(0.0, last[name].cpu_seconds - first[name].cpu_seconds) / seconds
            figures[f"{name}_cores"] = round(cores, 3)
            figures[f"{name}_peak_bytes"] = float(max(sample[1][name].rss_bytes for sample in inside))
            ours += cores
        if machine_first and machine_last:
            figures["other_cores"] = round(max(0.0, (machine_last.busy - machine_first.busy) / seconds - ours), 3)
            figures["stolen_cores"] = round((machine_last.stolen - machine_first.stolen) / seconds, 3)
        return figures


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; the name before it may hold spaces and brackets."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
