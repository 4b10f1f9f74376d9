"""The outputs of an embedding model: one dense vector, sparse weights, and one vector for each token.

A sequence asks for some of them by its mark, and gets all of them in one row of numbers. Read without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from inferctl.reading.modules import Layer
from inferctl.reading.rows import Tokens, Vectors, slices

Output: TypeAlias = Literal["dense", "sparse", "tokens"]
Role: TypeAlias = Literal["query", "document"] | None
ROLES: tuple[Role, ...] = ("query", "document", None)
Ids: TypeAlias = npt.NDArray[np.int32]
# Numbers of documents, and their products with a query, that are computed at a time: 4 MiB and 1 GFLOP.
_PART_NUMBERS, _PART_PRODUCTS = 2**20, 2**29
_ATTENDED = 4  # the bit of a mark at which the number of attended tokens begins


class Form(IntFlag):
    """What a sequence is computed for: its outputs, and whether it is a query."""

    DENSE = 1
    SPARSE = 2
    TOKENS = 4
    QUERY = 8


FORMS: dict[Output, Form] = {"dense": Form.DENSE, "sparse": Form.SPARSE, "tokens": Form.TOKENS}


def mark(form: Form, attended: int = 0) -> int:
    """Return the mark of a sequence. `attended`: how many of its tokens others attend to, the first ones; 0: all."""
    return int(form) | attended << _ATTENDED


def form_of(number: int) -> Form:
    """Return the form in a mark. Without one, it is the dense vector."""
    return Form(number & 15) if number & 7 else Form.DENSE | Form(number & 8)


def attended_of(number: int, length: int) -> int:
    """Return how many tokens of a sequence of this length are attended to."""
    return number >> _ATTENDED or length


@dataclass(frozen=True)
class SparseConfig:
    """How the states of tokens become one weight for each of some tokens of the vocabulary.

    `folder`: that of a layer which gives each token of the text a weight, of which the largest counts for its id, as in
    BGE-M3. None: the masked language model gives each token of the text a logit for each token of the vocabulary
    (SPLADE). `pooling` takes the largest or the sum of log(1 + max(0, logit)), or of that of the result if `twice`.
    `query_weights`: the folder with the weights of the tokens in a query, which are then not computed, and
    `query_length` the most tokens of one. `ignored`: ids without a weight. `most`: how many weights a text has, the
    largest ones; None for all.
    """

    folder: str | None = None
    pooling: Literal["max", "sum"] = "max"
    twice: bool = False
    query_weights: str | None = None
    query_length: int | None = None
    ignored: tuple[int, ...] = ()
    most: int | None = None


@dataclass(frozen=True)
class Expansion:
    """The tokens `token` that follow a shorter query, up to `length`. Others attend to them if `attend`.

    `fixed`: longer queries are truncated to that length.
    """

    length: int
    token: int
    attend: bool = False
    fixed: bool = True


@dataclass(frozen=True)
class TokensConfig:
    """How the states of tokens become their vectors.

    `layers`: applied to each state. `first`: tokens at the start that have no vector. `skipped`: ids that have none in
    documents, and in queries if `skips_queries`. `query_length`, `document_length`: the most tokens of each, with
    special ones; `length`: of texts without one of these. `markers`: texts in prompts that are one token, also where
    the tokenizer would split them. `mean`: whether MaxSim is divided by the number of the query's vectors.
    """

    layers: tuple[Layer, ...] = ()
    first: int = 0
    skipped: tuple[int, ...] = ()
    skips_queries: bool = False
    query_length: int | None = None
    document_length: int | None = None
    length: int | None = None
    expansion: Expansion | None = None
    markers: tuple[str, ...] = ()
    mean: bool = False

    def limit(self, role: Role) -> int | None:
        """Return the most tokens of a query, a document or another text; None for the limit of the model."""
        found = {"query": self.query_length, "document": self.document_length, None: None}[role]
        if role == "query" and self.expansion is not None:
            found = self.expansion.length if self.expansion.fixed else found and max(found, self.expansion.length)
        return found or self.length

    def expand(self, ids: Tokens) -> tuple[Tokens, int]:
        """Return the token ids of a query with those that follow it, and how many are attended to (0: all)."""
        expansion = self.expansion
        if expansion is None or (missing := expansion.length - len(ids)) <= 0:
            return ids, 0
        expanded = np.concatenate([ids, np.full(missing, expansion.token, dtype=np.int32)])
        return expanded, 0 if expansion.attend else len(ids)


_NONE, _NO_IDS = np.empty(0, np.float32), np.empty(0, np.int32)


class Outputs(NamedTuple):
    """The outputs of a sequence. Those that it did not ask for are empty.

    `weights[i]` is that of the token `ids[i]` of the vocabulary; the ids rise. `tokens`: [tokens, numbers].
    """

    dense: Vectors = _NONE
    ids: Ids = _NO_IDS
    weights: Vectors = _NONE
    tokens: Vectors = _NONE.reshape(0, 0)

    @property
    def size(self) -> int:
        """How many numbers the sparse weights and the vectors of tokens have."""
        return self.tokens.size + self.ids.size + self.weights.size


def pack(form: Form, outputs: Outputs) -> Vectors:
    """Return the row of a sequence: dense numbers; count, ids and weights; numbers of tokens.

    Ids are exact in float32 up to 2^24. No vocabulary is as large.
    """
    sparse = [np.array([len(outputs.ids)]), outputs.ids, outputs.weights] if Form.SPARSE in form else []
    return np.concatenate([outputs.dense, *sparse, outputs.tokens.ravel()], dtype=np.float32)


def unpack(row: Vectors, form: Form, dimensions: int, token_dimensions: int) -> Outputs:
    """Return the outputs in a row. `dimensions`: of a dense vector; `token_dimensions`: of that of a token."""
    start = dimensions if Form.DENSE in form else 0
    dense, count = row[:start], 0
    if Form.SPARSE in form:
        count, start = int(row[start]), start + 1
    ids, weights = row[start : start + count].astype(np.int32), row[start + count : start + 2 * count]
    rest = row[start + 2 * count :]
    return Outputs(dense, ids, weights, rest.reshape(-1, token_dimensions) if len(rest) else rest.reshape(0, 0))


def top(ids: Ids, weights: Vectors, count: int | None, least: float | None) -> tuple[Ids, Vectors]:
    """Return the `count` largest weights that are at least `least`, in the order of their ids."""
    if least is not None:
        kept = weights >= least
        ids, weights = ids[kept], weights[kept]
    if count is not None and len(ids) > count:
        chosen = np.sort(np.argsort(-weights, kind="stable")[:count])
        ids, weights = ids[chosen], weights[chosen]
    return ids, weights


def add_similarities(scores: Vectors, query: Vectors, documents: Sequence[Vectors]) -> Iterator[None]:
    """Add to `scores` the MaxSim of a query with each document, in parts: each takes about 0.1 s on one core.

    It is the sum of the largest product of each token of the query with a token of the document; 0 without tokens.
    """
    for start, stop in slices([each.size for each in documents], _PART_NUMBERS):
        present = [index for index in range(start, stop) if len(documents[index])]
        if not present:
            continue
        joined = np.concatenate([documents[index] for index in present])
        firsts = np.cumsum([0, *(len(documents[index]) for index in present[:-1])])
        rows = max(1, _PART_PRODUCTS // joined.size)
        for at in range(0, len(query), rows):
            scores[present] += np.maximum.reduceat(query[at : at + rows] @ joined.T, firsts, axis=1).sum(axis=0)
            yield
