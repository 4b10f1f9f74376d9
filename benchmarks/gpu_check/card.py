"""The GPU of this process: its memory, its speed, and a clock that waits for it. With the stand-in, the CPU's.

`python card.py BYTES` holds all memory of the GPU but so much until its stdin ends.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from results import STAND_IN


def clock() -> float:
    """Return seconds, after all work of the GPU. With the stand-in, CPU seconds: other load does not count in them."""
    if STAND_IN:
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate() -> float:
    """Return the FLOP/s of large matrix products in bf16 on this device."""
    import torch

    size, count = (512, 4) if STAND_IN else (8192, 20)
    a, b = (torch.randn(size, size, device="cpu" if STAND_IN else "cuda", dtype=torch.bfloat16) for _ in range(2))
    for runs in (3, count):  # the first ones warm up
        started = clock()
        for _ in range(runs):
            torch.matmul(a, b)
        seconds = clock() - started
    return float(2 * size**3 * count / seconds)


def memory() -> dict[str, int]:
    """Return the bytes in use: `host` of this process; on the GPU, `allocated` by tensors, `reserved` by torch for this
    and later batches, and `outside` of torch's allocator, as by contexts and the plans of libraries.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"host": pages * resource.getpagesize()}
    if not STAND_IN:
        import torch

        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        found |= {"allocated": torch.cuda.memory_allocated(), "reserved": reserved, "outside": total - free - reserved}
    return found


def nvml() -> Any | None:
    """Return a connection to NVML, or None without a driver or nvidia-ml-py."""
    from inferctl.bench.measure.nvml import Nvml, NvmlUnavailableError

    try:
        return Nvml()
    except NvmlUnavailableError:
        return None


def free() -> None:
    """Free what a model that is no longer used had on the GPU."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _hold(leave: int) -> None:
    import torch

    available = torch.cuda.mem_get_info()[0]
    held = torch.empty(max(0, available - leave), dtype=torch.uint8, device="cuda")
    sys.stdout.write(f"{held.numel()}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _hold(int(sys.argv[1]))
