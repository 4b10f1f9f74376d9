"""CPUs in place of a GPU: every line of the check runs, and nothing that it measures is a figure of a GPU."""

from __future__ import annotations

import itertools
import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

NAME = "stand-in for a GPU (CPU)"
UUID = "GPU-00000000-0000-0000-0000-000000000000"
_PROPERTIES = SimpleNamespace(name=NAME, total_memory=16 << 30, major=9, minor=0, uuid=UUID.removeprefix("GPU-"))


def _device(module: Any) -> None:
    """Let `detect` find one GPU, as far as CUDA_VISIBLE_DEVICES allows, and compute on the CPU."""
    import torch

    detect = module.detect

    def found(wanted: str) -> Any:
        if wanted == "cpu":
            return detect(wanted)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",") != [""]
        with ExitStack() as stack:
            replaced = {"is_available": visible, "device_count": int(visible), "get_device_properties": _PROPERTIES}
            for name, value in replaced.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
            device, info, traits = detect(wanted)
        return torch.device("cpu") if info.kind == "cuda" else device, info, traits

    module.detect = found


def _varlen(module: Any) -> None:
    """Compute variable-length attention one sequence at a time. Rows behind the last one get zeros."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def varlen_attn(
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Any:
        out = torch.zeros_like(query)
        before, after = (max_q if reach < 0 else reach for reach in window_size)
        with torch.profiler.record_function("stand_in::_flash_attention_forward"):
            ends = cu_seq_q.tolist()
            for first, end in itertools.pairwise(ends):
                q, k, v = (t[first:end].transpose(0, 1)[None] for t in (query, key, value))
                at = torch.arange(end - first)
                distance = at[:, None] - at
                mask = (distance <= before) & (-distance <= after)
                grouped = q.shape[1] != k.shape[1]
                result = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
                out[first:end] = result[0].transpose(0, 1)
        return out

    module.varlen_attn = varlen_attn


def _forward(module: Any) -> None:
    """Let a file hold memory: it has the most tokens of a batch. A token beyond the vocabulary breaks the context."""
    import torch

    launch = module.Forward.launch

    def limited(self: Any, prepared: Any) -> Any:
        held = Path(os.environ.get("GPU_CHECK_HELD", "/nonexistent"))
        if held.is_file() and prepared.tokens > int(held.read_text() or 0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        try:
            return launch(self, prepared)
        except IndexError as error:
            raise RuntimeError("CUDA error: device-side assert triggered") from error

    module.Forward.launch = limited


CHANGES = {
    "inferctl.serve.engines.device": _device,
    "torch.nn.attention.varlen": _varlen,
    "inferctl.serve.engines.forward": _forward,
}
