"""How much a change of a vector space matters for retrieval: cosines, nearest neighbors that stay, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from inferctl.bench.judge.neighbors import NEIGHBORS, Matrix, max_similarities, nearest, unit

# Searches of an approximate index miss about as many neighbors.
LEAST_KEPT = 0.95
_NORMAL_975 = 1.959964
_ROUNDING = 1e-5  # of similarities of float32 vectors
_FEWEST = NEIGHBORS + 2  # fewer texts have no other neighbors

Verdict: TypeAlias = Literal["re-embed", "not needed", "not enough evidence"]


@dataclass(frozen=True)
class Vectors:
    """The vectors of n texts as queries and as documents, shape (n, dimensions) each.

    Dense ones are compared by their cosine, sparse weights by their product. `per_token`: each row has the vectors of
    its tokens, of so many numbers each, and MaxSim compares them.
    """

    queries: Matrix
    documents: Matrix
    sparse: bool = False
    per_token: int | None = None

    @property
    def dimensions(self) -> int:
        """The numbers of a vector, or of that of a token."""
        return self.per_token or self.documents.shape[1]


@dataclass(frozen=True)
class Share:
    """A share with its 95% interval over the texts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SpaceChange:
    """What changes if vectors of a new space come to those of an old one.

    `cosine_min`, `cosine_median`: of the old and the new vector of each text. `mixed`: the share of the 10 nearest
    documents of a query that stay if the queries and every second document are new, and the others old.
    `reembedded`: the same if all documents are new. The first three are None for spaces of different dimensions and,
    for vectors of tokens, also the cosines. `reason` says what the verdict rests on.
    """

    texts: int
    dimensions: tuple[int, int]
    cosine_min: float | None
    cosine_median: float | None
    mixed: Share | None
    reembedded: Share
    least_kept: float
    verdict: Verdict
    reason: str


def measure(old: Vectors, new: Vectors, least_kept: float = LEAST_KEPT) -> SpaceChange | None:
    """Return how two spaces differ on the same texts; None for fewer than 12 texts.

    A store need not be embedded again if the mixed one keeps at least `least_kept` of the neighbors: the interval
    decides, and if it has this value inside, there is not enough evidence.
    """
    count = len(old.documents)
    if count < _FEWEST:
        return None
    before = _similarities(old, old.documents)
    reembedded = share(_kept(before, nearest(_similarities(new, new.documents))))
    sizes = old.dimensions, new.dimensions
    if sizes[0] != sizes[1] or (old.per_token is None) != (new.per_token is None):
        reason = f"vectors have {sizes[0]} dimensions and {sizes[1]}"
        return SpaceChange(count, sizes, None, None, None, reembedded, least_kept, "re-embed", reason)
    lowest = median = None
    width = max(old.documents.shape[1], new.documents.shape[1])
    store = np.zeros((count, width), np.float32)  # rows of vectors of tokens have different lengths
    store[::2, : old.documents.shape[1]], store[1::2, : new.documents.shape[1]] = (
        old.documents[::2],
        new.documents[1::2],
    )
    mixed = share(_kept(before, nearest(_similarities(new, store))))
    if old.per_token is None:
        pairs = [(old.queries, new.queries), (old.documents, new.documents)]
        # Sparse weights of a text without tokens are zero on both sides.
        equal = [np.all(one == other, axis=1) for one, other in pairs]
        found = np.where(equal, 1.0, [np.sum(unit(one) * unit(other), axis=1) for one, other in pairs])
        lowest, median = float(found.min()), float(np.median(found))
    verdict: Verdict = "not enough evidence"
    if mixed.low >= least_kept or mixed.high < least_kept:
        verdict = "not needed" if mixed.low >= least_kept else "re-embed"
    interval = f"{mixed.value:.1%} ({mixed.low:.1%} to {mixed.high:.1%})"
    required = f"{100 * least_kept:g}%"
    reason = f"a mixed store of {count:,} texts keeps {interval} of the {NEIGHBORS} nearest, required {required}"
    return SpaceChange(count, sizes, lowest, median, mixed, reembedded, least_kept, verdict, reason)


def _similarities(vectors: Vectors, store: Matrix) -> npt.NDArray[np.float64]:
    if vectors.per_token is not None:
        return max_similarities(vectors.queries, store, vectors.per_token).astype(np.float64)
    if vectors.sparse:
        return vectors.queries.astype(np.float64) @ store.T.astype(np.float64)
    return unit(vectors.queries) @ unit(store).T


def _kept(before: npt.NDArray[np.float64], near: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Return which share of `near` was as similar before as the 10th nearest, by row, shape (n,).

    So any of several texts with equal vectors is right: rounding decides between them.
    """
    least = np.take_along_axis(before, nearest(before)[:, -1:], axis=1)
    kept = np.take_along_axis(before, near, axis=1) >= least - _ROUNDING * np.abs(least)
    return np.asarray(kept.mean(axis=1))


def share(values: Sequence[float] | npt.NDArray[np.float64]) -> Share:
    """Return the mean of shares with the interval of Wilson at their effective sample size.

    It is that of the binomial distribution with the same variance (E. L. Korn and B. I. Graubard, Survey Methodology
    24, 1998), and at least the number of values. So the interval has a width if all values are 1, too.
    """
    found = np.asarray(values, np.float64)
    mean, count = float(found.mean()), float(len(found))
    if variance := float(found.var(ddof=1)) / count:
        count = max(count, mean * (1 - mean) / variance)
    square = _NORMAL_975**2 / count
    center = (mean + square / 2) / (1 + square)
    half = math.sqrt(square * (mean * (1 - mean) + square / 4)) / (1 + square)
    # Rounding must not put the mean outside.
    return Share(mean, max(0.0, min(mean, center - half)), min(1.0, max(mean, center + half)))
