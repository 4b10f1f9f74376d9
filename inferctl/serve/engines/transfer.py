"""What crosses between the host and the device: the inputs of a batch in one copy, and its results in another one.

For a GPU both are in pinned memory, so that neither copy makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def on_host(device: torch.device) -> bool:
    """Return whether the device computes in the memory of the host, and at once."""
    return device.type == "cpu"


def pinned(size: int) -> torch.Tensor:
    """Return bytes in pinned memory. torch keeps it for the next batch when the copies from and to it are done."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class Staged:
    """Integers on the host that go to the device together."""

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], device: torch.device) -> None:
        self._device, self._shapes = device, {name: values.shape for name, values in arrays.items()}
        self._host = torch.from_numpy(np.concatenate([each.reshape(-1) for each in arrays.values()], dtype=np.int64))
        if not on_host(device):
            self._host = pinned(self._host.nbytes).view(torch.int64).copy_(self._host)

    def on_device(self) -> dict[str, torch.Tensor]:
        """Return the arrays by name."""
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = torch.split_with_sizes(self._host.to(self._device, non_blocking=True), sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


class HostCopy:
    """Tensors of the device, of numbers with four bytes, on their way to the host together."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self._host: torch.Tensor | None = None
        if tensors and not on_host(tensors[0].device):
            joined = torch.cat([tensor.contiguous().view(-1).view(torch.int32) for tensor in tensors])
            self._host = pinned(joined.nbytes).view(torch.int32).copy_(joined, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(joined.device))

    def wait(self) -> list[npt.NDArray[Any]]:
        """Wait until the device has computed the tensors, and return them."""
        if self._host is None:
            return [tensor.numpy() for tensor in self._tensors]
        self._copied.synchronize()
        parts = torch.split_with_sizes(self._host, [tensor.numel() for tensor in self._tensors])
        return [
            part.view(tensor.dtype).view(tensor.shape).numpy()
            for part, tensor in zip(parts, self._tensors, strict=True)
        ]
