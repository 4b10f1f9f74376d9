"""CPU time and memory of processes, read from /proc; every figure is None or 0 where the kernel does not offer it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# Beginnings of names of processes that listen here for a server that runs elsewhere, in a container or on another machine.
_FORWARDERS = (
    "docker-proxy",
    "rootlessport",
    "rootlesskit",
    "conmon",
    "pasta",
    "slirp4netns",
    "ssh",
    "kubectl",
    "socat",
)
_LISTENING = "0A"


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
    for pid in _pids():
        if fields := _stat(pid):
            children.setdefault(int(fields[1]), []).append(pid)
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def listener(port: int) -> int | None:
    """The process that listens on TCP `port` of this machine: the one on top when several share the socket.

    None when there is none, when it is another user's, or when it only passes connections on to somewhere else.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    holders = {pid for pid in _pids() if sockets & _open_files(pid)} if sockets else set()
    tops = [pid for pid in holders if (fields := _stat(pid)) and int(fields[1]) not in holders]
    return tops[0] if len(tops) == 1 and not name(tops[0]).startswith(_FORWARDERS) else None


def cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quotas of its cgroups rounded up."""
    found = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _cgroups() if (quota := _quota(folder))]
    return max(1, min([found, *(math.ceil(quota) for quota in quotas)]))


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


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def name(pid: int) -> str:
    """Name of a process as the kernel knows it; empty when it is gone or cannot be seen."""
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def _listening(port: int) -> set[str]:
    """Inodes of the sockets that listen on `port` (proc(5): local address, state and inode are fields 2, 4 and 10)."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


def _open_files(pid: int) -> set[str]:
    found = set()
    try:
        for entry in (_PROC / str(pid) / "fd").iterdir():
            found.add(str(entry.readlink()))
    except OSError:  # ended, or another user's
        pass
    return found


def _cgroups() -> Iterator[Path]:
    """Folders of this process's cgroups that can hold a CPU quota, and of those above them: version 2 and version 1."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        top = _CGROUPS if not controllers else _CGROUPS / "cpu" if "cpu" in controllers.split(",") else None
        if top:
            inner = top / path.strip("/")
            # In a container the path is often that of the host: its folder is then not there, and the top is the container's own.
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _quota(folder: Path) -> float | None:
    """Cores that the cgroup in `folder` may use; None without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
