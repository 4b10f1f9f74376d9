"""The outputs of an embedding model as one vector for each text, so that they can be compared. Without numpy."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def read(entry: Mapping[str, Any], output: str, vocabulary_size: int) -> list[float]:
    """Return an output of an entry of `data`, in the response of `POST /v1/embeddings`.

    Sparse weights become a vector of the whole vocabulary, and the vectors of all tokens follow each other. Raises
    `KeyError`, `TypeError`, `ValueError` or `IndexError` if the entry has another form.
    """
    if output == "sparse":
        found = entry["sparse_embedding"]
        return spread(found["indices"], found["values"], vocabulary_size)
    if output == "tokens":
        return [number for row in entry["token_embeddings"] for number in _numbers(row)]
    return _numbers(entry["embedding"])


def spread(ids: Sequence[int], weights: Sequence[float], size: int) -> list[float]:
    """Return the weights of some tokens as a vector of `size` numbers."""
    vector = [0.0] * size
    for number, weight in zip(ids, weights, strict=True):
        vector[number] = weight
    return vector


def decode(text: str) -> list[float]:
    """Decode base64 of little-endian float32 numbers."""
    numbers = array.array("f", base64.b64decode(text))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _numbers(value: Any) -> list[float]:
    return decode(value) if isinstance(value, str) else [float(number) for number in value]
