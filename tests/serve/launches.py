"""Counts launches, syncs and bytes between host and device of a batch, without a GPU.

The device is a stand-in: torch's device `meta`, which has the shapes of tensors and no numbers. The code of GPUs runs
with it, in bf16, and each operation that is a kernel of CUDA counts as one launch: attention of any length is one (its
own kernel), a matrix product is one, a view is none. A copy between the devices counts too. A sync is where the host
waits for the device. What depends on numbers is assumed: conditions are false.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Compositions that CUDA computes with one kernel; others are traced inside.
WHOLE = ("linear", "layer_norm", "rms_norm", "matmul", "addmm")
# They allocate or describe memory.
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view")
COMPOSITE = "CompositeImplicitAutograd"


class Trace(TorchDispatchMode):
    """Counts what a GPU would do. `launches`: by operation. `syncs`, and `to_host` and `to_device` in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs = self.to_host = self.to_device = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and compute what it returns."""
        kwargs, name = dict(kwargs or {}), op.name().partition("::")[2].partition(".")[0]
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        # With weights of another format, torch composes this one.
        whole = name in WHOLE and (name != "rms_norm" or len({tensor.dtype for tensor in tensors}) == 1)
        if not whole and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), COMPOSITE):
            with self:
                return op._op_dk(getattr(torch._C.DispatchKey, COMPOSITE), *args, **kwargs)
        devices = [tensor.device.type for tensor in tensors]
        if name == "_local_scalar_dense" and devices == ["meta"]:
            self.syncs, self.to_host = self.syncs + 1, self.to_host + tensors[0].element_size()
            return False if tensors[0].dtype == torch.bool else 0
        if name == "_to_copy" and devices == ["meta"] and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self._copy_to_host(tensors[0], waits=not kwargs.get("non_blocking"))
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name == "copy_" and devices == ["cpu", "meta"]:
            self._copy_to_host(tensors[1], waits=not (args[2] if len(args) > 2 else kwargs.get("non_blocking")))
            return args[0].zero_()  # else the memory has any numbers, and a head may launch again
        kwargs.pop("pin_memory", None)
        out = op(*args, **kwargs)
        found = [each for each in (out if isinstance(out, list | tuple) else [out]) if isinstance(each, torch.Tensor)]
        if any(each.device.type == "meta" for each in found):
            self.to_device += sum(tensor.nbytes for tensor in tensors if name == "_to_copy" and devices == ["cpu"])
            if not op.is_view and name not in NO_KERNEL:
                self.launches[name] += 1
        return out

    def _copy_to_host(self, tensor: torch.Tensor, *, waits: bool) -> None:
        self.launches["copy to the host"] += 1
        self.syncs, self.to_host = self.syncs + waits, self.to_host + tensor.nbytes

    def event(self) -> SimpleNamespace:
        """Return a stand-in for an event of CUDA. A wait for it is a sync."""
        return SimpleNamespace(record=lambda *_: None, synchronize=lambda: setattr(self, "syncs", self.syncs + 1))


def load(folder: Path, task: Any = "embed") -> Any:
    """Return the forward pass of a model as a GPU with variable-length attention computes it."""
    from inferctl.reading import task_config
    from inferctl.serve.engine_process.engine_protocol import PrecisionInfo
    from inferctl.serve.engines.forward import Forward

    precision = PrecisionInfo("bf16", "bf16", "native", "stand-in")
    config = task_config.read(task, folder, 512)
    forward = Forward(folder, config, torch.device("meta"), torch.bfloat16, precision, 16384, varlen=True)
    forward.pack()
    return forward


def trace(forward: Any, texts: int, tokens: int) -> Trace:
    """Return what a batch of texts of so many tokens does."""
    from inferctl.serve.engines.forward import Sequences

    random = np.random.default_rng(0)
    sequences = Sequences([random.integers(5, 900, tokens).astype(np.int32) for _ in range(texts)])
    found = Trace()
    with (
        mock.patch.object(torch.cuda, "Event", found.event),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: None),
        torch.inference_mode(),
        found,
    ):
        forward(sequences)
    return found
