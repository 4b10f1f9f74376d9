"""Padding-free attention: all sequences of a batch are concatenated in one row, and each attends only to itself.

transformers knows it under one name. The forward gets `layout` as a keyword argument
and passes it to the attention of each layer. Not every architecture supports this, so the start-up check compares the
result with padding.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "inferctl_packed"
TOO_OLD = "variable-length attention needs torch"  # the start of a reason for padding
# On a CPU only attention is padded, to multiples of this: torch's softmax is three times slower on lengths that are not
# multiples of a vector register, and fewer lengths need fewer calls.
_BUCKET_STEP = 16
# What transformers adds to the scores of some architectures: T5's distances, sinks of attention.
_NOT_COMPUTED = ("position_bias", "s_aux")
# Buckets keep the scores of all their sequences in memory. The fused kernel does not, and is better above this length.
_MAX_BUCKET_LENGTH = 512


@dataclass(frozen=True)
class Layout:
    """The positions of the sequences in a packed row.

    With the variable-length kernel: `offsets` (int32, [sequences + 1], on the device) and `longest`. Otherwise
    `groups`: (first row, sequences, length, mask) of adjacent sequences of equal length, which share one call of
    attention. The mask ([sequences, 1, 1, length], 0 or minus infinity) is None without padding. If attention is
    padded, `spread[i]` is the packed row of padded row i, and `collect[i]` the padded row of packed row i. `shared`: the
    tokens of the first sequence, if it is the start of all others, which attend to it too.

    `mask`: instead of all that, the sequences are not packed but padded to the same length.
    """

    offsets: torch.Tensor | None = None
    longest: int = 0
    groups: list[tuple[int, int, int, torch.Tensor | None]] = field(default_factory=list)
    shared: int = 0
    spread: torch.Tensor | None = None
    collect: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def varlen_layout(lengths: list[int], device: torch.device) -> Layout:
    """Return the layout of sequences concatenated in this order, for the variable-length kernel."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return Layout(offsets.to(device, non_blocking=True), max(lengths))


def padded_layout(attended: torch.Tensor, dtype: torch.dtype) -> Layout:
    """Return the layout of padded sequences. `attended`: which tokens others attend to, bool [sequences, length]."""
    mask = torch.zeros(attended.shape, dtype=dtype, device=attended.device)
    return Layout(mask=mask.masked_fill_(~attended, float("-inf"))[:, None, None])


def layout(lengths: list[int], dtype: torch.dtype, padding_rows: int = 0, *, shared: bool = False) -> Layout:
    """Return the layout of sequences concatenated in this order, on a CPU. Equal lengths should be adjacent.

    `padding_rows` rows follow the sequences. `shared`: whether the first one is the start of the others. In bf16
    attention is padded, because that is faster.
    """
    actual = np.array(lengths)
    bucketed = dtype == torch.bfloat16 and max(lengths) <= _MAX_BUCKET_LENGTH
    padded = -(-actual // _BUCKET_STEP) * _BUCKET_STEP if bucketed else actual
    firsts = np.cumsum(padded) - padded
    groups, index = [], 0
    for (_, length), group in groupby((shared and at == 0, length) for at, length in enumerate(padded.tolist())):
        for count in _powers_of_two(sum(1 for _ in group)):
            hidden = torch.arange(length) >= torch.from_numpy(actual[index : index + count, None])
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]
            groups.append((int(firsts[index]), count, length, mask if bool(hidden.any()) else None))
            index += count
    first = lengths[0] if shared else 0
    if not bucketed:
        return Layout(groups=groups, shared=first)
    starts = np.cumsum(actual) - actual
    within = np.arange(padded.sum()) - np.repeat(firsts, padded)
    # Padding reads the first token of its sequence. The mask hides it.
    spread = np.repeat(starts, padded) + np.where(within < np.repeat(actual, padded), within, 0)
    collect = np.zeros(actual.sum() + padding_rows, dtype=np.int64)  # the values of padding rows are not used
    collect[: actual.sum()] = np.arange(actual.sum()) + np.repeat(firsts - starts, actual)
    return Layout(groups=groups, shared=first, spread=torch.from_numpy(spread), collect=torch.from_numpy(collect))


def _powers_of_two(count: int) -> list[int]:
    """Return `count` as a sum of falling powers of two. Few shapes limit oneDNN's code: see `onednn.round_up_rows`."""
    return [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]


