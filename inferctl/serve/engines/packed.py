"""Padding-free attention: all sequences of a batch are concatenated in one row, and each attends only to itself.

transformers knows it under one name. The forward gets `layout` as a keyword argument and passes it to the attention of
each layer. Not every architecture supports this, so the start-up check compares the result with padding.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

NAME = "inferctl_packed"
TOO_OLD = "variable-length attention needs torch"  # the start of a reason for padding
# The tensors of a layout that the variable-length kernel reads.
ON_DEVICE = ("offsets", "keys", "key_offsets")
# The fused kernel of CPUs makes code for each length in bf16, and each thread keeps it: 100 MB for all up to 512. So
# lengths are padded to multiples of this.
_STEP = 16
# What transformers adds to the scores of some architectures: T5's distances, sinks of attention.
_NOT_COMPUTED = ("position_bias", "s_aux")


@dataclass(frozen=True)
class Layout:
    """The positions of the sequences in a packed row.

    With the variable-length kernel: `offsets` (int32, [sequences + 1], on the device) and `longest`. If the first
    sequence is the start of all others, `keys` are the rows of the keys of each sequence, and `key_offsets` and
    `longest_key` theirs. Otherwise `groups`: (sequences, length, mask) of adjacent sequences of equal length, which
    share one call of attention. The mask ([1, padded length], 0 or minus infinity) is None without padding. `shared`: the
    tokens of the first sequence, if it is the start of all others, which attend to it too.

    `mask`: instead of all that, the sequences are not packed but padded to the same length.
    """

    offsets: torch.Tensor | None = None
    longest: int = 0
    keys: torch.Tensor | None = None
    key_offsets: torch.Tensor | None = None
    longest_key: int = 0
    groups: list[tuple[int, int, torch.Tensor | None]] = field(default_factory=list)
    shared: int = 0
    mask: torch.Tensor | None = None


def varlen_layout(lengths: list[int], *, shared: bool = False) -> Layout:
    """Return the layout of sequences concatenated in this order, for the variable-length kernel, on the host.

    `shared`: whether the first one is the start of the others. The kernel reads the keys of a sequence from adjacent
    rows, so `attention` copies the keys and values of the start for each of them.
    """
    if not shared:
        return Layout(_offsets(lengths), max(lengths))
    rows: Any = torch.arange(sum(lengths))
    start, *others = rows.split(lengths)
    keys = [start, *(torch.cat((start, own)) for own in others)]
    counts = [len(of_sequence) for of_sequence in keys]
    return Layout(_offsets(lengths), max(lengths), torch.cat(keys), _offsets(counts), max(counts))


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def padded_layout(attended: torch.Tensor, dtype: torch.dtype) -> Layout:
    """Return the layout of padded sequences. `attended`: which tokens others attend to, bool [sequences, length]."""
    mask = torch.zeros(attended.shape, dtype=dtype, device=attended.device)
    return Layout(mask=mask.masked_fill_(~attended, float("-inf"))[:, None, None])


def layout(lengths: list[int], dtype: torch.dtype, *, shared: bool = False) -> Layout:
    """Return the layout of sequences concatenated in this order, on a CPU. Equal lengths should be adjacent.

    Rows can follow them, which nothing uses. `shared`: whether the first sequence is the start of the others.
    """
    groups: list[tuple[int, int, torch.Tensor | None]] = []
    for (_, length), group in groupby((shared and at == 0, length) for at, length in enumerate(lengths)):
        padded = -(-length // _STEP) * _STEP if dtype == torch.bfloat16 else length
        mask = torch.zeros(1, padded, dtype=dtype)
        mask[:, length:] = float("-inf")
        groups.append((len(list(group)), length, mask if padded > length else None))
    return Layout(groups=groups, shared=lengths[0] if shared else 0)


def register() -> None:
    """Register `attn_implementation=NAME` with transformers."""
    from transformers import AttentionInterface

    # No mask function: with one, transformers looks for packed sequences in the positions of decoders, which makes the
    # host wait for the device.
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
    rows = [t[0].transpose(0, 1) for t in (query, key, value)]  # [tokens, heads, size]
    parts, first = [], 0
    for count, length, mask in layout.groups:
        end = first + count * length
        q, k, v = (t[first:end].view(count, length, *t.shape[1:]).transpose(1, 2) for t in rows)
        if mask is not None:
            q, k, v = (pad(t, (0, 0, 0, mask.shape[1] - length)) for t in (q, k, v))
        if layout.shared and first:
            start = (t[: layout.shared].transpose(0, 1).expand(count, -1, -1, -1) for t in rows[1:])
            k, v = (torch.cat(pair, dim=2) for pair in zip(start, (k, v), strict=True))
        hidden = None if causal else mask  # of a decoder, no token attends to the padding after it
        result = _attend(q, k, v, hidden, scaling, causal, sliding_window, softcap)[:, :, :length]
        parts.append(result.transpose(1, 2).flatten(0, 1))
        first = end
    if first < len(rows[0]):
        parts.append(rows[0].new_zeros(len(rows[0]) - first, *parts[0].shape[1:]))  # nothing uses them
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


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
        # On CPUs oneDNN would keep code of each shape in bf16.
        wide = torch.float32 if q.device.type == "cpu" else q.dtype
        scores = torch.matmul(q.to(wide), k.to(wide).transpose(2, 3)).float() * (scaling or size**-0.5)
        scores = softcap * torch.tanh(scores / softcap)
        return torch.matmul((scores if mask is None else scores + mask).softmax(dim=-1).to(wide), v.to(wide)).to(
            q.dtype
        )
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped)


def missing_kernel(capability: tuple[int, int] | None, dtype: torch.dtype) -> str | None:
    """Return why this GPU cannot run packed attention with its kernel for sequences of several lengths, else None."""
    if capability is None or capability < (8, 0) or dtype == torch.float32:
        return "variable-length attention needs compute capability 8.0 and a 16-bit format"
    from torch.nn.attention.varlen import varlen_attn

    if {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None
    return f"{TOO_OLD} 2.12, this is {torch.__version__}"


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

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    key_offsets, longest_key = layout.offsets, layout.longest
    if layout.keys is not None:
        k, v = (t.index_select(0, layout.keys) for t in (k, v))
        key_offsets, longest_key = layout.key_offsets, layout.longest_key
    # Always a window, also if it hides nothing: torch 2.14 gives attention without one to cuDNN on Hopper and
    # Blackwell, whatever `device.avoid_cudnn` says. Flash attention takes a window of the longest sequence for none.
    reach = longest_key if sliding_window is None else sliding_window - 1
    q, k, v = (t.contiguous() for t in (q, k, v))
    ends: Any = (layout.offsets, key_offsets, layout.longest, longest_key)
    window, grouped = (reach, 0 if causal else reach), query.shape[1] != key.shape[1]
    out: Any = varlen_attn(q, k, v, *ends, scale=scaling, window_size=window, enable_gqa=grouped)
    result: torch.Tensor = out[None]
    return result
