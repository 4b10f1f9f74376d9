"""Common clients against a real server: each gets the vectors of the reference implementation."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.conftest import TEXTS
from tests.processes import ServerProcess

pytestmark = pytest.mark.xdist_group("minilm")
Matrix = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def server(minilm_server: ServerProcess) -> ServerProcess:
    return minilm_server


@pytest.fixture(scope="module")
def reference(minilm_reference: dict[str, Any]) -> Matrix:
    rows = minilm_reference["embeddings"]
    return np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])


def same(got: Any, reference: Matrix) -> None:
    np.testing.assert_allclose(np.array(got, dtype=np.float32), reference, atol=2e-6)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_openai(server: ServerProcess, reference: Matrix, minilm_reference: dict[str, Any], encoding: Any) -> None:
    extra = {} if encoding is None else {"encoding_format": encoding}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.embeddings.create(model="minilm", input=TEXTS, **extra)
    assert (answer.object, answer.model) == ("list", "minilm")
    assert [(entry.index, entry.object) for entry in answer.data] == [(i, "embedding") for i in range(len(TEXTS))]
    assert answer.usage.total_tokens == sum(minilm_reference["tokens"])
    if encoding == "base64":
        # If the format is explicit, the client returns the text unchanged.
        same([np.frombuffer(base64.b64decode(str(entry.embedding)), "<f4") for entry in answer.data], reference)
    else:
        same([entry.embedding for entry in answer.data], reference)


def test_openai_dimensions(minilm: Path, tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    folder = tmp_path / "matryoshka"
    folder.mkdir()
    for name in ("tokenizer.json", "modules.json", "model.safetensors"):
        shutil.copy(minilm / name, folder)
    shutil.copytree(minilm / "1_Pooling", folder / "1_Pooling")
    config = json.loads((minilm / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [8, 2]}))
    server = serve("--model", str(folder), "--engine", "echo", "--name", "echo")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        full = np.float32(client.embeddings.create(model="echo", input=[5, 6]).data[0].embedding)
        cut = client.embeddings.create(model="echo", input=[5, 6], dimensions=2).data[0].embedding
        assert full[2] > 0.05  # else the cut would have length one by itself
        np.testing.assert_allclose(cut, full[:2] / np.linalg.norm(full[:2]), atol=1e-6)
        with pytest.raises(openai.BadRequestError, match="must be 8 or 2, got 5") as rejected:
            client.embeddings.create(model="echo", input=[5, 6], dimensions=5)
    assert (rejected.value.param, rejected.value.code) == ("dimensions", "invalid_dimensions")


def test_openai_raises_its_own_exceptions(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        assert client.models.list().data[0].id == "minilm"
        with pytest.raises(openai.NotFoundError, match="use 'minilm'") as unknown:
            client.embeddings.create(model="other", input="a")
        with pytest.raises(openai.BadRequestError, match="must be 384, got 128") as untrained:
            client.embeddings.create(model="minilm", input="a", dimensions=128)
        with pytest.raises(openai.BadRequestError) as empty:
            client.embeddings.create(model="minilm", input=[])
    errors = [unknown.value, untrained.value, empty.value]
    assert [e.code for e in errors] == ["model_not_found", "invalid_dimensions", "empty_input"]
    assert [e.param for e in errors] == ["model", "dimensions", "input"]
    assert {e.type for e in errors} == {"invalid_request_error"}


def test_langchain(server: ServerProcess, reference: Matrix) -> None:
    from langchain_openai import OpenAIEmbeddings

    # Without check_embedding_ctx_length=False it sends token ids of OpenAI's vocabulary, which are other words here.
    client = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="unused", model="minilm", check_embedding_ctx_length=False, max_retries=0
    )
    same(client.embed_documents(TEXTS), reference)
    same(client.embed_query(TEXTS[0]), reference[0])
    same(asyncio.run(client.aembed_documents(TEXTS)), reference)


def test_llama_index(server: ServerProcess, reference: Matrix) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    client = OpenAIEmbedding(model_name="minilm", api_base=f"{server.url}/v1", api_key="unused", max_retries=0)
    # It replaces line breaks by spaces. This tokenizer treats both the same.
    same(client.get_text_embedding_batch(TEXTS), reference)
    same(client.get_query_embedding(TEXTS[0]), reference[0])
    same(asyncio.run(client.aget_text_embedding_batch(TEXTS)), reference)
