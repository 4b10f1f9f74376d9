"""The server with the real model, used by common clients."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.serve.conftest import Running, start, stop

TEXTS = [
    "Which river flows through Vienna?",
    "The Danube flows through Vienna.",
    "int main(void) { return 0; }",
    "ok",
    "naïve café, 北京, 🚀 " * 30,
    "a long text that will be truncated " * 100,
]


@pytest.fixture(scope="module")
def server(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(
        tmp_path_factory.mktemp("minilm"), "--model", str(minilm), "--precision", "fp32", "--name", "minilm"
    )
    yield running
    stop(running)


@pytest.fixture(scope="module")
def reference(minilm: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "inferctl.serve.reference", str(minilm)]
    done = subprocess.run(command, input=json.dumps(TEXTS).encode(), capture_output=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def expected(reference: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in reference["embeddings"]])


def test_the_official_client_gets_the_reference_vectors(server: Running, reference: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    answer = client.embeddings.create(model="minilm", input=TEXTS)
    got = np.array([entry.embedding for entry in answer.data])
    np.testing.assert_allclose(got, expected(reference), atol=2e-6)
    assert answer.usage.total_tokens == sum(reference["tokens"])
    assert client.models.list().data[0].id == "minilm"


def test_floats_and_base64_are_the_same_numbers(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    floats = client.embeddings.create(model="minilm", input=TEXTS[0], encoding_format="float")
    packed = client.embeddings.create(model="minilm", input=TEXTS[0])
    assert np.float32(floats.data[0].embedding).tolist() == np.float32(packed.data[0].embedding).tolist()


def test_the_asynchronous_client_gets_each_response_for_its_request(server: Running, reference: dict[str, Any]) -> None:
    async def run() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            calls = [client.embeddings.create(model="minilm", input=text) for text in TEXTS * 8]
            return [answer.data[0].embedding for answer in await asyncio.gather(*calls)]

    got = np.array(asyncio.run(run()))
    np.testing.assert_allclose(got, np.tile(expected(reference), (8, 1)), atol=2e-6)


def test_the_client_raises_its_own_exceptions(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="this server serves 'minilm'"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="must be 384, got 100"):
        client.embeddings.create(model="minilm", input="a", dimensions=100)


def test_info_describes_the_engine(server: Running, reference: dict[str, Any]) -> None:
    info = server.get("/info").json()
    assert info["model"]["sha256"] == reference["model_sha256"]
    assert (info["model"]["dimensions"], info["model"]["max_tokens"]) == (384, 256)
    assert (info["model"]["pooling"], info["model"]["normalize"]) == ("mean", True)
    assert (info["precision"]["effective"], info["precision"]["level"]) == ("fp32", "native")
    assert info["attention"] == "packed"
    assert info["fidelity"]["cosine_min"] > 0.99999
    assert info["device"]["hardware"] == "cpu"
    assert info["ready_seconds"] > 0


def test_token_ids_and_their_text_give_equal_vectors(server: Running, minilm: Path) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    ids.no_padding()
    by_ids = server.embed(input=[ids.encode(TEXTS[0]).ids]).json()["data"][0]["embedding"]
    by_text = server.embed(input=TEXTS[0]).json()["data"][0]["embedding"]
    assert by_ids == pytest.approx(by_text, abs=2e-6)


def test_a_large_request_runs_in_several_batches(server: Running) -> None:
    words = [f"text number {i} about rivers" for i in range(600)]
    answer = server.embed(input=words, encoding_format="base64")
    assert len(answer.json()["data"]) == 600
    alone = server.embed(input=words[599], encoding_format="base64").json()["data"][0]["embedding"]
    a, b = (np.frombuffer(base64.b64decode(text), "<f4") for text in (answer.json()["data"][599]["embedding"], alone))
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_model_folder_with_incomplete_weights_is_rejected(minilm: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "modules.json"):
        (broken / name).write_bytes((minilm / name).read_bytes())
    (broken / "model.safetensors").write_bytes((minilm / "model.safetensors").read_bytes()[:-100])
    command = [sys.executable, "-m", "inferctl", "serve", "--model", str(broken), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2
    assert "is not a complete safetensors file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stdin", ["", "{}", "[]", "[1]"])
def test_the_reference_accepts_only_a_list_of_texts(minilm: Path, stdin: str) -> None:
    command = [sys.executable, "-m", "inferctl.serve.reference", str(minilm)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hint:" in done.stderr
    assert done.stdout == ""
