"""The machine that a benchmark runs on, as detected. No value comes from the user."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from inferctl.bench.measure.nvml import Nvml, NvmlUnavailableError
from inferctl.core import cgroup
from inferctl.facts import catalog

# Instructions that determine the speed of a precision.
_CPU_FLAGS = (
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
# Settings of numeric libraries that change the speed; recorded if they are set.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "ONEDNN_MAX_CPU_ISA",
)


@dataclass(frozen=True)
class Gpu:
    """A GPU or MIG slice, with the name that its driver reports.

    `hardware` is its key in the catalog; None if the catalog does not have it. `compute_capability` has the form `8.6`;
    None if the driver does not report it.
    """

    name: str
    hardware: str | None
    memory_bytes: int
    driver: str
    compute_capability: str | None = None


@dataclass(frozen=True)
class Environment:
    """This machine.

    `hardware` is the catalog key of its first GPU, else `cpu`; None for a GPU that the catalog does not have. `cores`
    is the number of cores that this process may use, `machine_cores` the number of all cores.
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
        """Return the `environment` key of a receipt."""
        return asdict(self)


def detect() -> Environment:
    """Return the properties of this machine."""
    info = _cpuinfo()
    model = info.get("model name") or platform.processor() or platform.machine()
    gpus = tuple(_gpus())
    flags = set(info.get("flags", "").split())
    return Environment(
        hardware=gpus[0].hardware if gpus else "cpu",
        name=gpus[0].name if gpus else model,
        cpu_model=model,
        cpu_flags=tuple(flag for flag in _CPU_FLAGS if flag in flags),
        cores=cgroup.cores(),
        machine_cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=gpus,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=_versions(),
        variables={name: value for name in _VARIABLES if (value := os.environ.get(name))},
        load_1m=round(os.getloadavg()[0], 2),
    )


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first core in /proc/cpuinfo."""
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
    """Yield the devices that NVML lists; none without nvidia-ml-py or without a driver."""
    try:
        gpus = Nvml()
    except NvmlUnavailableError:
        return
    try:
        for device in gpus.devices():
            profile = catalog.detect_gpu(device.name, device.memory_bytes)
            key = profile.key if profile else None
            yield Gpu(device.name, key, device.memory_bytes, device.driver, device.compute_capability)
    finally:
        gpus.close()
