"""From the states of tokens to the outputs of sequences: dense vector, sparse weights, vectors of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Form, Ids, Outputs, SparseConfig, top
from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.engines import weights
from inferctl.serve.engines.head import MaskedLanguageHead
from inferctl.serve.engines.pooling import Layers

# Logits of so many bytes are computed at a time: those of 8,192 tokens and BERT's vocabulary would have 1 GB.
_LOGITS_BYTES = 64 * 2**20


class OutputHeads:
    """What computes the outputs that a model has besides its dense vector, with their weights.

    `logits`: the masked language model, if the sparse weights are made of its logits.
    """

    def __init__(
        self, folder: Path, config: EmbeddingConfig, logits: MaskedLanguageHead | None, device: torch.device
    ) -> None:
        """Raises `UsageError` for weights that are missing or of other sizes."""
        self._config, self._logits, self._device = config, logits, device
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

    def compute(
        self,
        states: torch.Tensor,
        sequences: Sequence[Tokens],
        forms: Sequence[Form],
        dense: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> list[Outputs]:
        """Return the outputs of sequences whose states are concatenated: [tokens, width].

        `dense(states, counts)` returns the dense vectors of sequences of so many tokens: fp32, [sequences, numbers].
        """
        lengths = np.array([len(ids) for ids in sequences])
        ends = np.cumsum(lengths)
        found = [Outputs() for _ in sequences]
        for kind in (Form.DENSE, Form.SPARSE, Form.TOKENS):
            wanted = [index for index, form in enumerate(forms) if kind in form]
            if not wanted:
                continue
            part = states
            if len(wanted) < len(sequences):
                rows = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in wanted])
                part = states[torch.from_numpy(rows).to(states.device)]
            ids = [sequences[index] for index in wanted]
            each: list[dict[str, Any]]
            if kind is Form.DENSE:
                vectors = dense(part, torch.from_numpy(lengths[wanted]).to(states.device)).cpu().numpy()
                each = [{"dense": vector} for vector in vectors]
            elif kind is Form.SPARSE:
                kept = (self._most(*found) for found in self._sparse(part, ids))
                each = [{"ids": of, "weights": values} for of, values in kept]
            else:
                each = [{"tokens": rows} for rows in self._tokens(part, ids, [forms[i] for i in wanted])]
            for index, fields in zip(wanted, each, strict=True):
                found[index] = found[index]._replace(**fields)
        return found

    def _most(self, ids: Ids, weights: Vectors) -> tuple[Ids, Vectors]:
        """Return the weights that the model keeps: `max_active_dims` of sentence-transformers."""
        return top(ids, weights, self._config.sparse.most if self._config.sparse else None, None)

    def _sparse(self, states: torch.Tensor, sequences: Sequence[Tokens]) -> list[tuple[Ids, Vectors]]:
        config = self._config.sparse
        assert config is not None
        if self._weights is not None:
            values = torch.relu(self._weights(states.float()))[:, 0].cpu().numpy()
            parts = np.split(values, np.cumsum([len(ids) for ids in sequences])[:-1])
            return [_largest(ids, part, config.ignored) for ids, part in zip(sequences, parts, strict=True)]
        return self._of_logits(states, [len(ids) for ids in sequences], config)

    def _of_logits(
        self, states: torch.Tensor, lengths: Sequence[int], config: SparseConfig
    ) -> list[tuple[Ids, Vectors]]:
        """Return the weights of each sequence, made of the logits of its tokens.

        Logits take at most `_LOGITS_BYTES` at a time. The weights of the whole vocabulary are kept for the sequences
        that end among them, so they take hardly more.
        """
        assert self._logits is not None
        largest = config.pooling == "max"
        found: list[tuple[Ids, Vectors]] = []
        pooled: list[torch.Tensor] = []
        index = used = 0  # the sequence of the next state, and how many of its states were taken
        rows = max(1, _LOGITS_BYTES // (4 * self._logits.size))
        for start in range(0, len(states), rows):
            logits = self._logits(states[start : start + rows])
            if not largest:
                logits = _activated(logits.float(), config)
            at = 0
            while at < len(logits):
                count = min(lengths[index] - used, len(logits) - at)
                part = logits[at : at + count]
                value = (part.amax(dim=0) if largest else part.sum(dim=0)).float()
                if used:
                    value = torch.maximum(pooled.pop(), value) if largest else pooled.pop() + value
                pooled.append(value)
                at, used = at + count, used + count
                if used == lengths[index]:
                    index, used = index + 1, 0
            ended = pooled[:-1] if used else pooled
            pooled = pooled[len(ended) :]
            if ended:
                whole = torch.stack(ended)
                for row in (_activated(whole, config) if largest else whole).cpu().numpy():
                    ids = np.flatnonzero(row)
                    found.append((ids.astype(np.int32), row[ids]))
        return found

    def _tokens(self, states: torch.Tensor, sequences: Sequence[Tokens], forms: Sequence[Form]) -> list[Vectors]:
        config = self._config.tokens
        assert config is not None
        values = self._layers(states.float()).cpu().numpy()
        found, start = [], 0
        for ids, form in zip(sequences, forms, strict=True):
            rows = values[start : start + len(ids)]
            start += len(ids)
            kept = np.arange(len(ids)) >= config.first
            if config.skipped and (Form.QUERY not in form or config.skips_queries):
                kept &= ~np.isin(ids, config.skipped)
            found.append(rows[kept])
        return found


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
