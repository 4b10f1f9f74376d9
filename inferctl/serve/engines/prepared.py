"""What the host does before a forward pass: token ids -> the inputs of the encoder, in memory that the device reads.

None of it waits for the device, so that a thread can prepare a batch while the one before is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from inferctl.reading.outputs import Form, attended_of
from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.engines import onednn, packed
from inferctl.serve.engines.transfer import Staged
from inferctl.serve.text.text_parts import Pair

Integers: TypeAlias = npt.NDArray[np.int64]

# The fewest tokens that sequences of a batch must have in common at their start, so that these are computed once.
_MIN_SHARED = 16
# With the variable-length kernel, also this share of all tokens: it needs copies of the keys and values of the start
# for each sequence, which take 3% to 5% of the time that a layer needs for as many tokens (arithmetic for H100 and L4).
_MIN_SAVED = 1 / 16
# The largest share of padding in a padded sub-batch.
_MAX_PADDING = 0.15


@dataclass(frozen=True)
class Sequences:
    """The token ids of sequences, and their marks (see `Batch`)."""

    ids: list[Tokens]
    marks: list[int] | None = None

    @classmethod
    def of_pairs(cls, pairs: Iterable[Pair]) -> Sequences:
        """Return the pairs as sequences."""
        ids, starts = zip(*pairs, strict=True)
        return cls(list(ids), list(starts))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return [len(ids) for ids in self.ids]

    def take(self, indices: Iterable[int]) -> Sequences:
        """Return the sequences with these indices."""
        chosen, marks = list(indices), self.marks
        return Sequences([self.ids[i] for i in chosen], None if marks is None else [marks[i] for i in chosen])

    def token_type_ids(self) -> list[Integers]:
        """Return for each token of each pair the number of its segment, 0 or 1."""
        starts = [start or n for n, start in zip(self.lengths, self.marks or self.lengths, strict=True)]
        return [(np.arange(n) >= start).astype(np.int64) for n, start in zip(self.lengths, starts, strict=True)]


@dataclass(frozen=True, order=True)
class Shape:
    """The sizes of a captured forward pass: tokens, those of the longest sequence, and the number of sequences."""

    tokens: int
    longest: int
    sequences: int

    def fits(self, lengths: Sequence[int]) -> bool:
        """Return whether sequences of these lengths fit."""
        return sum(lengths) <= self.tokens and max(lengths) <= self.longest and len(lengths) <= self.sequences


@dataclass(frozen=True)
class Wanted:
    """The sequences of a part that ask for an output (`kind`), by their index in the part.

    `rows`: which states of the part it is made of; `counts`: how many for each of the sequences.
    """

    kind: Form
    sequences: list[int]
    counts: list[int]
    rows: Integers


@dataclass(frozen=True)
class Part:
    """Sequences that the encoder computes together.

    `sequences`: the longest first, `indices`: theirs in the batch. `staged` has the inputs of the encoder, and:
    `counts`, the tokens of each sequence whose states precede those of the next; what the variable-length kernel reads
    of the layout; `real`, the places of tokens among those of padded sequences, flattened. `layout`: that of packed
    attention, on the host; None for padded attention. The first `shared` tokens of all sequences are equal, and
    computed once: as a sequence of its own before the others, which `counts` includes. `wanted`: outputs, if the batch
    has `forms`, and `staged` has the rows and the counts of each by its number. `shape`: what the part is padded to,
    with rows behind its `tokens` and empty sequences.
    """

    sequences: Sequences
    indices: Sequence[int]
    staged: Staged
    tokens: int
    layout: packed.Layout | None = None
    shared: int = 0
    wanted: Sequence[Wanted] = ()
    shape: Shape | None = None


@dataclass(frozen=True)
class Prepared:
    """A batch whose inputs are ready.

    `forms`: the outputs of each sequence; None if all get one vector or logits. `rows`: by index, those that need no
    device.
    """

    count: int
    tokens: int
    parts: list[Part]
    forms: list[Form] | None = None
    rows: dict[int, Vectors] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """How the sequences of one model become inputs of its encoder.

    `first_position`: the number of the first one, `shares`: whether the tokens that all sequences start with can be
    computed once, `rounded`: whether oneDNN wants a rounded number of rows. `varlen`: see `Forward`.
    """

    device: torch.device
    dtype: torch.dtype
    varlen: bool
    padding_id: int
    first_position: int
    takes_pairs: bool
    has_segments: bool
    shares: bool
    rounded: bool

    def packed(
        self,
        sequences: Sequences,
        indices: Sequence[int],
        wanted: Sequence[Wanted] = (),
        shape: Shape | None = None,
    ) -> Part:
        """Return the part of these sequences, concatenated."""
        sequences = sequences.take(indices)
        shared = self._shared(sequences) if self.shares and not wanted and shape is None else 0
        lengths, parts = [n - shared for n in sequences.lengths], [ids[shared:] for ids in sequences.ids]
        if shared:  # the common start is a sequence of its own
            lengths, parts = [shared, *lengths], [sequences.ids[0][:shared], *parts]
        counts = np.array(lengths)
        total = int(counts.sum())
        rows = shape.tokens if shape else onednn.round_up_rows(total) if self.rounded else total
        padding = np.zeros(rows - total, dtype=np.int64)
        within = np.concatenate([np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts), padding])
        within[shared:total] += shared
        ids = np.concatenate([*parts, padding + self.padding_id], dtype=np.int64)
        if self.first_position and (ids[:total] == self.first_position - 1).any():
            within = _places_without(ids == self.first_position - 1, within)
        arrays = {"input_ids": ids[None], "position_ids": within[None] + self.first_position}
        if self.has_segments:
            arrays["token_type_ids"] = np.concatenate([*sequences.token_type_ids(), padding])[None]
        arrays |= {"counts": counts, **_staged(wanted)}
        if self.varlen:
            empty = [0] * (shape.sequences - len(lengths) if shape else 0)
            layout = packed.varlen_layout(lengths + empty, shared=shared > 0)
            layout = replace(layout, longest=shape.longest) if shape else layout
            found = {name: getattr(layout, name) for name in packed.ON_DEVICE}
            arrays |= {name: values.numpy() for name, values in found.items() if values is not None}
        else:
            layout = packed.layout(lengths, self.dtype, shared=shared > 0)
        return Part(sequences, indices, Staged(arrays, self.device), total, layout, shared, wanted, shape)

    def padded(self, sequences: Sequences, indices: Sequence[int], wanted: Sequence[Wanted] = ()) -> Part:
        """Return the part of these sequences, padded to the same length."""
        sequences = sequences.take(indices)
        lengths = np.array(sequences.lengths)
        places = np.arange(lengths.max())
        real = places < lengths[:, None]
        arrays = {"input_ids": np.full(real.shape, self.padding_id), "attention_mask": real.astype(np.int64)}
        arrays["input_ids"][real] = np.concatenate(sequences.ids)
        if not self.takes_pairs and sequences.marks is not None:
            ends = [attended_of(number, n) for number, n in zip(sequences.marks, lengths.tolist(), strict=True)]
            arrays["attention_mask"] = (places < np.array(ends)[:, None]).astype(np.int64)
        if self.has_segments and sequences.marks is not None:
            arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
            arrays["token_type_ids"][real] = np.concatenate(sequences.token_type_ids())
        arrays |= {"counts": lengths, "real": np.flatnonzero(real), **_staged(wanted)}
        return Part(sequences, indices, Staged(arrays, self.device), int(lengths.sum()), wanted=wanted)

    def _shared(self, sequences: Sequences) -> int:
        """Return how many tokens at the start of all sequences are equal, if they can be computed once."""
        if len(sequences) < 2:
            return 0
        count = min(sequences.lengths) - 1
        for ids in sequences.ids[1:]:
            differ = np.flatnonzero(ids[:count] != sequences.ids[0][:count])
            count = int(differ[0]) if len(differ) else count
        saved = count * (len(sequences) - 1)
        pays = not self.varlen or saved >= _MIN_SAVED * sum(sequences.lengths)
        return count if count >= _MIN_SHARED and pays else 0


def _staged(wanted: Sequence[Wanted]) -> dict[str, Integers]:
    """Return what the device needs of outputs."""
    arrays = {f"rows {number}": each.rows for number, each in enumerate(wanted)}
    return arrays | {f"counts {number}": np.array(each.counts) for number, each in enumerate(wanted)}


def _places_without(padding: npt.NDArray[np.bool_], within: Integers) -> Integers:
    """Return the places of tokens in their sequences (`within`), without padding tokens, whose place is -1.

    RoBERTa-like models number positions like this, so that a text with the padding token has it in the middle.
    """
    real = np.cumsum(~padding)
    before: Integers = (real - ~padding)[np.arange(len(within)) - within]  # of the sequence, counted at its first token
    return np.where(padding, -1, real - before - 1)


def split(lengths: list[int], batch_tokens: int) -> Iterator[range]:
    """Split sequences, sorted by falling length, into parts of little padding. Yield the indices of each part.

    A part has at most `batch_tokens` tokens, padding included, or one sequence.
    """
    first = used = 0
    for index, length in enumerate(lengths):
        area = (index + 1 - first) * lengths[first]
        if index > first and (area > batch_tokens or used + length < (1 - _MAX_PADDING) * area):
            yield range(first, index)
            first, used = index, 0
        used += length
    if lengths:
        yield range(first, len(lengths))
