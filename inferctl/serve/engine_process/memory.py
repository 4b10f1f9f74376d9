"""Compares the memory that engines need with that of the device or the container: before a load, or at its end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from inferctl.config.spec import Spec
from inferctl.core import cgroup
from inferctl.core.errors import NotReadyError
from inferctl.core.sizes import size
from inferctl.facts import catalog
from inferctl.facts.precision import best_precision
from inferctl.models import fit
from inferctl.models.fit import BYTES_PER_PARAMETER
from inferctl.models.model import ModelFolder
from inferctl.models.size import size_of
from inferctl.serve.engines import cpu

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


def check_all(models: Sequence[tuple[Spec, ModelFolder]], device: str) -> None:
    """Raise `NotReadyError` if several models do not fit into the memory of the device, before any of them is loaded.

    The memory of GPUs is what `nvidia-smi` says; without it, nothing is checked.
    """
    info, traits = cpu.detect()
    cuda, limit = device != "cpu" and Path("/dev/nvidiactl").exists(), cgroup.memory_limit()
    available: int | None = limit - cgroup.memory_in_use() if limit else info.memory_bytes
    precision, most_tokens = best_precision(traits), cpu.BATCH_TOKENS_PER_CORE * (info.threads or 1)
    if cuda:
        available, precision, most_tokens = _free_on_gpus(), "bf16", 1 << 20
    needs = {}
    for spec, folder in models:
        chosen = precision if spec.serve.precision == "auto" else spec.serve.precision
        if isinstance(found := size_of(folder), fit.ModelSize):
            tokens = min(spec.serve.max_batch_tokens, most_tokens)
            needs[spec.name] = fit.memory(found, chosen, tokens, catalog.hardware("cpu"))
    finding = fit.memory_of_all(needs, available, "gpu" if cuda else "cpu", cuda=cuda)
    if finding.level == "error":
        raise NotReadyError(f"memory is insufficient: {finding.what}: {finding.why}", finding.hint)


def _free_on_gpus() -> int | None:
    """Return the least free memory of a GPU that this process may use; None if it is not known."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return min(int(line) for line in done.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def hint(folder: ModelFolder, needed: int = 0) -> str:
    """Return how much memory the server needs: from the size of the weights in the files, and more than the limit."""
    least = max(_WITHOUT_WEIGHTS + folder.weights_bytes, needed, (cgroup.memory_limit() or 0) * 5 // 4)
    return f"raise the memory limit to at least {size(least, 1)} (estimated: {size(folder.weights_bytes)} of weights)"
