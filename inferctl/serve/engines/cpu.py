"""The CPU of this machine, found without torch, whose import takes seconds."""

from __future__ import annotations

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from inferctl.core import cgroup
from inferctl.facts.precision import DeviceTraits
from inferctl.serve.engine_process.engine_protocol import DeviceInfo

# Larger batches only add latency: above about 1,000 tokens per core the throughput is constant, and it falls when the
# caches overflow.
BATCH_TOKENS_PER_CORE = 1024


def detect() -> tuple[DeviceInfo, DeviceTraits]:
    """Return the CPU, with the cores that this process can use, and its instructions."""
    name, flags = _name_and_flags()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceInfo("cpu", name, None, memory_bytes, cgroup.cores(), "cpu"), DeviceTraits("cpu", cpu_flags=flags)


def use_idle_time() -> None:
    """Let the calling thread run only while its core has nothing else to do."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def idle_batches(cores: int) -> int:
    """Return how many batches can run in the idle time of the cores: one on each, or none.

    None with a CPU quota below the number of cores: idle time would use it up.
    """
    if cgroup.quota() < len(os.sched_getaffinity(0)):
        return 0
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(use_idle_time).result()
    except (OSError, AttributeError):  # gVisor, macOS
        return 0
    return cores


def _name_and_flags() -> tuple[str, frozenset[str]]:
    file = Path("/proc/cpuinfo")
    found = dict(re.findall(r"^([\w ]+?)\s*:(.*)$", file.read_text() if file.exists() else "", re.MULTILINE))
    flags = found.get("flags") or found.get("Features", "")
    return found.get("model name", platform.machine()).strip(), frozenset(flags.split())
