"""From the states of tokens to the outputs of sequences: dense vector, sparse weights, vectors of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Form, Ids, Outputs, SparseConfig, top
from inferctl.reading.rows import Tokens, Vectors, slices
from inferctl.serve.engines import transfer, weights
from inferctl.serve.engines.head import LanguageHead
from inferctl.serve.engines.pooling import Layers
from inferctl.serve.engines.prepared import Wanted

# Logits of so many bytes are computed at a time: those of 8,192 tokens and BERT's vocabulary would have 1 GB.
_LOGITS_BYTES = 64 * 2**20
# For so many weights of a sequence a GPU has room at first, and for so many times what was too many later.
_EXPECTED, _MARGIN = 256, 1.25


class CapacityError(Exception):
    """The sparse weights of a batch were more than it had room for. The next one has more."""


class OutputHeads:
    """What computes the outputs that a model has besides its dense vector, with their weights.

    `logits`: the masked language model, if the sparse weights are made of its logits.
    """

    def __init__(
        self, folder: Path, config: EmbeddingConfig, logits: LanguageHead | None, device: torch.device
    ) -> None:
        """Raises `UsageError` for weights that are missing or of other sizes."""
        self._config, self._logits, self._device = config, logits, device
        self._fixed, self._expected = not transfer.on_host(device), _EXPECTED
        self._weights: torch.nn.Linear | None = None
        self._query_weights: Vectors | None = None
        if config.sparse is not None and config.sparse.folder is not None:
            self._weights = weights.linear(folder, config.sparse.folder).to(device)
        if config.sparse is not None and config.sparse.query_weights is not None:
            self._query_weights = weights.query_weights(folder, config.sparse.query_weights)
        self._layers = Layers(folder, config.tokens.layers if config.tokens else ()).to(device)

    @property
    def query_vocabulary_size(self) -> int | None:
        """How many tokens have a stored weight in queries; None without stored weights."""
        return None if self._query_weights is None else len(self._query_weights)

    def token_size(self, width: int) -> int:
        """Return how many numbers the vector of a token has, made of a state with `width` numbers; 0 without any."""
        return self._layers(torch.zeros(1, width, device=self._device)).shape[1] if self._config.tokens else 0

    def is_looked_up(self, form: Form) -> bool:
        """Return whether the outputs of a form need no states: the weights of a query, which are stored."""
        return self._query_weights is not None and form == Form.SPARSE | Form.QUERY

    def looked_up(self, ids: Tokens) -> Outputs:
        """Return the stored weights of the tokens of a query."""
        assert self._query_weights is not None
        present = np.unique(ids)
        found = self._query_weights[present]
        ids, weights = self._most(present[found != 0], found[found != 0])
        return Outputs(ids=ids, weights=weights)

    def wanted(self, sequences: Sequence[Tokens], forms: Sequence[Form]) -> list[Wanted]:
        """Return which of these sequences ask for which output."""
        ends, found = np.cumsum([len(ids) for ids in sequences]), []
        for kind in (Form.DENSE, Form.SPARSE, Form.TOKENS):
            chosen = [index for index, form in enumerate(forms) if kind in form]
            rows, config = [], self._config.tokens
            for index in chosen:
                ids = sequences[index]
                kept = np.ones(len(ids), np.bool_)
                if kind is Form.TOKENS and config is not None:
                    kept[: config.first] = False
                    if config.skipped and (Form.QUERY not in forms[index] or config.skips_queries):
                        kept &= ~np.isin(ids, config.skipped)
                rows.append(np.flatnonzero(kept) + ends[index] - len(ids))
            if chosen:
                found.append(Wanted(kind, chosen, [len(each) for each in rows], np.concatenate(rows)))
        return found

    def launch(
        self,
        states: torch.Tensor,
        wanted: Wanted,
        rows: torch.Tensor,
        dense: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        counts: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Compute an output of the sequences that ask for it. `read` makes it of what is returned.

        `states`: those of the whole part. `rows`, `counts`: those of `wanted`, on the device. `dense(states, counts)`
        returns the dense vectors of sequences of so many tokens: fp32, [sequences, numbers].
        """
        if len(rows) < len(states):
            states = states.index_select(0, rows)
        if wanted.kind is Form.DENSE:
            return [dense(states, counts)]
        if wanted.kind is Form.TOKENS:
            return [self._layers(states.float())]
        if self._weights is not None:
            return [torch.relu(self._weights(states.float()))[:, 0]]
        return [tensor for pooled in self._of_logits(states, wanted.counts) for tensor in self._compact(pooled)]

    def read(
        self, wanted: Wanted, sequences: Sequence[Tokens], arrays: Sequence[npt.NDArray[Any]]
    ) -> list[dict[str, Any]]:
        """Return the fields of the outputs of the sequences that ask for them. `arrays`: what `launch` returned.

        Raises `CapacityError` if these have no room for all weights: then launch the batch again.
        """
        if wanted.kind is Form.DENSE:
            return [{"dense": vector} for vector in arrays[0]]
        if wanted.kind is Form.TOKENS:
            return [{"tokens": rows} for rows in np.split(arrays[0], np.cumsum(wanted.counts)[:-1])]
        if self._weights is not None:
            ignored = self._config.sparse.ignored if self._config.sparse else ()
            parts = np.split(arrays[0], np.cumsum(wanted.counts)[:-1])
            found = [_largest(sequences[at], part, ignored) for at, part in zip(wanted.sequences, parts, strict=True)]
        else:
            found = []
            for counts, ids, weights in zip(arrays[::3], arrays[1::3], arrays[2::3], strict=True):
                ends = np.cumsum(counts)
                if ends[-1] > len(ids):
                    self._expected = math.ceil(_MARGIN * ends[-1] / len(counts))
                    raise CapacityError
                bounds = zip((ends - counts).tolist(), ends.tolist(), strict=True)
                found += [(ids[start:end], weights[start:end]) for start, end in bounds]
        return [{"ids": ids, "weights": values} for ids, values in itertools.starmap(self._most, found)]

    def _most(self, ids: Ids, weights: Vectors) -> tuple[Ids, Vectors]:
        """Return the weights that the model keeps: `max_active_dims` of sentence-transformers."""
        return top(ids, weights, self._config.sparse.most if self._config.sparse else None, None)

    def _of_logits(self, states: torch.Tensor, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the weights of the whole vocabulary for some sequences at a time: [sequences, vocabulary].

        Logits take at most `_LOGITS_BYTES` at a time. Only a longer sequence is divided. Sequences of equal length,
        which are adjacent, are pooled together.
        """
        config = self._config.sparse
        assert config is not None
        assert self._logits is not None
        rows = max(1, _LOGITS_BYTES // (4 * self._logits.size))
        rows = 1 << rows.bit_length() - 1  # oneDNN rounds other numbers up
        at = 0
        for first, stop in slices(lengths, rows):
            part = states[at : at + sum(lengths[first:stop])]
            at += len(part)
            if len(part) <= rows:
                pooled = self._pooled(part, lengths[first:stop], config)
            else:
                each = [part[start : start + rows] for start in range(0, len(part), rows)]
                pieces = torch.cat([self._pooled(piece, [len(piece)], config) for piece in each])
                pooled = pieces.amax(0, keepdim=True) if config.pooling == "max" else pieces.sum(0, keepdim=True)
            yield _activated(pooled, config) if config.pooling == "max" else pooled

    def _pooled(self, states: torch.Tensor, lengths: Sequence[int], config: SparseConfig) -> torch.Tensor:
        """Return the largest logits of sequences, or the sum of their weights: fp32, [sequences, vocabulary]."""
        assert self._logits is not None
        logits, found, at = self._logits(states), [], 0
        if config.pooling == "sum":
            logits = _activated(logits.float(), config)
        for length, group in itertools.groupby(lengths):
            count = sum(1 for _ in group)
            part = logits[at : at + count * length].view(count, length, -1)
            found.append(part.amax(1).float() if config.pooling == "max" else part.sum(1))
            at += count * length
        return torch.cat(found)

    def _compact(self, pooled: torch.Tensor) -> list[torch.Tensor]:
        """Return how many weights of each sequence are not zero, and the ids and values of these, concatenated.

        A GPU must know how many, or the host would wait for it. So it gets room for the most that a batch had so far.
        """
        if self._fixed:
            present, size = pooled != 0, pooled.shape[1]
            room = min(pooled.numel(), len(pooled) * self._expected)
            places = torch.nonzero_static(present.view(-1), size=room, fill_value=0)[:, 0]
            return [present.sum(1, dtype=torch.int32), (places % size).int(), pooled.view(-1)[places]]
        rows = pooled.numpy()
        ids = [np.flatnonzero(row != 0) for row in rows]  # of booleans: three times as fast as of numbers
        weights = np.concatenate([row[present] for row, present in zip(rows, ids, strict=True)])
        counts = np.array([len(each) for each in ids], np.int32)
        return [torch.from_numpy(each) for each in (counts, np.concatenate(ids).astype(np.int32), weights)]


def _activated(logits: torch.Tensor, config: SparseConfig) -> torch.Tensor:
    """Return log(1 + max(0, logit)), which rises with the logit, so that it can follow the maximum."""
    values = torch.log1p(torch.relu(logits))
    return torch.log1p(values) if config.twice else values


def _largest(ids: Tokens, values: Vectors, ignored: tuple[int, ...]) -> tuple[Ids, Vectors]:
    """Return the ids of a text and the largest weight of each that is above zero."""
    present, places = np.unique(ids, return_inverse=True)
    largest = np.zeros(len(present), np.float32)
    np.maximum.at(largest, places, values)
    kept = (largest > 0) & ~np.isin(present, ignored)
    return present[kept], largest[kept]
