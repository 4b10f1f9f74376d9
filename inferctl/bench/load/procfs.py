"""Read CPU time and memory of processes from /proc. A figure is None or 0 where the kernel does not provide it."""

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
# Prefixes of the names of processes that forward connections to a server in a container or on another machine.
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
class ProcessUsage:
    """CPU seconds used so far and resident memory (bytes) of a process and its descendants."""

    cpu_seconds: float
    rss_bytes: int


@dataclass(frozen=True)
class MachineCpu:
    """CPU seconds since boot, over all cores: `busy` with any work, `stolen` by the hypervisor."""

    busy: float
    stolen: float


def tree(root: int) -> list[int]:
    """Return the ids of `root` and of all its running descendants."""
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
    """Return the process that listens on TCP `port` of this machine, or None.

    If a parent and its children share the socket, this is the parent. None means that no process listens, that it
    belongs to another user, or that it forwards connections to a server elsewhere.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    holders = {pid for pid in _pids() if sockets & _open_files(pid)} if sockets else set()
    parents = [pid for pid in holders if (fields := _stat(pid)) and int(fields[1]) not in holders]
    return parents[0] if len(parents) == 1 and not name(parents[0]).startswith(_FORWARDERS) else None


def cores() -> int:
    """Return the number of cores that this process may use: its affinity, limited by the CPU quotas of its cgroups."""
    found = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _cgroups() if (quota := _quota(folder))]
    return max(1, min([found, *(math.ceil(quota) for quota in quotas)]))


def usage(root: int) -> ProcessUsage:
    """Return what `root` and its descendants use; zero if they have ended."""
    seconds, memory = 0.0, 0
    for pid in tree(root):
        if fields := _stat(pid):
            # Fields 14 to 17 of proc(5): utime and stime, also of children that have ended. The list starts at field 3.
            seconds += sum(int(value) for value in fields[11:15]) / _TICKS
            memory += int(fields[21]) * _PAGE
    return ProcessUsage(seconds, memory)


def machine() -> MachineCpu | None:
    """Return the CPU time of the whole machine; None without /proc/stat."""
    try:
        parts = [int(value) / _TICKS for value in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, interrupt, soft, stolen = parts
    return MachineCpu(user + nice + system + interrupt + soft, stolen)


class Sampler:
    """Sample the CPU seconds and the memory of process trees from a thread."""

    def __init__(self, roots: dict[str, int], every_s: float = 0.5) -> None:
        self._roots = roots
        self._every = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.samples: list[tuple[int, dict[str, ProcessUsage], MachineCpu | None]] = []

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.samples.append(
                (time.monotonic_ns(), {name: usage(pid) for name, pid in self._roots.items()}, machine())
            )
            if self._stop.wait(self._every):
                return

    def between(self, start_ns: int, end_ns: int) -> dict[str, float]:
        """Return figures of the samples between two times (CLOCK_MONOTONIC).

        `<name>_cores` (average) and `<name>_peak_bytes` for each root, `other_cores` used by all other processes of the
        machine, and `stolen_cores` taken by the hypervisor. Empty with fewer than two samples.
        """
        inside = [sample for sample in self.samples if start_ns <= sample[0] <= end_ns]
        if len(inside) < 2:
            return {}
        (first_ns, first, machine_first), (last_ns, last, machine_last) = inside[0], inside[-1]
        seconds = (last_ns - first_ns) / 1e9
        figures, sampled_cores = {}, 0.0
        for name in self._roots:
            cores = max(0.0, last[name].cpu_seconds - first[name].cpu_seconds) / seconds
            figures[f"{name}_cores"] = round(cores, 3)
            figures[f"{name}_peak_bytes"] = float(max(sample[1][name].rss_bytes for sample in inside))
            sampled_cores += cores
        if machine_first and machine_last:
            figures["other_cores"] = round(
                max(0.0, (machine_last.busy - machine_first.busy) / seconds - sampled_cores), 3
            )
            figures["stolen_cores"] = round((machine_last.stolen - machine_first.stolen) / seconds, 3)
        return figures


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the third (state). The name before it may contain spaces."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def name(pid: int) -> str:
    """Return the kernel's name of a process; empty if it has ended or is not visible."""
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def _listening(port: int) -> set[str]:
    """Return the inodes of the sockets that listen on `port`: fields 2, 4 and 10 of /proc/net/tcp, see proc(5)."""
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
    except OSError:  # the process ended, or belongs to another user
        pass
    return found


def _cgroups() -> Iterator[Path]:
    """Return the folders of this process's cgroups (version 1 and 2) that may have a CPU quota, and their parents."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        top = _CGROUPS if not controllers else _CGROUPS / "cpu" if "cpu" in controllers.split(",") else None
        if top:
            inner = top / path.strip("/")
            # In a container, the path is often that of the host and does not exist. The container's own cgroup is at
            # the top.
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _quota(folder: Path) -> float | None:
    """Return the cores that the cgroup in `folder` may use; None without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
