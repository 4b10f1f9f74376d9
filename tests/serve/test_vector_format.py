"""The number formats of vectors, next to those of sentence-transformers, and over HTTP."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from inferctl import cli
from inferctl.bench.measure import quality
from inferctl.core.errors import UsageError
from inferctl.models import vector_format
from inferctl.models.model import ModelFolder
from inferctl.models.vector_format import Ranges
from inferctl.serve.api import embedding_schemas
from inferctl.serve.edge.errors import ApiError
from tests.processes import ServerProcess, start

DTYPES = {"float": "<f4", "float16": "<f2", "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}


def library(vectors: Any, wanted: str, ranges: Ranges) -> Any:
    """Return what sentence-transformers makes of vectors; it has no float16, numpy has."""
    from sentence_transformers.util import quantize_embeddings

    if wanted == "float16":
        return vectors.astype(np.float16)
    precision: Any = "float32" if wanted == "float" else wanted
    return quantize_embeddings(vectors, precision, ranges=np.stack([ranges.low, ranges.high]))


@pytest.mark.parametrize("wanted", vector_format.FORMATS)
@pytest.mark.parametrize("dimensions", [1, 7, 8, 384])
def test_values_equal_those_of_sentence_transformers(wanted: Any, dimensions: int) -> None:
    random = np.random.default_rng(dimensions)
    known, vectors = random.normal(size=(2, 200, dimensions)).astype(np.float32)
    known[:, 0] = 0.5  # a dimension that never changes
    vectors[0], vectors[1], vectors[2] = 0, 100, -100  # and values out of the ranges
    vectors[3:5, :] = known.min(axis=0), known.max(axis=0)
    ranges = Ranges.of(known)
    expected = library(vectors, wanted, ranges)
    found = vector_format.convert(vectors, wanted, ranges)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert vector_format.size(dimensions, wanted) == found[0].nbytes


@pytest.fixture(scope="module")
def calibrated(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MiniLM with ranges of 384 dimensions, of random vectors."""
    folder = tmp_path_factory.mktemp("calibrated") / "minilm"
    shutil.copytree(minilm, folder, copy_function=os.link)
    vectors = np.random.default_rng(1).uniform(-0.1, 0.1, (100, 384)).astype(np.float32)
    plain = ModelFolder(folder).digest
    vector_format.write(folder, plain, {384: Ranges.of(vectors)}, {"texts": 100})
    assert ModelFolder(folder).digest == plain  # they change no vector
    assert vector_format.read(folder, lambda: plain)[384].low.tolist() == vectors.min(axis=0).tolist()
    return folder


@pytest.fixture(scope="module")
def server(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    found = start(tmp_path_factory.mktemp("server"), "--model", str(calibrated), "--name", "m")
    yield found
    found.kill()


@pytest.mark.parametrize("wanted", vector_format.FORMATS)
@pytest.mark.parametrize("texts", [["a"], [f"text {n}" for n in range(70)]])
def test_a_response_has_the_format_that_the_request_names(
    server: ServerProcess, calibrated: Path, wanted: Any, texts: list[str]
) -> None:
    def rows(**options: str) -> Any:
        return [row["embedding"] for row in server.embed(input=texts, **options).raise_for_status().json()["data"]]

    vectors = np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in rows(encoding_format="base64")])
    expected = library(vectors, wanted, vector_format.read(calibrated)[384])
    found = np.array(rows(output_dtype=wanted), DTYPES[wanted])
    binary = [
        np.frombuffer(base64.b64decode(row), DTYPES[wanted])
        for row in rows(output_dtype=wanted, encoding_format="base64")
    ]
    if wanted.startswith("float"):  # texts are batched in other ways, which changes the last bits
        assert np.allclose(found, expected, atol=1e-3)
        assert np.allclose(binary, expected, atol=1e-3)
        return
    # A value next to the edge of a step or to zero may be on the other side.
    for each in (found, np.array(binary)):
        assert np.mean(each == expected) > 0.99
    assert server.get("/info").json()["model"]["calibrated_dimensions"] == [384]


