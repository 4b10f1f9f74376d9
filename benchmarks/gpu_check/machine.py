"""Step 1: the GPU, its driver, MIG, torch and cuDNN; the reason if torch cannot use the GPU."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

import card
import results
from results import STAND_IN, Step


def work(step: Step, settings: dict[str, Any]) -> None:
    import torch
    import transformers

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
        "docker": shutil.which("docker"),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    step.figure("software", f"torch {facts['torch']}, cuDNN {facts['cudnn']}, {facts['cores']} cores", **facts)
    step.part("driver", 0, _driver)
    step.part("GPU", 0, _gpu)


def _driver(step: Step) -> None:
    """Compare the driver of each GPU with what this torch needs."""
    import torch

    from inferctl.facts import catalog

    connection = card.nvml()
    if connection is None:
        if STAND_IN:
            step.skip("driver", "the stand-in has none")
        else:
            step.check("driver", False, "NVML lists no GPU: install nvidia-ml-py, and see whether `nvidia-smi` works")
        return
    floors = [stack.driver_floor for stack in catalog.stacks().values() if stack.cuda == torch.version.cuda]
    floor = next((floor for floor in floors if floor), 0)
    for gpu in connection.devices():
        step.check(
            f"driver of {gpu.name}",
            int(gpu.driver.partition(".")[0]) >= floor,
            f"{gpu.driver}; CUDA {torch.version.cuda} needs R{floor or '?'}",
            gpu=vars(gpu),
        )
        if gpu.sliced:
            step.figure("MIG", f"is on, slices: {', '.join(gpu.slices) or 'none'}")
    connection.close()


def _gpu(step: Step) -> None:
    """Let the engine's own code find the GPU, or say why there is none."""
    from inferctl.core.errors import InferctlError
    from inferctl.facts import precision
    from inferctl.serve.engines import device

    try:
        _, info, traits = device.detect("cuda")
    except InferctlError as error:
        step.check("GPU", False, f"{error.message}; {error.hint}")
        return
    told = f"{info.name}, compute capability {info.compute_capability}, {info.memory_bytes / 1e9:.0f} GB"
    step.check("GPU", True, told, device=vars(info))
    levels = {name: precision.support(name, traits).level for name in ("fp32", "fp16", "bf16", "int8")}
    step.figure("precisions", ", ".join(f"{name} {level}" for name, level in levels.items()), **levels)


if __name__ == "__main__":
    results.run(work)
