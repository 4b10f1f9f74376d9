"""The CPU of this machine, found without torch, whose import takes seconds."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path

from inferctl.facts.precision import DeviceTraits
from inferctl.serve.engine_process.engine_protocol import DeviceInfo


def detect() -> tuple[DeviceInfo, DeviceTraits]:
    """Return the CPU, with the cores that this process can use, and its instructions."""
    name, flags = _name_and_flags()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceInfo("cpu", name, None, memory_bytes, usable_cores(), "cpu"), DeviceTraits("cpu", cpu_flags=flags)


def usable_cores() -> int:
    """Return how many cores this process can use: its affinity, limited by the CPU quota (cgroup v2) rounded up."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _name_and_flags() -> tuple[str, frozenset[str]]:
    file = Path("/proc/cpuinfo")
    found = dict(re.findall(r"^([\w ]+?)\s*:(.*)$", file.read_text() if file.exists() else "", re.MULTILINE))
    flags = found.get("flags") or found.get("Features", "")
    return found.get("model name", platform.machine()).strip(), frozenset(flags.split())
