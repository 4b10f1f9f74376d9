"""Clients of other APIs, unchanged, against a real server: each gets the vectors of the reference implementation."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from tests.processes import CLIENT, ServerProcess
from tests.serve.conftest import TEXTS

pytestmark = pytest.mark.xdist_group("minilm")


@pytest.fixture(scope="module")
def reference(minilm_reference: dict[str, Any]) -> Any:
    return np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in minilm_reference["embeddings"]])


def same(got: Any, reference: Any) -> None:
    np.testing.assert_allclose(np.array(got, dtype=np.float32), reference, atol=2e-6)


def test_cohere(minilm_server: ServerProcess, reference: Any) -> None:
    import cohere

    client = cohere.ClientV2(api_key="unused", base_url=minilm_server.url)
    kinds: Any = ["float", "binary", "ubinary", "base64"]
    found = client.embed(model="minilm", texts=TEXTS, input_type="search_document", embedding_types=kinds)
    assert (found.response_type, found.texts) == ("embeddings_by_type", TEXTS)
    embeddings: Any = found.embeddings
    same(embeddings.float_, reference)
    same([np.frombuffer(base64.b64decode(row), "<f4") for row in embeddings.base64], reference)
    bits = np.packbits(reference > 0, axis=1)
    assert np.array_equal(embeddings.ubinary, bits)
    assert np.array_equal(embeddings.binary, bits.astype(int) - 128)
    assert embeddings.int8 is None
    plain: Any = client.embed(model="minilm", texts=TEXTS[:1], input_type="search_query").embeddings
    same(plain.float_, reference[:1])
    with pytest.raises(cohere.NotFoundError, match="this server serves 'minilm'"):
        client.embed(model="other", texts=TEXTS, input_type="search_query")
    for wrong in ({"embedding_types": ["int8"]}, {"output_dimension": 5}, {"truncate": "NONE", "texts": ["a " * 999]}):
        asked: Any = {"model": "minilm", "texts": TEXTS, "input_type": "search_query"} | wrong
        with pytest.raises(cohere.BadRequestError) as rejected:
            client.embed(**asked)
        assert list(rejected.value.body) == ["message"]
        assert "dimensions` of" not in rejected.value.body["message"]


def test_voyage(minilm_server: ServerProcess, reference: Any) -> None:
    import voyageai

    client = voyageai.Client(api_key="unused", base_url=f"{minilm_server.url}/voyage")
    found = client.embed(TEXTS, model="minilm", input_type="document")
    same(found.embeddings, reference)
    assert found.total_tokens > 0
    bits = client.embed(TEXTS, model="minilm", output_dtype="ubinary").embeddings
    assert np.array_equal(bits, np.packbits(reference > 0, axis=1))
    with pytest.raises(voyageai.error.InvalidRequestError, match="must be 384, got 5"):
        client.embed(TEXTS, model="minilm", output_dimension=5)
    with pytest.raises(voyageai.error.InvalidRequestError, match="more than"):
        client.embed(["a " * 999], model="minilm", truncation=False)


def test_llama_index_for_text_embeddings_inference(minilm_server: ServerProcess, reference: Any) -> None:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    client = TextEmbeddingsInference(model_name="minilm", base_url=minilm_server.url, text_instruction=" ")
    # It puts an instruction before each text, and strips both.
    same(client.get_text_embedding_batch(TEXTS), reference)


def test_hugging_face(minilm_server: ServerProcess, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient, constants
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client = InferenceClient(model=minilm_server.url)
    same(client.feature_extraction(TEXTS[0]), reference[:1])
    with pytest.raises(HfHubHTTPError):
        client.feature_extraction("a " * 999, truncate=False)


PAIR = {"source_sentence": "a", "sentences": ["b"]}
LONG_PAIR = {"source_sentence": "a", "sentences": ["b " * 999]}


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/embed", {"inputs": []}, 400, "inputs"),
        ("/embed", {"inputs": ["a", ""]}, 400, "inputs"),
        ("/embed", {"inputs": "a", "normalize": False}, 400, "normalize"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, 400, "truncation_direction"),
        ("/embed", {"inputs": ["a " * 999], "truncate": False}, 400, "inputs[0]"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "inputs"),
        ("/similarity", {"inputs": {"sentences": ["a"]}}, 400, "inputs"),
        ("/predict", {"inputs": "a"}, 404, "task is embed"),
        ("/", {"inputs": 5}, 400, "inputs"),
        ("/similarity", {"inputs": PAIR, "parameters": {"prompt_name": "no"}}, 400, "prompt"),
        ("/similarity", {"inputs": LONG_PAIR, "parameters": {"truncate": False}}, 400, "inputs[1]"),
        ("/embed", {"inputs": "a", "dimensions": 5}, 400, "dimensions"),
    ],
)
def test_errors_of_text_embeddings_inference(
    minilm_server: ServerProcess, path: str, body: object, status: int, field: str
) -> None:
    found = CLIENT.post(f"{minilm_server.url}{path}", json=body)
    assert found.status_code == status
    assert set(found.json()) == {"error", "error_type"}
    assert field in found.json()["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a", "embed_dtype": "float16"}),
        ("/v1/embeddings", {"input": "a", "endianness": "big"}),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 10}),
        ("/v1/embeddings", {"input": "a", "add_special_tokens": False}),
        ("/v2/embed", {"texts": ["a"], "max_tokens": 5}),
        ("/v2/embed", {"texts": ["a"], "images": ["data:"]}),
    ],
)
def test_fields_of_others_that_would_change_the_response_are_rejected(
    minilm_server: ServerProcess, path: str, body: dict[str, object]
) -> None:
    found = CLIENT.post(f"{minilm_server.url}{path}", json=body)
    assert found.status_code == 400
    assert "is not supported" in found.text
    name = next(name for name in body if name not in ("input", "texts"))
    assert CLIENT.post(f"{minilm_server.url}{path}", json=body | {name: None}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "keys"),
    [
        ("GET", "/embed", {"error", "error_type"}),
        ("GET", "/v2/embed", {"message"}),
        ("GET", "/voyage/embeddings", {"detail"}),
        ("POST", "/voyage/contextualizedembeddings", {"detail"}),
        ("POST", "/v2/chat", {"message"}),
        ("POST", "/v1/unknown", {"error"}),
    ],
)
def test_errors_of_unknown_paths_and_methods_have_the_shape_of_the_api(
    minilm_server: ServerProcess, method: str, path: str, keys: set[str]
) -> None:
    found = CLIENT.request(method, f"{minilm_server.url}{path}")
    assert found.status_code in (404, 405)
    assert set(found.json()) == keys


def test_the_names_of_operations_are_unique(minilm_server: ServerProcess) -> None:
    paths = minilm_server.get("/openapi.json").json()["paths"]
    names = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_vectors_of_text_embeddings_inference(minilm_server: ServerProcess, reference: Any) -> None:
    def post(path: str, body: object) -> httpx.Response:
        return CLIENT.post(f"{minilm_server.url}{path}", json=body).raise_for_status()

    for path in ("/embed", "/"):
        same(post(path, {"inputs": TEXTS}).json(), reference)
        same(post(path, {"inputs": TEXTS[0]}).json(), reference[:1])
    cosines = post("/similarity", {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}}).json()
    same(cosines, reference[1:] @ reference[0])
    assert minilm_server.get("/").json()["name"] == "minilm"  # the page remains
