"""The number formats of vectors, next to those of sentence-transformers, and over HTTP."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.bench.measure import quality
from inferctl.models import vector_format
from inferctl.serve.api import embeddings
from inferctl.serve.edge.errors import ApiError
from tests.processes import ServerProcess

DTYPES = {"float": "<f4", "float16": "<f2", "binary": "i1", "ubinary": "u1"}


def library(vectors: Any, wanted: str) -> Any:
    """Return what sentence-transformers makes of vectors; it has no float16, numpy has."""
    from sentence_transformers.util import quantize_embeddings

    if wanted == "float16":
        return vectors.astype(np.float16)
    precision: Any = "float32" if wanted == "float" else wanted
    return quantize_embeddings(vectors, precision)


@pytest.mark.parametrize("wanted", vector_format.FORMATS)
@pytest.mark.parametrize("dimensions", [1, 7, 8, 384])
def test_values_equal_those_of_sentence_transformers(wanted: Any, dimensions: int) -> None:
    vectors = np.random.default_rng(dimensions).normal(size=(200, dimensions)).astype(np.float32)
    vectors[0], vectors[1], vectors[2] = 0, 100, -100
    expected = library(vectors, wanted)
    found = vector_format.convert(vectors, wanted)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert vector_format.size(dimensions, wanted) == found[0].nbytes


@pytest.fixture(scope="module")
def server(minilm: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module("--model", str(minilm), "--name", "m")


@pytest.mark.parametrize("wanted", vector_format.FORMATS)
@pytest.mark.parametrize("texts", [["a"], [f"text {n}" for n in range(70)]])
def test_a_response_has_the_format_that_the_request_names(server: ServerProcess, wanted: Any, texts: list[str]) -> None:
    def rows(**options: str) -> Any:
        return [row["embedding"] for row in server.embed(input=texts, **options).raise_for_status().json()["data"]]

    vectors = np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in rows(encoding_format="base64")])
    expected = library(vectors, wanted)
    found = np.array(rows(output_dtype=wanted), DTYPES[wanted])
    binary = [
        np.frombuffer(base64.b64decode(row), DTYPES[wanted])
        for row in rows(output_dtype=wanted, encoding_format="base64")
    ]
    if wanted.startswith("float"):  # texts are batched in other ways, which changes the last bits
        assert np.allclose(found, expected, atol=1e-3)
        assert np.allclose(binary, expected, atol=1e-3)
        return
    # A value next to zero may be on the other side.
    for each in (found, np.array(binary)):
        assert np.mean(each == expected) > 0.99


def test_a_format_that_the_server_does_not_have_is_rejected(server: ServerProcess) -> None:
    assert server.get("/info").json()["model"]["output_dtypes"] == list(vector_format.FORMATS)
    for wanted in ("int8", "int4"):
        error = server.embed(input=[5], output_dtype=wanted).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "output_dtype")


def test_numbers_beyond_float16_are_rejected() -> None:
    embeddings.check_range(np.array([[1e6]], np.float32), "float")
    embeddings.check_range(np.array([[-65504, 1]], np.float32), "float16")
    with pytest.raises(ApiError):
        embeddings.check_range(np.array([[1, -1e6]], np.float32), "float16")


def test_the_distance_of_bits_is_the_number_of_different_ones() -> None:
    vectors = np.random.default_rng(3).normal(size=(40, 12)).astype(np.float32)
    bits = vectors > 0
    distance = np.array([[np.sum(a != b) for b in bits] for a in bits], float)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :10]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(nearest.tolist(), expected.tolist(), strict=True)])
    found = {row["output_dtype"]: row for row in quality.compact(vectors, vectors)}
    assert found["ubinary"]["recall_at_10"] == pytest.approx(shared, abs=1e-4)
    assert found["ubinary"]["bytes"] == 2
