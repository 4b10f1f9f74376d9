"""Compares the memory that an engine on a CPU needs with the limit of its container: before the load, or at its end."""

from __future__ import annotations

from inferctl.core import cgroup
from inferctl.core.errors import NotReadyError
from inferctl.core.sizes import size
from inferctl.models.fit import BYTES_PER_PARAMETER
from inferctl.models.model import ModelFolder

# API process and engine in an image, with their libraries and the buffers of a small batch: 360 MB with 23 million
# parameters.
_WITHOUT_WEIGHTS = 360_000_000


def check(folder: ModelFolder, precision: str) -> None:
    """Raise `NotReadyError` if the weights do not fit into what the limit of memory leaves."""
    limit, used = cgroup.memory_limit(), cgroup.memory_in_use()
    weights = folder.parameters * BYTES_PER_PARAMETER[precision]
    if limit is not None and used + weights > limit:
        raise NotReadyError(
            f"memory is insufficient to load {folder.path}: the limit is {size(limit)}, of which {size(used)} are in "
            f"use, and the weights need {size(weights)} in {precision}",
            hint(folder, used + weights),
        )


def hint(folder: ModelFolder, needed: int = 0) -> str:
    """Return how much memory the server needs: from the size of the weights in the files, and more than the limit."""
    least = max(_WITHOUT_WEIGHTS + folder.weights_bytes, needed, (cgroup.memory_limit() or 0) * 5 // 4)
    return f"raise the memory limit to at least {size(least, 1)} (estimated: {size(folder.weights_bytes)} of weights)"
