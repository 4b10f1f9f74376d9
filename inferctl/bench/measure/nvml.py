"""All calls to NVML, NVIDIA's management library. A value that it does not report is None."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from inferctl.core.errors import install_hint

T = TypeVar("T")
_NO_INSTANCE = 0xFFFFFFFF


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU. `instance` is its GPU instance (MIG); None if the GPU is not in MIG mode."""

    pid: int
    instance: int | None = None


@dataclass(frozen=True)
class GpuSample:
    """The state of one GPU at `at_ns` on CLOCK_MONOTONIC. None: the GPU or its driver does not report the value.

    `throttle` is NVML's bit mask of the causes that reduce the clocks. `energy_j` counts from the load of the driver.
    """

    at_ns: int
    utilisation_percent: float | None
    memory_bytes: int | None
    power_w: float | None
    energy_j: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None
    throttle: int | None
    processes: tuple[GpuProcess, ...] | None


@dataclass(frozen=True)
class GpuDevice:
    """The properties of a GPU that do not change during a benchmark.

    `sliced`: the GPU is in MIG mode, and `slices` has the UUIDs of its MIG devices. `default_power_limit_w` is the
    vendor's limit, `power_limit_w` the one in force. `compute_capability` has the form `8.6`; None if the driver does
    not report it.
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


class NvmlUnavailableError(Exception):
    """NVML is not available. The message has the reason."""


class Nvml:
    """A connection to NVML until `close`. Raises `NvmlUnavailableError` without nvidia-ml-py or without a driver."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise NvmlUnavailableError(f"nvidia-ml-py is not installed ({install_hint('gpu')})") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailableError(f"no NVIDIA driver responds ({error})") from None
        try:
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            self.close()
            raise NvmlUnavailableError(f"NVML cannot list the GPUs ({error})") from None

    def close(self) -> None:
        """Disconnect from the driver."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def devices(self) -> list[GpuDevice]:
        """Return all GPUs, in NVML's order."""
        return [self._describe(index, handle) for index, handle in enumerate(self._handles)]

    def sample(self, index: int, at_ns: int) -> GpuSample:
        """Return the state of one GPU now."""
        nvml, handle = self._nvml, self._handles[index]
        power = self._query(nvml.nvmlDeviceGetPowerUsage, handle)
        energy = self._query(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        utilization = self._query(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._query(nvml.nvmlDeviceGetMemoryInfo, handle)
        processes = self._query(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        return GpuSample(
            at_ns,
            utilisation_percent=None if utilization is None else float(utilization.gpu),
            memory_bytes=None if memory is None else int(memory.used),
            power_w=None if power is None else power / 1e3,
            energy_j=None if energy is None else energy / 1e3,
            sm_clock_mhz=self._query(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            temperature_c=self._query(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            throttle=self._query(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
            processes=None
            if processes is None
            else tuple(GpuProcess(int(process.pid), _instance(process)) for process in processes),
        )

    def _describe(self, index: int, handle: Any) -> GpuDevice:
        nvml = self._nvml
        mode = self._query(nvml.nvmlDeviceGetMigMode, handle)
        limit = self._query(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        default = self._query(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
        memory = self._query(nvml.nvmlDeviceGetMemoryInfo, handle)
        capability = self._query(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        sliced = bool(mode and mode[0])
        return GpuDevice(
            index,
            name=str(self._query(nvml.nvmlDeviceGetName, handle)),
            memory_bytes=int(memory.total) if memory else 0,
            driver=str(self._query(nvml.nvmlSystemGetDriverVersion)),
            power_limit_w=None if limit is None else limit / 1e3,
            default_power_limit_w=None if default is None else default / 1e3,
            sliced=sliced,
            slices=tuple(self._slices(handle)) if sliced else (),
            compute_capability="{}.{}".format(*capability) if capability else None,
        )

    def _slices(self, handle: Any) -> list[str]:
        nvml = self._nvml
        handles = (
            self._query(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
            for place in range(self._query(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
        )
        return [str(self._query(nvml.nvmlDeviceGetUUID, mig)) for mig in handles if mig is not None]

    def _query(self, call: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return call(*arguments)
        except self._nvml.NVMLError:  # not supported by this GPU, or not permitted
            return None


def _instance(process: Any) -> int | None:
    instance = getattr(process, "gpuInstanceId", None)
    return None if instance in (None, _NO_INSTANCE) else int(instance)
