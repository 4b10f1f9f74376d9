"""What a benchmark ran on: detected, never taken from what somebody says."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from inferctl import catalog
from inferctl.bench.load import procfs
from inferctl.bench.measure.nvml import NoNvmlError, Nvml

# Instructions that decide how fast a precision runs.
_TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_fp16",
    "amx_int8",
    "f16c",
)
_PACKAGES = ("torch", "transformers", "tokenizers", "bitsandbytes", "numpy", "locust", "gevent")
# Settings of the numeric libraries that change speeds; recorded when set.
_TELLING_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "ONEDNN_MAX_CPU_ISA",
)


@dataclass(frozen=True)
class Gpu:
    """A GPU or MIG slice as its driver names it.

    `hardware` is its key in the catalog, None when the catalog does not know it. `compute_capability` is written as in
    `8.6`, None when the driver does not report it.
    """

    name: str
    hardware: str | None
    memory_bytes: int
    driver: str
    compute_capability: str | None = None


@dataclass(frozen=True)
class Environment:
    """This machine. `hardware` is a catalog key: that of its first GPU, else `cpu`; None for a GPU the catalog does not know.

    `cores` are those that this process may use, `machine_cores` all there are.
    """

    hardware: str | None
    name: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    cores: int
    machine_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    kernel: str
    python: str
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    load_1m: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a receipt."""
        return asdict(self)


def detect() -> Environment:
    """Look at this machine."""
    info = _cpuinfo()
    model = info.get("model name") or platform.processor() or platform.machine()
    gpus = tuple(_gpus())
    flags = set(info.get("flags", "").split())
    return Environment(
        hardware=gpus[0].hardware if gpus else "cpu",
        name=gpus[0].name if gpus else model,
        cpu_model=model,
        cpu_flags=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        cores=procfs.cores(),
        machine_cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=_versions(),
        variables={name: value for name in _TELLING_VARIABLES if (value := os.environ.get(name))},
        load_1m=round(os.getloadavg()[0], 2),
    )


def _cpuinfo() -> dict[str, str]:
    """Fields of the first core in /proc/cpuinfo."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _gpus() -> Iterator[Gpu]:
    """Devices that NVML lists; none without nvidia-ml-py or without a driver."""
    try:
        gpus = Nvml()
    except NoNvmlError:
        return
    try:
        for one in gpus.devices():
            part = catalog.detect_gpu(one.name, one.memory_bytes)
            key = part.key if part else None
            yield Gpu(one.name, key, one.memory_bytes, one.driver, one.compute_capability)
    finally:
        gpus.close()
