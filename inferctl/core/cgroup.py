"""The limits that the cgroups of this process set (versions 1 and 2): cores, memory, and processes killed for it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from inferctl.core.sizes import size

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class MemoryKills:
    """The processes of this cgroup that the kernel kills from now on because memory is insufficient."""

    def __init__(self) -> None:
        self._before = _killed()

    def text(self) -> str | None:
        """Return that a process was killed so, and the limit of memory; None if none was."""
        if _killed() <= self._before:
            return None
        limit = memory_limit()
        return "killed because memory was insufficient" + (f": the memory limit is {size(limit)}" if limit else "")


def cores() -> int:
    """Return the number of cores that this process may use: its affinity, limited by the CPU quotas."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), quota())))


def quota() -> float:
    """Return how many cores the smallest CPU quota (version 2) is worth; infinity without one."""
    quotas = [text.split() for text in _read("cpu", "cpu.max") if text[0].isdigit()]
    return min((int(quota) / int(period) for quota, period in quotas), default=math.inf)


def memory_limit() -> int | None:
    """Return the smallest limit of memory (bytes); None without one below the memory of the machine."""
    texts = _read("memory", "memory.max", "memory.limit_in_bytes")
    least = min((int(text) for text in texts if text.isdigit()), default=math.inf)
    return int(least) if least < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") else None


def memory_in_use() -> int:
    """Return the bytes of memory in use that the kernel cannot take back, as it can take back those of files."""
    found = (re.search(r"^(?:anon|total_rss) (\d+)$", text, re.M) for text in _read("memory", "memory.stat"))
    return next((int(each[1]) for each in found if each), 0)


def _killed() -> int:
    found = (
        re.search(r"^oom_kill (\d+)$", text, re.M) for text in _read("memory", "memory.events", "memory.oom_control")
    )
    return next((int(each[1]) for each in found if each), 0)


def _read(controller: str, *names: str) -> Iterator[str]:
    """Yield the content of these files in the cgroups of this process and their parents, from the innermost one."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = _CGROUPS / controllers
        if controllers and controller not in controllers.split(","):
            continue
        # In a container, the path is often that of the host and does not exist. The container's own cgroup is at the
        # top.
        inner = top / path.strip("/")
        for folder in (each for each in (inner, *inner.parents) if each.is_relative_to(top)):
            for name in names:
                try:
                    text = (folder / name).read_text()
                except OSError:
                    continue
                if text.strip():
                    yield text.strip()
