"""Padding-free attention: all sequences of a batch end to end in one row, each attending to itself alone.

Registered with transformers under one name as attention and as mask function; the forward gets `layout` as a keyword argument and hands it
through to the attention of each layer. Whether an architecture honours all of this is not assumed: the start-up check compares with padding.
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
# Attention alone is padded to this multiple on a CPU: torch's softmax is three times slower on lengths that no vector register divides, and
# few lengths make few calls.
_STEP = 16
# Scores are held for a whole bucket: beyond this length the fused kernel, which holds none, is the better one.
_LONGEST = 512


@dataclass(frozen=True)
class Buckets:
    """Sequences padded to few lengths, for attention alone.

    `spread[i]` is the packed row of padded row i, `collect[i]` the padded row of packed row i. `groups`: (first padded row, sequences,
    padded length, mask); the mask ([sequences, 1, 1, length]: 0 or minus infinity) is None where nothing is padded.
    """

    spread: torch.Tensor
    collect: torch.Tensor
    groups: list[tuple[int, int, int, torch.Tensor | None]]


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row are. `runs`: (start, sequences, length) of neighbours of equal length, for one attention call each.

    `offsets` (int32, [sequences + 1], on the device) is set when the variable-length kernel runs instead, `buckets` where padding attention pays.
    """

    runs: list[tuple[int, int, int]]
    longest: int
    offsets: torch.Tensor | None = None
    buckets: Buckets | None = None


def buckets(lengths: list[int], dtype: torch.dtype, filling: int) -> Buckets:
    """The buckets of sequences that lie end to end in this order; equal lengths should be neighbours. `filling` rows come after them."""
    true = np.array(lengths)
    padded = -(-true // _STEP) * _STEP
    starts, firsts = np.cumsum(true) - true, np.cumsum(padded) - padded
    within = np.arange(padded.sum()) - np.repeat(firsts, padded)
    # Padding reads the first token of its own sequence: the mask hides it, whatever it is.
    spread = np.repeat(starts, padded) + np.where(within < np.repeat(true, padded), within, 0)
    collect = np.zeros(true.sum() + filling, dtype=np.int64)  # filling takes any row: nobody looks at it
    collect[: true.sum()] = np.arange(true.sum()) + np.repeat(firsts - starts, true)
    groups, at = [], 0
    for length, group in groupby(padded.tolist()):
        for count in _powers_of_two(sum(1 for _ in group)):
            mine = torch.from_numpy(true[at : at + count])
            hidden = torch.arange(length) >= mine[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
            groups.append((int(firsts[at]), count, length, mask if bool(hidden.any()) else None))
            at += count
    return Buckets(torch.from_numpy(spread), torch.from_numpy(collect), groups)


def _powers_of_two(count: int) -> list[int]:
    """`count` as a sum of falling powers of two: attention in few shapes, for the reason that `onednn.filled` has."""
    return [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]


def layout(
    lengths: list[int], device: torch.device, *, varlen: bool, bucketed: torch.dtype | None = None, filling: int = 0
) -> Layout:
    """The layout of sequences that lie end to end in this order; equal lengths should be neighbours. `filling` rows come after them."""
    if varlen:
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return Layout([], max(lengths), offsets.to(device, non_blocking=True))
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        runs.append((start, count, length))
        start += count * length
    short = bucketed is not None and max(lengths) <= _LONGEST
    return Layout(runs, max(lengths), buckets=buckets(lengths, bucketed, filling) if short and bucketed else None)


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
    if layout.buckets is not None and not (grouped or causal or sliding_window):
        return _bucketed(query, key, value, layout.buckets, scaling), None
    out = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
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


def _bucketed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: Buckets, scaling: float | None
) -> torch.Tensor:
    """Attention as two products and a softmax a bucket: on CPUs faster than the fused kernel, up to the lengths that encoders take."""
    heads, size = query.shape[1], query.shape[3]
    scale = size**-0.5 if scaling is None else scaling
    q, k, v = (t[0].transpose(0, 1).flatten(1).index_select(0, at.spread) for t in (query, key, value))
    out = torch.empty_like(q)
    for first, count, length, mask in at.groups:
        rows = slice(first, first + count * length)
        a, b, c = (t[rows].view(count, length, heads, size).transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(a * scale, b.transpose(2, 3))
        if mask is not None:
            scores += mask
        done = torch.matmul(scores.softmax(dim=-1), c)
        out[rows].view(count, length, heads, size).copy_(done.transpose(1, 2))
    return out.index_select(0, at.collect).view(1, -1, heads, size)


def _window(length: int, sliding_window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Which positions see which (bool, [length, length]); None when the window does not matter at this length."""
    if sliding_window is None or length <= sliding_window:
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
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
    """Flash attention over the whole row at once (CUDA, compute capability 8.0 or newer, fp16 or bf16)."""
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
    """The keyword arguments that make `varlen_attn` compute this attention; `size`: elements of one head.

    torch 2.10 takes `is_causal` alone; 2.11 brought `scale` and `window_size` in its place. Raises `UnsupportedError`.
    """
    accepted = _parameters(varlen_attn)
    options: dict[str, Any] = {}
    if "scale" in accepted:
        options["scale"] = scaling
    elif scaling is not None and not math.isclose(scaling, size**-0.5):
        raise UnsupportedError(f"varlen_attn of torch {torch.__version__} takes no `scale`; the model sets {scaling:g}")
    if "window_size" in accepted:
        reach = sliding_window - 1 if sliding_window is not None else -1
        options["window_size"] = (reach, 0 if causal else reach)
    elif sliding_window is not None:
        # Also where this batch is shorter than the window: the start-up check must not pass what a longer text fails.
        raise UnsupportedError(f"varlen_attn of torch {torch.__version__} takes no `window_size`")
    else:
        options["is_causal"] = causal
    return options


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
