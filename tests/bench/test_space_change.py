"""How much a change of a space matters: nearest neighbors by exact search, the interval of their share, the verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from inferctl.bench.judge import neighbors, space_change
from inferctl.bench.judge.space_change import Vectors

RANDOM = np.random.default_rng(7)
BASE = RANDOM.normal(size=(300, 32)).astype(np.float32)
ROTATION = np.linalg.qr(RANDOM.normal(size=(32, 32)))[0].astype(np.float32)
NOISE = RANDOM.normal(size=BASE.shape).astype(np.float32)
LENGTHS = RANDOM.uniform(1, 5, size=(300, 1)).astype(np.float32)


def both(rows: Any, **options: Any) -> Vectors:
    return Vectors(rows, rows, **options)


def expected(queries: Any, store: Any, metric: str) -> list[set[int]]:
    """Return the 10 nearest of each row without itself, by scikit-learn."""
    found = NearestNeighbors(n_neighbors=11, algorithm="brute", metric=metric).fit(store).kneighbors(queries)[1]
    return [set([each for each in row if each != number][:10]) for number, row in enumerate(found.tolist())]


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_neighbors_that_stay_are_those_of_exact_search(scale: float) -> None:
    new = BASE + np.float32(scale) * NOISE
    store = np.where(np.arange(300)[:, None] % 2 == 0, BASE, new)
    change = space_change.measure(both(BASE), both(new))
    assert change and change.mixed
    before = expected(BASE, BASE, "cosine")
    for found, after in (
        (change.mixed, expected(new, store, "cosine")),
        (change.reembedded, expected(new, new, "cosine")),
    ):
        assert found.value == pytest.approx(np.mean([len(a & b) / 10 for a, b in zip(before, after, strict=True)]))
    cosines = np.sum(BASE * new, 1) / np.linalg.norm(BASE, axis=1) / np.linalg.norm(new, axis=1)
    assert (change.cosine_min, change.cosine_median) == pytest.approx((cosines.min(), np.median(cosines)), abs=1e-6)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (both(BASE), "not needed"),
        (both(BASE * LENGTHS), "not needed"),  # cosine ignores lengths
        (both(BASE + 1e-3 * NOISE), "not needed"),
        (both(BASE + 0.04 * NOISE), "not enough evidence"),
        (both(BASE + 0.1 * NOISE), "re-embed"),
        (both(BASE @ ROTATION), "re-embed"),  # equal neighbors, but another space
        (Vectors(BASE @ ROTATION, BASE), "re-embed"),  # another prompt of queries
        (both(BASE[:, :16]), "re-embed"),
        (both(np.ones_like(BASE)), "re-embed"),
        (both(np.zeros_like(BASE)), "re-embed"),
    ],
)
def test_verdicts(new: Vectors, verdict: str) -> None:
    change = space_change.measure(both(BASE), new)
    assert change and change.verdict == verdict


def test_equal_texts_replace_each_other() -> None:
    copies = BASE[:15].repeat(20, axis=0)
    change = space_change.measure(*(both(copies + scale * NOISE) for scale in np.float32([1e-7, 1e-3])))
    assert change and change.mixed and change.mixed.value == change.reembedded.value == 1


def test_sparse_weights_are_compared_by_their_product() -> None:
    change = space_change.measure(both(np.abs(BASE), sparse=True), both(np.abs(BASE) * LENGTHS, sparse=True))
    assert change and change.verdict == "re-embed"
    before, after = (
        np.argsort(-(store @ store.T - 1e9 * np.eye(300)), 1)[:, :10]
        for store in (np.abs(BASE), np.abs(BASE) * LENGTHS)
    )
    kept = [len({*a} & {*b}) / 10 for a, b in zip(before.tolist(), after.tolist(), strict=True)]
    assert change.reembedded.value == pytest.approx(np.mean(kept))


def test_vectors_of_tokens_are_compared_by_max_sim() -> None:
    rows = [RANDOM.normal(size=4 * RANDOM.integers(1, 9)).astype(np.float32) for _ in range(40)]
    padded = neighbors.padded(rows)
    found = neighbors.max_similarities(padded[:5], padded, 4)
    tokens = [row.reshape(-1, 4) for row in rows]
    wanted = [[(query @ document.T).max(1).sum() for document in tokens] for query in tokens[:5]]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    change = space_change.measure(both(padded, per_token=4), both(padded + 0 * padded[::-1], per_token=4))
    assert change and change.verdict == "not enough evidence"  # of 40 texts
    assert change.mixed and change.mixed.value == 1
    assert change.cosine_min is None


@pytest.mark.parametrize(("kept", "count"), [(40, 40), (37, 40), (0, 40), (290, 300)])
def test_the_interval_is_that_of_wilson(kept: int, count: int) -> None:
    found = space_change.share([1.0] * kept + [0.0] * (count - kept))
    wanted = stats.binomtest(kept, count).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=2e-3)


@pytest.mark.parametrize("mean", [0.9, 0.95, 0.99])
def test_the_interval_has_the_share_in_95_of_100_samples(mean: float) -> None:
    random = np.random.default_rng(1)
    samples = random.binomial(10, random.beta(mean * 30, (1 - mean) * 30, size=(2000, 200))) / 10
    inside = [found.low <= mean <= found.high for found in map(space_change.share, samples)]
    assert 0.935 <= np.mean(inside) <= 0.985


def test_a_few_texts_have_no_other_neighbors() -> None:
    assert space_change.measure(both(BASE[:11]), both(BASE[:11])) is None
