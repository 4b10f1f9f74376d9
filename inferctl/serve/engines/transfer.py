"""What crosses between the host and the device: the inputs of a batch in one copy, and its results in another one.

For a GPU both are in pinned memory, so that neither copy makes the host wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16  # bytes; kernels load as many at a time


def on_host(device: torch.device) -> bool:
    """Return whether the device computes in the memory of the host, and at once."""
    return device.type == "cpu"


class Staged:
    """Arrays on the host that go to the device together."""

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], device: torch.device) -> None:
        self._device, self._arrays = device, arrays
        self._starts: dict[str, int] = {}
        if not on_host(device):
            size = 0
            for name, values in arrays.items():
                self._starts[name], size = size, size + -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._buffer = pinned(size)
            for name, values in arrays.items():
                part = self._buffer[self._starts[name] :][: values.nbytes].numpy()
                part[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def on_device(self) -> dict[str, torch.Tensor]:
        """Return the arrays by name."""
        if not self._starts:
            return {name: torch.from_numpy(values) for name, values in self._arrays.items()}
        buffer, found = self._buffer.to(self._device, non_blocking=True), {}
        for name, values in self._arrays.items():
            part = buffer[self._starts[name] :][: values.nbytes]
            found[name] = part.view(torch.from_numpy(values[:0]).dtype).view(values.shape)
        return found


def pinned(size: int) -> torch.Tensor:
    """Return bytes in pinned memory. torch keeps it for the next batch when the copies from and to it are done."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class HostCopy:
    """Tensors of the device on their way to the host together."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._host: torch.Tensor | None = None
        if tensors and not on_host(tensors[0].device):
            joined = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
            self._host = pinned(len(joined))
            self._host.copy_(joined, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(joined.device))

    def wait(self) -> list[npt.NDArray[Any]]:
        """Wait until the device has computed the tensors, and return them."""
        if self._host is None:
            return [tensor.numpy() for tensor in self._tensors]
        self._copied.synchronize()
        found, start = [], 0
        for tensor in self._tensors:
            part = self._host[start : start + tensor.nbytes]
            found.append(part.view(tensor.dtype).view(tensor.shape).numpy())
            start += tensor.nbytes
        return found
