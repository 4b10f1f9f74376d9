"""Selects the device and the number format of this process."""

from __future__ import annotations

import re

import torch

from inferctl.core.errors import NotReadyError, UsageError, shown
from inferctl.facts import catalog, precision
from inferctl.serve.engine_process import failures
from inferctl.serve.engine_process.engine_protocol import DeviceInfo, PrecisionInfo
from inferctl.serve.engines import cpu, int8

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def detect(wanted: str) -> tuple[torch.device, DeviceInfo, precision.DeviceTraits]:
    """Return the device to use. `wanted` is auto, cpu, cuda or cuda:N.

    Raises `UsageError` for another name, `NotReadyError` if the GPU is not found.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted, re.ASCII):
        raise UsageError(f"unknown device {shown(wanted)}", "`--device` accepts auto, cpu, cuda or cuda:N")
    if wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise NotReadyError(
                f"no usable CUDA GPU found: {_why_no_gpu()}",
                "check that `nvidia-smi` works where the server runs, or use `--device cpu`",
            )
        index, count = int(wanted.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= count:
            names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise NotReadyError(
                f"GPU {wanted} not found", f"this process can use {names}; `CUDA_VISIBLE_DEVICES` can hide GPUs from it"
            )
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        part = catalog.detect_gpu(properties.name, properties.total_memory)
        info = DeviceInfo(
            "cuda",
            properties.name,
            f"{capability[0]}.{capability[1]}",
            properties.total_memory,
            hardware=part.key if part else None,
            count=1 if ":" in wanted else count,
        )
        return device, info, precision.DeviceTraits("cuda", compute_capability=capability)
    return torch.device("cpu"), *cpu.detect()


def equal(a: DeviceInfo, b: DeviceInfo) -> bool:
    """Return whether two devices compute the same vectors, also if they are two GPUs of one machine."""
    return (a.kind, a.name, a.compute_capability) == (b.kind, b.name, b.compute_capability)


def avoid_cudnn() -> None:
    """Let no attention of this process run on cuDNN, which torch prefers on compute capability 9.0 and 10.0.

    cuDNN builds a plan for each number of sequences, longest sequence and number of tokens, which takes tens of
    milliseconds, and torch never frees it. Nearly every batch of a server has a new combination.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def unused_gpu(wanted: str) -> str | None:
    """Return a warning if `auto` selected the CPU although torch is built for GPUs, else None."""
    if wanted != "auto" or torch.version.cuda is None or torch.cuda.is_available():
        return None
    return (
        f"no usable GPU, so the CPU is used (torch is built for CUDA {torch.version.cuda}): {_why_no_gpu()}. "
        "If this is intended, use `--device cpu`"
    )


def _why_no_gpu() -> str:
    """Return the reason why `torch.cuda.is_available()` is false."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001  # any error is the reason
        return failures.summary(error).rstrip(".")
    return "torch cannot use CUDA"


def choose(wanted: str, traits: precision.DeviceTraits) -> tuple[PrecisionInfo, torch.dtype]:
    """Return the precision to use and the number format of its activations.

    Raises `NotReadyError` if the device does not support the precision.
    """
    effective = precision.best_precision(traits) if wanted == "auto" else wanted
    support = precision.support(effective, traits)
    if support.level == "unsupported":
        raise NotReadyError(
            f"{effective} is not supported on this device: {support.reason}",
            "use `--precision auto` for the best supported precision",
        )
    reason = f"selected by auto: {support.reason}" if wanted == "auto" else support.reason
    tf32 = (traits.compute_capability or (0, 0)) >= (8, 0) and bool(torch.backends.cuda.matmul.allow_tf32)
    if effective == "int8":
        # On CUDA LLM.int8 uses fp16 between its products.
        dtype = torch.float16 if traits.kind == "cuda" else _DTYPES[precision.best_precision(traits)]
        if traits.kind == "cpu":
            reason += f"; 8-bit weights and activations, {str(dtype).removeprefix('torch.')} between the products"
        return PrecisionInfo(wanted, effective, support.level, reason, int8.METHOD[traits.kind], tf32), dtype
    if effective == "fp32" and tf32:
        reason += "; matrix products in TF32 (10 bits of mantissa), which the environment or torch's settings enable"
    return PrecisionInfo(wanted, effective, support.level, reason, tf32=tf32), _DTYPES[effective]
