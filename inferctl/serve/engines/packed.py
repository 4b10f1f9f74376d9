"""Padding-free attention: all sequences of a batch end to end in one row, each attending to itself alone.

Registered with transformers under one name as attention and as mask function; the forward gets `layout` as a keyword argument and hands it
through to the attention of each layer. Whether an architecture honours all of this is not assumed: the start-up check compares with padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "inferctl_packed"


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row are. `runs`: (start, sequences, length) of neighbours of equal length, for one attention call each.

    `offsets` (int32, [sequences + 1], on the device) is set when the variable-length kernel runs instead.
    """

    runs: list[tuple[int, int, int]]
    longest: int
    offsets: torch.Tensor | None = None


def layout(lengths: list[int], device: torch.device, *, varlen: bool) -> Layout:
    """The layout of sequences that lie end to end in this order; equal lengths should be neighbours."""
    if varlen:
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return Layout([], max(lengths), offsets.to(device, non_blocking=True))
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        runs.append((start, count, length))
        start += count * length
    return Layout(runs, max(lengths))


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # transformers' signature; packed rows need none
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: [1, heads, tokens, size] -> [1, tokens, heads, size]. Raises `ValueError` without a layout."""
    if layout is None:
        raise ValueError("the architecture does not hand the packed layout to its attention")
    causal = bool(getattr(module, "is_causal", False))
    if layout.offsets is not None:
        return _varlen(query, key, value, layout.offsets, layout.longest, scaling, causal, sliding_window), None
    grouped = key.shape[1] != query.shape[1]
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for start, count, length in layout.runs:
        end = start + count * length
        q, k, v = (
            t[0, :, start:end].reshape(t.shape[1], count, length, -1).transpose(0, 1) for t in (query, key, value)
        )
        mask = _window(length, sliding_window, causal, query.device)
        done = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=grouped
        )
        out[0, start:end] = done.transpose(1, 2).flatten(0, 1)
    return out, None


def _window(length: int, sliding_window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Which positions see which (bool, [length, length]); None when the window does not matter at this length."""
    if sliding_window is None or length <= sliding_window:
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance < sliding_window) & ((distance >= 0) if causal else (distance > -sliding_window))


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
) -> torch.Tensor:
    """Flash attention over the whole row at once (CUDA, compute capability 8.0 or newer, fp16 or bf16)."""
    from torch.nn.attention.varlen import varlen_attn

    reach = sliding_window - 1 if sliding_window is not None else -1
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    out: Any = varlen_attn(
        q,
        k,
        v,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    joined: torch.Tensor = out[None]
    return joined
