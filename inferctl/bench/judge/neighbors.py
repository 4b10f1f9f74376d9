"""The nearest texts of each text, by exact search over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

NEIGHBORS = 10

Matrix = npt.NDArray[np.float32]


def padded(rows: Sequence[Sequence[float] | Matrix], width: int = 0) -> Matrix:
    """Return rows of several widths with zeros at their ends, as an array of at least `width` columns."""
    padded = np.zeros((len(rows), max(width, *map(len, rows))), np.float32)
    with np.errstate(over="ignore"):
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
    return padded


def unit(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return vectors, shape (n, dimensions), with the length 1. Zeros, such as sparse weights of no token, stay so."""
    wide = vectors.astype(np.float64)
    lengths: npt.NDArray[np.float64] = np.linalg.norm(wide, axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = wide / np.where(lengths == 0, 1, lengths)
    return found


def cosines(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the cosine of each row with each row, shape (n, n)."""
    rows = unit(vectors)
    return rows @ rows.T


def max_similarities(queries: Matrix, documents: Matrix, per_token: int) -> Matrix:
    """Return the MaxSim of each query with each document, shape (queries, documents).

    A row has the vectors of its tokens one after the other, of `per_token` numbers each. Vectors of zeros are no token.
    """
    split = [[row.reshape(-1, per_token) for row in rows] for rows in (queries, documents)]
    asked, found = ([each[each.any(axis=1)] for each in rows] for rows in split)
    starts = np.cumsum([0, *map(len, found[:-1])])
    every = np.concatenate(found).T
    return np.stack([np.maximum.reduceat(each @ every, starts, axis=1).sum(axis=0) for each in asked])


def nearest(similarities: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return the 10 most similar columns of each row, without that of the row itself, shape (n, at most 10).

    It changes the diagonal of `similarities`.
    """
    np.fill_diagonal(similarities, -np.inf)
    return np.argsort(-similarities, axis=1, kind="stable")[:, : min(NEIGHBORS, len(similarities) - 1)]


def shared(near: npt.NDArray[np.intp], other: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Return which share of the nearest of each row both have, shape (n,)."""
    pairs = zip(near.tolist(), other.tolist(), strict=True)
    return np.array([len(set(one) & set(two)) / len(one) for one, two in pairs])
