"""Padding-free attention: all sequences of a batch are concatenated in one row, and each attends only to itself.

transformers knows it under one name as attention and as mask function. The forward gets `layout` as a keyword argument
and passes it to the attention of each layer. Not every architecture supports this, so the start-up check compares the
result with padding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "inferctl_packed"
# On a CPU only attention is padded, to multiples of this: torch's softmax is three times slower on lengths that are not
# multiples of a vector register, and fewer lengths need fewer calls.
_BUCKET_STEP = 16
# Buckets keep the scores of all their sequences in memory. The fused kernel does not, and is better above this length.
_MAX_BUCKET_LENGTH = 512


@dataclass(frozen=True)
class Buckets:
    """Sequences padded to a few lengths, only for attention.

    `spread[i]`: the packed row of padded row i. `collect[i]`: the padded row of packed row i. `groups`: (first padded
    row, sequences, padded length, mask). The mask ([sequences, 1, 1, length], 0 or minus infinity) is None without
    padding.
    """

    spread: torch.Tensor
    collect: torch.Tensor
    groups: list[tuple[int, int, int, torch.Tensor | None]]


@dataclass(frozen=True)
class Layout:
    """The positions of the sequences in a packed row.

    `runs`: (start, sequences, length) of adjacent sequences of equal length, which share one call of attention.
    `offsets` (int32, [sequences + 1], on the device): set if the variable-length kernel is used. `buckets`: set if
    padded attention is faster.
    """

    runs: list[tuple[int, int, int]]
    longest: int
    offsets: torch.Tensor | None = None
    buckets: Buckets | None = None


def buckets(lengths: list[int], dtype: torch.dtype, padding_rows: int) -> Buckets:
    """Return the buckets of sequences concatenated in this order. Equal lengths should be adjacent.

    `padding_rows` rows follow the sequences.
    """
    actual = np.array(lengths)
    padded = -(-actual // _BUCKET_STEP) * _BUCKET_STEP
    starts, firsts = np.cumsum(actual) - actual, np.cumsum(padded) - padded
    within = np.arange(padded.sum()) - np.repeat(firsts, padded)
    # Padding reads the first token of its sequence. The mask hides it.
    spread = np.repeat(starts, padded) + np.where(within < np.repeat(actual, padded), within, 0)
    collect = np.zeros(actual.sum() + padding_rows, dtype=np.int64)  # the values of padding rows are not used
    collect[: actual.sum()] = np.arange(actual.sum()) + np.repeat(firsts - starts, actual)
    groups, index = [], 0
    for length, group in groupby(padded.tolist()):
        for count in _powers_of_two(sum(1 for _ in group)):
            group_lengths = torch.from_numpy(actual[index : index + count])
            hidden = torch.arange(length) >= group_lengths[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
            groups.append((int(firsts[index]), count, length, mask if bool(hidden.any()) else None))
            index += count
    return Buckets(torch.from_numpy(spread), torch.from_numpy(collect), groups)


def _powers_of_two(count: int) -> list[int]:
    """Return `count` as a sum of falling powers of two. Few shapes limit oneDNN's code: see `onednn.padded_rows`."""
    return [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]


def layout(
    lengths: list[int],
    device: torch.device,
    *,
    varlen: bool,
    bucketed: torch.dtype | None = None,
    padding_rows: int = 0,
) -> Layout:
    """Return the layout of sequences concatenated in this order. Equal lengths should be adjacent.

    `varlen` selects the variable-length kernel, `bucketed` buckets in this format. `padding_rows` rows follow the
    sequences.
    """
    if varlen:
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return Layout([], max(lengths), offsets.to(device, non_blocking=True))
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        runs.append((start, count, length))
        start += count * length
    short = bucketed is not None and max(lengths) <= _MAX_BUCKET_LENGTH
    padded = buckets(lengths, bucketed, padding_rows) if short and bucketed else None
    return Layout(runs, max(lengths), buckets=padded)


