"""CPU time and memory of processes, and which of them listens on a port."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass

import psutil

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
_SAMPLE_S = 0.5


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
    return [root, *(process.pid for process in _descendants(root))]


def _descendants(root: int) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(root).children(recursive=True)
    return found


def listener(port: int) -> int | None:
    """Return the process that listens on TCP `port` of this machine, or None.

    If a parent and its children share the socket, this is the parent. None means that no process listens, that it
    belongs to another user, or that it forwards connections to a server elsewhere.
    """
    holders = {process.pid: process for process in psutil.process_iter() if _listens(process, port)}
    with contextlib.suppress(psutil.Error):
        parents = [process for process in holders.values() if process.ppid() not in holders]
        if len(parents) == 1 and not parents[0].name().startswith(_FORWARDERS):
            return int(parents[0].pid)
    return None


def _listens(process: psutil.Process, port: int) -> bool:
    with contextlib.suppress(psutil.Error, OSError):  # it ended, or belongs to another user
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in process.net_connections("tcp")
        )
    return False


def usage(root: int) -> ProcessUsage:
    """Return what `root` and its descendants use; zero if they have ended."""
    seconds, memory = 0.0, 0
    with contextlib.suppress(psutil.Error):
        for process in (psutil.Process(root), *_descendants(root)):
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                # Of children that have ended, too.
                seconds += used.user + used.system + used.children_user + used.children_system
                memory += process.memory_info().rss
    return ProcessUsage(seconds, memory)


def machine() -> MachineCpu:
    """Return the CPU time of the whole machine."""
    times = psutil.cpu_times()
    return MachineCpu(times.user + times.nice + times.system + times.irq + times.softirq, times.steal)


class Sampler:
    """Sample the CPU seconds and the memory of process trees from a thread."""

    def __init__(self, roots: dict[str, int]) -> None:
        self._roots = roots
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.samples: list[tuple[int, dict[str, ProcessUsage], MachineCpu]] = []

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
            if self._stop.wait(_SAMPLE_S):
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
        others = (machine_last.busy - machine_first.busy) / seconds - sampled_cores
        figures["other_cores"] = round(max(0.0, others), 3)
        figures["stolen_cores"] = round((machine_last.stolen - machine_first.stolen) / seconds, 3)
        return figures


def name(pid: int) -> str:
    """Return the name of a process; empty if it has ended or is not visible."""
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).name())
    return ""
