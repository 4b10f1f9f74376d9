"""Every call to NVIDIA's management library, and nothing else: what it offers becomes plain samples, what it does not becomes None."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
_NO_INSTANCE = 0xFFFFFFFF


@dataclass(frozen=True)
class Process:
    """A process that computes on a GPU. `instance` is the GPU instance (MIG) that it is in, None on a GPU that is whole."""

    pid: int
    instance: int | None = None


@dataclass(frozen=True)
class GpuSample:
    """One look at one GPU, at `at_ns` on CLOCK_MONOTONIC. None: this part or driver does not tell.

    `throttle` is NVML's bit mask of what holds the clocks down; `energy_j` is counted since the driver was loaded.
    """

    at_ns: int
    utilisation_percent: float | None
    memory_bytes: int | None
    power_w: float | None
    energy_j: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None
    throttle: int | None
    processes: tuple[Process, ...] | None


@dataclass(frozen=True)
class Described:
    """What does not change of a GPU while a bench runs. `sliced`: it is in MIG mode; `slices` are then the UUIDs of its MIG devices.

    `default_power_limit_w` is what the part comes with, `power_limit_w` what is enforced now. `compute_capability` is
    written as in `8.6`, None when the driver does not report it.
    """

    index: int
    name: str
    memory_bytes: int
    driver: str
    power_limit_w: float | None
    default_power_limit_w: float | None
    sliced: bool
    slices: tuple[str, ...]
    compute_capability: str | None = None


class NoNvmlError(Exception):
    """There is no NVML to ask; the text says why, for people."""


class Nvml:
    """NVML, opened until `close`. Raises `NoNvmlError` without nvidia-ml-py or without a driver."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise NoNvmlError("nvidia-ml-py is not installed (pip install 'inferctl[gpu]')") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NoNvmlError(f"no NVIDIA driver answers ({error})") from None
        try:
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            self.close()
            raise NoNvmlError(f"the GPUs cannot be listed ({error})") from None

    def close(self) -> None:
        """Let go of the driver."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def devices(self) -> list[Described]:
        """Every GPU, in NVML's order."""
        return [self._describe(index, handle) for index, handle in enumerate(self._handles)]

    def sample(self, index: int, at_ns: int) -> GpuSample:
        """Look at one GPU now."""
        nvml, handle = self._nvml, self._handles[index]
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        energy = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        utilisation = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        processes = self._ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        return GpuSample(
            at_ns,
            utilisation_percent=None if utilisation is None else float(utilisation.gpu),
            memory_bytes=None if memory is None else int(memory.used),
            power_w=None if power is None else power / 1e3,
            energy_j=None if energy is None else energy / 1e3,
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            throttle=self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
            processes=None if processes is None else tuple(Process(int(one.pid), _instance(one)) for one in processes),
        )

    def _describe(self, index: int, handle: Any) -> Described:
        nvml = self._nvml
        mode = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        default = self._ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        capability = self._ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        sliced = bool(mode and mode[0])
        return Described(
            index,
            name=str(self._ask(nvml.nvmlDeviceGetName, handle)),
            memory_bytes=int(memory.total) if memory else 0,
            driver=str(self._ask(nvml.nvmlSystemGetDriverVersion)),
            power_limit_w=None if limit is None else limit / 1e3,
            default_power_limit_w=None if default is None else default / 1e3,
            sliced=sliced,
            slices=tuple(self._slices(handle)) if sliced else (),
            compute_capability="{}.{}".format(*capability) if capability else None,
        )

    def _slices(self, handle: Any) -> list[str]:
        nvml = self._nvml
        found = (
            self._ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
            for place in range(self._ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
        )
        return [str(self._ask(nvml.nvmlDeviceGetUUID, one)) for one in found if one is not None]

    def _ask(self, call: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return call(*arguments)
        except self._nvml.NVMLError:  # not supported by this part, or not permitted
            return None


def _instance(process: Any) -> int | None:
    said = getattr(process, "gpuInstanceId", None)
    return None if said in (None, _NO_INSTANCE) else int(said)