def register() -> None:
    """Register `attn_implementation=NAME` with transformers."""
    from transformers import AttentionInterface

    # It makes no mask for an attention without a function for that, and then does not wait for the positions either.
    AttentionInterface.register(NAME, attention)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # in the signature of transformers; packed rows need no mask
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention, with the signature of transformers: [1, heads, tokens, size] -> [1, tokens, heads, size].

    Raises `ValueError` without a layout, and for what it does not compute.
    """
    if layout is None:
        raise ValueError("the architecture does not pass the packed layout to its attention")
    if named := [name for name in _NOT_COMPUTED if others.get(name) is not None]:
        raise ValueError(f"packed attention does not compute {named[0]}")
    # transformers passes `is_causal` of config.json, and then ignores that of the module.
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if layout.mask is not None:
        result = _attend(query, key, value, layout.mask, scaling, causal, sliding_window, softcap)
        return result.transpose(1, 2).contiguous(), None
    if layout.offsets is not None:
        if softcap is not None:
            raise ValueError("variable-length attention has no soft cap")
        return _varlen(query, key, value, layout, scaling, causal, sliding_window), None
    size = query.shape[3]
    q, k, v = (t[0].transpose(0, 1).flatten(1) for t in (query, key, value))
    if layout.spread is None:
        out = torch.zeros_like(q)  # the rows behind the last sequence belong to no group
    else:
        q, k, v = (t.index_select(0, layout.spread) for t in (q, k, v))
        out = torch.empty_like(q)
    for first, count, length, mask in layout.groups:
        rows = slice(first, first + count * length)
        a, b, c = (t[rows].view(count, length, -1, size).transpose(1, 2) for t in (q, k, v))
        if layout.shared and first:
            start = (t[: layout.shared].view(1, layout.shared, -1, size).transpose(1, 2) for t in (k, v))
            b, c = (torch.cat((s.expand(count, -1, -1, -1), t), dim=2) for s, t in zip(start, (b, c), strict=True))
            mask = None if mask is None else torch.nn.functional.pad(mask, (layout.shared, 0))
        result = _attend(a, b, c, mask, scaling, causal, sliding_window, softcap)
        out[rows].view(count, length, -1, size).copy_(result.transpose(1, 2))
    if layout.collect is not None:
        out = out.index_select(0, layout.collect)
    return out.view(1, len(out), -1, size), None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return the attention of sequences of equal length: [sequences, heads, length, size].

    The queries are the last tokens of their sequences, which can have more keys.
    """
    (length, size), keys = q.shape[2:], k.shape[2]
    grouped, windowed = q.shape[1] != k.shape[1], window is not None and keys > window
    if windowed or (causal and (mask is not None or softcap is not None or keys > length)):
        places = torch.arange(keys, device=q.device)
        distance = places[keys - length :, None] - places
        reach = window if windowed and window is not None else keys
        hidden = (distance >= reach) | (distance < 0 if causal else distance <= -reach)
        mask = (torch.zeros(1, dtype=q.dtype, device=q.device) if mask is None else mask).masked_fill(
            hidden, float("-inf")
        )
        causal = False
    if softcap is not None:
        if grouped:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = softcap * torch.tanh(torch.matmul(q, k.transpose(2, 3)).float() * (scaling or size**-0.5) / softcap)
        return torch.matmul((scores if mask is None else scores + mask).softmax(dim=-1).to(v.dtype), v)
    if q.dtype == torch.bfloat16 and length <= _MAX_BUCKET_LENGTH and not (grouped or causal):
        # On CPUs this is faster than the fused kernel for the usual lengths of encoders.
        scores = torch.matmul(q * (size**-0.5 if scaling is None else scaling), k.transpose(2, 3))
        if mask is not None:
            scores += mask
        return torch.matmul(scores.softmax(dim=-1), v)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped)


def missing_kernel(capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    """Return why this GPU cannot run packed attention with its kernel for sequences of several lengths, else None."""
    if capability is None or capability < (8, 0) or dtype == torch.float32:
        return "variable-length attention needs compute capability 8.0 and a 16-bit format"
    if {"scale", "window_size"} <= _varlen_parameters():
        return None
    return f"{TOO_OLD} 2.11, this is {torch.__version__}"


def _varlen_parameters() -> set[str]:
    """Return the parameters of torch's variable-length attention; none if this torch does not have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    causal: bool,
    sliding_window: int | None,
) -> torch.Tensor:
    """Return flash attention over the whole row, in the shapes of `attention`. See `missing_kernel`."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if (heads := query.shape[1]) != key.shape[1]:
        if "enable_gqa" in _varlen_parameters():
            options["enable_gqa"] = True
        else:  # torch 2.11
            key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    # Always a window, also if it hides nothing: torch 2.14 gives attention without one to cuDNN on Hopper and
    # Blackwell, whatever `device.avoid_cudnn` says. Flash attention takes a window of the longest sequence for none.
    reach = layout.longest if sliding_window is None else sliding_window - 1
    ends: Any = (layout.offsets, layout.offsets, layout.longest, layout.longest)
    out: Any = varlen_attn(q, k, v, *ends, scale=scaling, window_size=(reach, 0 if causal else reach), **options)
    result: torch.Tensor = out[None]
    return result
