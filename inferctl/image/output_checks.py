"""Compares what a server of an image returns with the fp32 reference of the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

from inferctl.core.errors import InferctlError

# Minimum cosine between a served vector and the fp32 reference. fp32 on the same weights differs only by the order of
# sums. fp16 and bf16 keep 11 and 8 bits of the mantissa, which costs up to about 5e-4 over the layers of a transformer.
# int8 quantizes the weights; below 0.99, retrieval rankings start to change.
TOLERANCE: Mapping[str, float] = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "int8": 0.99}
# On CPUs without VNNI or AMX, where int8 is emulated, the server has 7-bit weights.
EMULATED_INT8_TOLERANCE = 0.97
# Maximum difference between a score of rerank or classify and the fp32 reference, relative to the largest score (at
# least 1).
SCORE_TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.02, "int8": 0.1}
# Short and long texts, several scripts, code and digits, to test padding, truncation and special cases of tokenizers.
TEXTS: tuple[str, ...] = (
    "hello",
    "The quick brown fox jumps over the lazy dog.",
    "How many replicas does a service need at 200 requests a second?",
    "Die Straßenbahn fährt heute wegen Bauarbeiten nicht über die Brücke.",
    "東京の天気は晴れ、気温は二十五度です。",
    "def mean(values):\n    return sum(values) / len(values)",
    "1234567890 -- 3.14159e+00; A/B? 50 % off!",
    " ".join(
        ["A container image is a list of layers, each a set of files, and a configuration that says what to run."] * 5
    ),
)
# A reranker scores each text for this query. The last text is relevant.
QUERY = "What does a container image consist of?"
NO_VERIFY = "see the log above, or pass `--no-verify` to build without this test"


def limit(precision: str, level: str, *, scores: bool) -> float:
    """Return the minimum cosine of vectors, or the maximum difference of scores.

    `level`: whether the precision is native or emulated on the hardware.
    """
    if scores:
        return SCORE_TOLERANCE.get(precision, SCORE_TOLERANCE["int8"])
    if (precision, level) == ("int8", "emulated"):
        return EMULATED_INT8_TOLERANCE
    return TOLERANCE.get(precision, TOLERANCE["int8"])


def check_vectors(
    vectors: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]] | None,
    dimensions: int | None,
    tolerance: float | None,
) -> float | None:
    """Return the lowest cosine of `vectors` to `expected`, None without `expected`.

    `dimensions`: None for other outputs than dense vectors, which can be of any size and zero. Raises `InferctlError`
    for a wrong size, NaN, infinity, zeros, or a cosine below `tolerance`.
    """
    for index, vector in enumerate(vectors):
        if dimensions is not None and len(vector) != dimensions:
            fail(f"the vector of text {index + 1} has {len(vector)} numbers, but the model has {dimensions} dimensions")
        if count := sum(not math.isfinite(x) for x in vector):
            fail(f"the vector of text {index + 1} has NaN or infinity in {count} of {len(vector)} numbers")
        if dimensions is not None and not any(vector):
            fail(f"the vector of text {index + 1} is all zeros")
    if expected is None or tolerance is None:
        return None
    if len(vectors) != len(expected) or any(len(v) != len(e) for v, e in zip(vectors, expected, strict=False)):
        fail("the fp32 reference and the served vectors have different shapes")
    cosines = [1.0 if not any(v) and not any(e) else cosine(v, e) for v, e in zip(vectors, expected, strict=True)]
    lowest = min(cosines)
    if lowest < tolerance:
        fail(
            f"the vector of text {cosines.index(lowest) + 1} differs from the fp32 reference of the same weights: "
            f"cosine {lowest:.5f}, required {tolerance}"
        )
    return lowest


def check_scores(
    scores: Sequence[float], expected: Sequence[float] | None, tolerance: float | None, per_text: int = 1
) -> float | None:
    """Return the largest difference of `scores` to `expected`, None without `expected`.

    It is relative to the largest expected score, at least 1. `per_text`: how many scores a text has. Raises
    `InferctlError` for NaN, infinity, or a difference
    above `tolerance`.
    """
    for index, value in enumerate(scores):
        if not math.isfinite(value):
            fail(f"the score of text {index // per_text + 1} is NaN or infinity")
    if expected is None or tolerance is None:
        return None
    if len(scores) != len(expected):
        fail(f"the fp32 reference has {len(expected)} scores for {len(scores)} texts")
    scale = max(1.0, *map(abs, expected))
    differences = [abs(value - other) / scale for value, other in zip(scores, expected, strict=True)]
    largest = max(differences)
    # `not` so that a reference of NaN fails.
    if not largest <= tolerance:
        index = differences.index(largest)
        fail(
            f"the score of text {index // per_text + 1} differs from the fp32 reference of the same weights: "
            f"{scores[index]:.5f} instead of {expected[index]:.5f}, the limit is {tolerance * scale:.3g}"
        )
    return largest


def fail(message: str, hint: str = NO_VERIFY) -> NoReturn:
    """Raise `InferctlError`: the verification failed."""
    raise InferctlError(f"verification failed: {message}", hint)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the cosine of two vectors, 0 if one is zero."""
    length = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0