def test_int8_needs_ranges_of_these_dimensions_and_weights(
    minilm: Path, calibrated: Path, serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    plain = serve("--model", str(minilm), "--engine", "echo")
    for wanted in ("int8", "uint8"):
        error = plain.embed(input=[5], output_dtype=wanted).json()["error"]
        assert (error["code"], error["param"]) == ("not_calibrated", "output_dtype")
    assert plain.embed(input=[5], output_dtype="binary").status_code == 200
    assert plain.embed(input=[5], output_dtype="int4").status_code == 400
    assert "int8" not in plain.get("/info").json()["model"]["output_dtypes"]
    other = tmp_path / "other"
    shutil.copytree(calibrated, other)
    (other / "config_sentence_transformers.json").write_text("{}")
    failed = ServerProcess.launch(tmp_path, "inferctl", "serve", "--model", str(other), "--port", "0", name="other")
    assert failed.process.wait(60) == 2
    assert "other weights" in failed.log.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "x"},
        {"ranges": {"384": {"min": [0.0], "max": [1.0]}}},
        {"ranges": {"2": {"min": [0.0, 1.0], "max": [1.0, 0.0]}}},
        {"ranges": {"1": {"min": [float("nan")], "max": [1.0]}}},
        {"ranges": {"1": {"min": "x", "max": [1.0]}}},
        {"ranges": []},
        None,
    ],
)
def test_a_file_of_ranges_that_cannot_be_used_is_rejected(calibrated: Path, tmp_path: Path, change: Any) -> None:
    found = json.loads((calibrated / "vector_ranges.json").read_text())
    (tmp_path / "vector_ranges.json").write_text(json.dumps(None if change is None else found | change))
    with pytest.raises(UsageError):
        vector_format.read(tmp_path)


def test_numbers_beyond_float16_are_rejected() -> None:
    embedding_schemas.check_range(np.array([[1e6]], np.float32), "float")
    embedding_schemas.check_range(np.array([[-65504, 1]], np.float32), "float16")
    with pytest.raises(ApiError):
        embedding_schemas.check_range(np.array([[1, -1e6]], np.float32), "float16")


def test_calibrate_writes_ranges_that_contain_all_vectors_and_shows_the_loss(minilm: Path, tmp_path: Path) -> None:
    folder, texts = tmp_path / "minilm", tmp_path / "texts.txt"
    shutil.copytree(minilm, folder, copy_function=os.link)
    texts.write_text("\n".join(f"a text about {n} rivers and {n % 7} towns" for n in range(120)))
    done = CliRunner().invoke(cli.app, ["calibrate", str(folder), str(texts), "--precision", "fp32", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    losses = {row["output_dtype"]: row for row in document["loss"]["384"]}
    assert losses["float"]["recall_at_10"] == 1
    assert losses["ubinary"]["bytes"] == 48
    assert 0 < losses["ubinary"]["recall_at_10"] <= losses["float16"]["recall_at_10"] <= 1
    found = vector_format.read(folder, lambda: ModelFolder(folder).digest)[384]
    assert (found.low < found.high).all()
    texts.write_text("one\ntwo\n")
    few = CliRunner().invoke(cli.app, ["calibrate", str(folder), str(texts)])
    assert isinstance(few.exception, UsageError)


def test_calibrate_keeps_the_ranges_of_other_dimensions_and_replaces_those_of_other_weights(
    minilm: Path, tmp_path: Path
) -> None:
    folder, texts = tmp_path / "minilm", tmp_path / "texts.txt"
    shutil.copytree(minilm, folder, copy_function=os.link)
    texts.write_text("\n".join(f"{n} rivers" for n in range(100)))
    vectors = np.random.default_rng(1).normal(size=(9, 384)).astype(np.float32)
    digest = ModelFolder(folder).digest
    for known, kept in ((digest, [128, 384]), ("another", [384])):
        vector_format.write(folder, known, {size: Ranges.of(vectors[:, :size]) for size in (128, 384)}, {})
        done = CliRunner().invoke(cli.app, ["calibrate", str(folder), str(texts), "--precision", "fp32"])
        assert done.exit_code == 0, done.output
        found = vector_format.read(folder, lambda: digest)
        assert sorted(found) == kept
        assert not np.array_equal(found[384].low, vectors.min(axis=0))


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
    found = {row["output_dtype"]: row for row in quality.compact(vectors, vectors, Ranges.of(vectors))}
    assert found["ubinary"]["recall_at_10"] == pytest.approx(shared, abs=1e-4)
    assert found["ubinary"]["bytes"] == 2