def register() -> None:
    """Register `attn_implementation=NAME` with transformers."""
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
    attention_mask: torch.Tensor | None,  # in the signature of transformers; packed rows need no mask
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention, with the signature of transformers: [1, heads, tokens, size] -> [1, tokens, heads, size].

    Raises `ValueError` without a layout.
    """
    if layout is None:
        raise ValueError("the architecture does not pass the packed layout to its attention")
    causal = bool(getattr(module, "is_causal", False))
    if layout.offsets is not None:
        return _varlen(query, key, value, layout.offsets, layout.longest, scaling, causal, sliding_window), None
    grouped = key.shape[1] != query.shape[1]
    if layout.buckets is not None and not (grouped or causal or sliding_window):
        return _bucketed(query, key, value, layout.buckets, scaling), None
    out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for start, count, length in layout.runs:
        end = start + count * length
        q, k, v = (
            t[0, :, start:end].reshape(t.shape[1], count, length, -1).transpose(0, 1) for t in (query, key, value)
        )
        mask = _window(length, sliding_window, causal, query.device)
        result = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scaling, enable_gqa=grouped
        )
        out[0, start:end] = result.transpose(1, 2).flatten(0, 1)
    return out, None


def _bucketed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padded: Buckets, scaling: float | None
) -> torch.Tensor:
    """Return the attention, computed as two products and a softmax per bucket.

    On CPUs this is faster than the fused kernel for the usual lengths of encoders.
    """
    heads, size = query.shape[1], query.shape[3]
    scale = size**-0.5 if scaling is None else scaling
    q, k, v = (t[0].transpose(0, 1).flatten(1).index_select(0, padded.spread) for t in (query, key, value))
    out = torch.empty_like(q)
    for first, count, length, mask in padded.groups:
        rows = slice(first, first + count * length)
        a, b, c = (t[rows].view(count, length, heads, size).transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(a * scale, b.transpose(2, 3))
        if mask is not None:
            scores += mask
        result = torch.matmul(scores.softmax(dim=-1), c)
        out[rows].view(count, length, heads, size).copy_(result.transpose(1, 2))
    return out.index_select(0, padded.collect).view(1, -1, heads, size)


def _window(length: int, sliding_window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Return which positions attend to which (bool, [length, length]); None if all sequences fit into the window."""
    if sliding_window is None or length <= sliding_window:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance < sliding_window) & ((distance >= 0) if causal else (distance > -sliding_window))


class UnsupportedError(ValueError):
    """The variable-length kernel of this torch cannot compute the model's attention."""


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
    """Return flash attention over the whole row (CUDA, compute capability 8.0 or newer, fp16 or bf16)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    options = _varlen_options(varlen_attn, q.shape[2], scaling, causal, sliding_window)
    if (shared := q.shape[1] // k.shape[1]) > 1:
        if "enable_gqa" in _parameters(varlen_attn):
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    out: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
    joined: torch.Tensor = out[None]
    return joined


def _varlen_options(
    varlen_attn: Callable[..., Any], size: int, scaling: float | None, causal: bool, sliding_window: int | None
) -> dict[str, Any]:
    """Return the keyword arguments of `varlen_attn` for this attention. `size`: elements of one head.

    torch 2.10 accepts only `is_causal`; 2.11 replaced it with `scale` and `window_size`. Raises `UnsupportedError`.
    """
    accepted = _parameters(varlen_attn)
    options: dict[str, Any] = {}
    if "scale" in accepted:
        options["scale"] = scaling
    elif scaling is not None and not math.isclose(scaling, size**-0.5):
        raise UnsupportedError(
            f"varlen_attn of torch {torch.__version__} has no `scale` argument; the model uses {scaling:g}"
        )
    if "window_size" in accepted:
        reach = sliding_window - 1 if sliding_window is not None else -1
        options["window_size"] = (reach, 0 if causal else reach)
    elif sliding_window is not None:
        # Also if this batch is shorter than the window. Otherwise the start-up check would pass and a longer text fail.
        raise UnsupportedError(f"varlen_attn of torch {torch.__version__} has no `window_size` argument")
    else:
        options["is_causal"] = causal
    return options


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
