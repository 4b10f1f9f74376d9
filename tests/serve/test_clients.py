"""Common clients, unchanged, against a real server: each gets the vectors of the reference implementation."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

from tests.conftest import TEXTS
from tests.processes import CLIENT, ServerProcess

SPACE, OTHER_SPACE = "x-inferctl-space", "dense_0123456789abcdef"
VARIANTS: list[dict[str, Any]] = [
    {},
    {"normalized": True},
    {"dimensions": 8},
    {"dimensions": 8, "normalized": False},
    {"dimensions": 2},
]


@pytest.fixture(scope="module")
def reference(minilm_reference: dict[str, Any]) -> Any:
    return np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in minilm_reference["embeddings"]])


def same(got: Any, reference: Any) -> None:
    np.testing.assert_allclose(np.array(got, dtype=np.float32), reference, atol=2e-6)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_openai(minilm_server: ServerProcess, reference: Any, minilm_reference: dict[str, Any], encoding: Any) -> None:
    extra = {} if encoding is None else {"encoding_format": encoding}
    with openai.OpenAI(base_url=f"{minilm_server.url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.embeddings.create(model="minilm", input=TEXTS, **extra)
    assert (answer.object, answer.model) == ("list", "minilm")
    assert [(entry.index, entry.object) for entry in answer.data] == [(i, "embedding") for i in range(len(TEXTS))]
    assert answer.usage.total_tokens == sum(minilm_reference["tokens"])
    if encoding == "base64":
        # If the format is explicit, the client returns the text unchanged.
        same([np.frombuffer(base64.b64decode(str(entry.embedding)), "<f4") for entry in answer.data], reference)
    else:
        same([entry.embedding for entry in answer.data], reference)


def test_openai_raises_its_own_exceptions(minilm_server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{minilm_server.url}/v1", api_key="unused", max_retries=0) as client:
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


def test_langchain(minilm_server: ServerProcess, reference: Any) -> None:
    from langchain_openai import OpenAIEmbeddings

    # Without check_embedding_ctx_length=False it sends token ids of OpenAI's vocabulary, which are other words here.
    client = OpenAIEmbeddings(
        base_url=f"{minilm_server.url}/v1",
        api_key="unused",
        model="minilm",
        check_embedding_ctx_length=False,
        max_retries=0,
    )
    same(client.embed_documents(TEXTS), reference)
    same(client.embed_query(TEXTS[0]), reference[0])
    same(asyncio.run(client.aembed_documents(TEXTS)), reference)


def test_llama_index(minilm_server: ServerProcess, reference: Any) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    client = OpenAIEmbedding(model_name="minilm", api_base=f"{minilm_server.url}/v1", api_key="unused", max_retries=0)
    # It replaces line breaks by spaces. This tokenizer treats both the same.
    same(client.get_text_embedding_batch(TEXTS), reference)
    same(client.get_query_embedding(TEXTS[0]), reference[0])
    same(asyncio.run(client.aget_text_embedding_batch(TEXTS)), reference)


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
    with pytest.raises(cohere.NotFoundError, match="use 'minilm'"):
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


def test_haystack(minilm_server: ServerProcess, reference: Any) -> None:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.cohere import CohereDocumentEmbedder, CohereTextEmbedder
    from haystack_integrations.components.embedders.jina import JinaDocumentEmbedder, JinaTextEmbedder

    url, options = minilm_server.url, {"api_key": Secret.from_token("unused"), "model": "minilm"}
    openai, cohere = {"api_base_url": f"{url}/v1", **options}, {"api_base_url": url, **options}
    jina = {"base_url": f"{url}/jina/v1/embeddings", **options}
    embedders: list[tuple[Any, Any]] = [
        (OpenAITextEmbedder(**openai), OpenAIDocumentEmbedder(progress_bar=False, **openai)),
        (CohereTextEmbedder(**cohere), CohereDocumentEmbedder(progress_bar=False, **cohere)),
        (JinaTextEmbedder(task="retrieval.query", **jina), JinaDocumentEmbedder(progress_bar=False, **jina)),
    ]
    texts = [TEXTS[0], *TEXTS[2:]]  # Cohere's embedder removes line breaks
    for text, documents in embedders:
        same([text.run(text=TEXTS[0])["embedding"]], reference[:1])
        found = documents.run(documents=[Document(content=each) for each in texts])["documents"]
        same([document.embedding for document in found], reference[[0, *range(2, len(TEXTS))]])
    with pytest.raises(RuntimeError, match="late_chunking is not supported"):
        JinaTextEmbedder(late_chunking=True, **jina).run(text="a")


def test_the_first_version_of_cohere(minilm_server: ServerProcess, reference: Any) -> None:
    """`CohereEmbeddings` of LangChain uses it."""
    body: dict[str, object] = {"texts": TEXTS, "input_type": "search_document"}
    plain = minilm_server.post("/v1/embed", body).raise_for_status().json()
    assert (plain["response_type"], plain["texts"]) == ("embeddings_floats", TEXTS)
    same(plain["embeddings"], reference)
    body["embedding_types"] = ["float", "ubinary"]
    typed = minilm_server.post("/v1/embed", body).raise_for_status().json()
    assert (typed["response_type"], typed["meta"]["api_version"]) == ("embeddings_by_type", {"version": "1"})
    same(typed["embeddings"]["float"], reference)


PAIR = {"source_sentence": "a", "sentences": ["b"]}
LONG_PAIR = {"source_sentence": "a", "sentences": ["b " * 999]}


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/embed", {"inputs": []}, 400, "inputs"),
        ("/embed", {"inputs": ["a", ""]}, 400, "inputs"),
        ("/embed", {"inputs": "a", "normalize": False}, 400, "normalize"),
        ("/embed", {"inputs": "a", "truncation_direction": "Up"}, 400, "truncation_direction"),
        ("/tokenize", {}, 400, "inputs"),
        ("/tokenize", {"inputs": []}, 400, "inputs"),
        ("/tokenize", {"inputs": ["a", 1]}, 400, "inputs"),
        ("/tokenize", {"inputs": "a", "prompt_name": "no"}, 400, "prompt_name"),
        ("/tokenize", {"inputs": "a " * 200_000}, 400, "inputs"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, 400, "return_token_strs"),
        ("/embed", {"inputs": ["a " * 999], "truncate": False}, 400, "inputs[0]"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "inputs"),
        ("/similarity", {"inputs": {"sentences": ["a"]}}, 400, "inputs"),
        ("/predict", {"inputs": "a"}, 404, "is for embed"),
        ("/", {"inputs": 5}, 400, "inputs"),
        ("/similarity", {"inputs": PAIR, "parameters": {"prompt_name": "no"}}, 400, "prompt"),
        ("/similarity", {"inputs": LONG_PAIR, "parameters": {"truncate": False}}, 400, "inputs[1]"),
        ("/embed", {"inputs": "a", "dimensions": 5}, 400, "dimensions"),
    ],
)
def test_errors_of_text_embeddings_inference(
    minilm_server: ServerProcess, path: str, body: object, status: int, field: str
) -> None:
    found = minilm_server.post(path, body)
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
        ("/v1/embeddings", {"input": "a", "late_chunking": True}),
        ("/v1/embeddings", {"input": "a", "return_multivector": True}),
        ("/v2/embed", {"texts": ["a"], "max_tokens": 5}),
        ("/v2/embed", {"texts": ["a"], "images": ["data:"]}),
    ],
)
def test_fields_of_others_that_would_change_the_response_are_rejected(
    minilm_server: ServerProcess, path: str, body: dict[str, object]
) -> None:
    found = minilm_server.post(path, body)
    assert found.status_code == 400
    assert "is not supported" in found.text
    name = next(name for name in body if name not in ("input", "texts"))
    assert minilm_server.post(path, body | {name: None}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "keys"),
    [
        ("GET", "/embed", {"error", "error_type"}),
        ("GET", "/v2/embed", {"message"}),
        ("GET", "/voyage/embeddings", {"detail"}),
        ("POST", "/voyage/contextualizedembeddings", {"detail"}),
        ("POST", "/jina/v1/embeddings", {"detail"}),
        ("POST", "/v2/chat", {"message"}),
        ("POST", "/v1/unknown", {"error"}),
    ],
)
def test_errors_of_unknown_paths_and_methods_have_the_shape_of_the_api(
    minilm_server: ServerProcess, method: str, path: str, keys: set[str]
) -> None:
    found = CLIENT.request(method, f"{minilm_server.url}{path}")
    assert found.status_code in (400, 404, 405)
    assert set(found.json()) == keys


def test_the_names_of_operations_are_unique(minilm_server: ServerProcess) -> None:
    paths = minilm_server.get("/openapi.json").json()["paths"]
    names = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_vectors_of_text_embeddings_inference(minilm_server: ServerProcess, reference: Any) -> None:
    for path in ("/embed", "/"):
        same(minilm_server.post(path, {"inputs": TEXTS}).json(), reference)
        same(minilm_server.post(path, {"inputs": TEXTS[0]}).json(), reference[:1])
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}}
    cosines = minilm_server.post("/similarity", body).json()
    same(cosines, reference[1:] @ reference[0])
    assert minilm_server.get("/").json()["name"] == "minilm"  # the page remains


def test_fields_of_jina(minilm_server: ServerProcess, reference: Any) -> None:
    def embeddings(**fields: object) -> list[Any]:
        answer = minilm_server.embed(input=TEXTS, **fields).raise_for_status().json()
        assert set(answer) == {"object", "data", "model", "usage"}
        return [entry["embedding"] for entry in answer["data"]]

    bits = np.packbits(reference > 0, axis=1)
    for task in ("retrieval.query", "retrieval.passage", "text-matching", "classification", "separation"):
        same(embeddings(task=task, normalized=True, late_chunking=False, embedding_type="float"), reference)
    packed = embeddings(embedding_type=["base64"], output_dtype="ubinary")
    same([np.frombuffer(base64.b64decode(row), "<f4") for row in packed], reference)
    assert np.array_equal(embeddings(embedding_type="ubinary", encoding_format="base64"), bits)
    assert np.array_equal(embeddings(embedding_type="binary"), bits.astype(int) - 128)
    for name, value in (("embedding_type", ["float", "binary"]), ("normalized", False), ("task", "unknown")):
        rejected = minilm_server.embed(input=TEXTS, **{name: value})
        assert rejected.status_code == 400
        assert rejected.json()["error"]["param"] == {"task": "input_type"}.get(name, name)


def test_pooling_of_vllm(minilm_server: ServerProcess, reference: Any) -> None:
    answer = minilm_server.post("/pooling", {"input": TEXTS, "task": "embed"}).raise_for_status()
    body = answer.json()
    assert (body["id"], body["object"], body["model"]) == (answer.headers["x-request-id"], "list", "minilm")
    assert [(entry["index"], entry["object"]) for entry in body["data"]] == [(i, "pooling") for i in range(len(TEXTS))]
    same([entry["data"] for entry in body["data"]], reference)
    packed = minilm_server.post("/pooling", {"input": TEXTS[0], "encoding_format": "base64"}).json()
    same([np.frombuffer(base64.b64decode(packed["data"][0]["data"]), "<f4")], reference[:1])
    each = {"input": "ok", "task": "token_embed"}
    (entry,) = minilm_server.post("/pooling", each).raise_for_status().json()["data"]
    own = minilm_server.post("/v1/embeddings", {"input": "ok", "outputs": ["tokens"]}).json()["data"]
    assert entry["data"] == own[0]["token_embeddings"]


def test_tokens_of_text_embeddings_inference_and_of_vllm(minilm_server: ServerProcess, minilm: Path) -> None:
    def post(**body: object) -> Any:
        return minilm_server.post("/tokenize", body).raise_for_status().json()

    oracle = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    oracle.no_padding()
    oracle.no_truncation()
    rows = post(inputs=TEXTS)
    assert [[token["id"] for token in row] for row in rows] == [oracle.encode(text).ids for text in TEXTS]
    assert rows[3] == [
        {"id": 101, "text": "[CLS]", "special": True, "start": None, "stop": None},
        {"id": 7929, "text": "ok", "special": False, "start": 0, "stop": 2},
        {"id": 102, "text": "[SEP]", "special": True, "start": None, "stop": None},
    ]
    assert post(inputs=["", "ok"], add_special_tokens=False) == [[], rows[3][1:2]]
    long = "ok 北京 " * 5_000  # more tokens than fit in one part of the response
    assert [token["id"] for token in post(inputs=long)[0]] == oracle.encode(long).ids
    assert post(prompt="ok", model="minilm") == {"count": 3, "max_model_len": 256, "tokens": [101, 7929, 102]}
    assert post(prompt="ok", add_special_tokens=False)["tokens"] == [7929]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": "{text}", "truncation_direction": "Left"}),
        ("/v1/embeddings", {"input": "{text}", "truncation_side": "left"}),
        ("/v2/embed", {"texts": ["{text}"], "truncate": "START"}),
    ],
)
def test_long_texts_lose_their_start_if_asked(minilm_server: ServerProcess, path: str, body: dict[str, Any]) -> None:
    """The vector is that of the last 254 tokens."""

    def vector(text: str) -> Any:
        filled = json.loads(json.dumps(body).replace("{text}", text))
        found = minilm_server.post(path, filled).raise_for_status().json()
        if path == "/v2/embed":
            return found["embeddings"]["float"][0]
        return found[0] if path == "/embed" else found["data"][0]["embedding"]

    end = "river " * 100 + "mountain " * 154
    same(vector("city " * 300 + end), vector(end))
    same(vector("short"), minilm_server.embed(input="short").json()["data"][0]["embedding"])


def test_token_ids_lose_their_start_if_asked(minilm_server: ServerProcess) -> None:
    ids = [1000 + n for n in range(400)]
    found = minilm_server.embed(input=[ids, ids[-256:]], truncation_side="left").json()["data"]
    same(found[0]["embedding"], found[1]["embedding"])


def test_info_has_the_fields_of_text_embeddings_inference(minilm_server: ServerProcess) -> None:
    info = minilm_server.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    expected = {"model_dtype": "float32", "max_input_length": 256, "max_client_batch_size": 2048, "auto_truncate": True}
    assert {name: info[name] for name in expected} == expected
    assert info["model_id"] == info["model"]["source"]


def test_vectors_of_a_model_that_does_not_normalize_are_normalized_if_asked(
    tiny: Callable[..., Path], serve: Callable[..., ServerProcess]
) -> None:
    folder = tiny("bert", "mean_tokens", False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [8, 2]}))
    server = serve("--model", str(folder), "--precision", "fp32")

    def vectors(path: str, **fields: object) -> Any:
        name = "inputs" if path == "/embed" else "input"
        found = server.post(path, {name: TEXTS[:2], **fields}).raise_for_status().json()
        return np.array(found if path == "/embed" else [each["embedding"] for each in found["data"]], np.float32)

    def unit(rows: Any) -> Any:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    raw = vectors("/v1/embeddings")
    assert abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
    for name in ("normalized", "use_activation"):
        same(vectors("/v1/embeddings", **{name: True}), unit(raw))
        same(vectors("/v1/embeddings", **{name: False}), raw)
        same(vectors("/v1/embeddings", dimensions=8, **{name: False}), raw[:, :8])
        same(vectors("/v1/embeddings", dimensions=8, **{name: True}), unit(raw[:, :8]))
    for dimensions in (8, 2):
        same(vectors("/v1/embeddings", dimensions=dimensions), unit(raw[:, :dimensions]))
    rejected = server.embed(input="a", dimensions=5)
    assert rejected.status_code == 400 and "must be 8 or 2, got 5" in rejected.text
    names = [server.embed(input="a", **how).headers[SPACE] for how in VARIANTS]
    assert len(set(names)) == len(VARIANTS)
    assert names[2] == server.embed(input="a", dimensions=8, normalized=True).headers[SPACE]
    for name, how in zip(names, VARIANTS, strict=True):
        statuses = [server.post("/v1/embeddings", {"input": "a", **how}, **{SPACE: each}).status_code for each in names]
        assert statuses == [200 if each == name else 412 for each in names]
    same(vectors("/embed"), unit(raw))
    same(vectors("/embed", normalize=False), raw)
    same(vectors("/embed", dimensions=8), unit(raw[:, :8]))
    same(vectors("/embed", normalize=False, dimensions=8), raw[:, :8])


@pytest.mark.parametrize(
    ("path", "body", "outputs", "shape"),
    [
        ("/v1/embeddings", {"input": "a"}, ["dense"], {"error"}),
        ("/v1/embeddings", {"input": "a", "outputs": ["tokens", "dense"]}, ["tokens", "dense"], {"error"}),
        ("/v1/embeddings", {"input": "a", "dimensions": 384}, ["dense"], {"error"}),
        ("/v1/embeddings", {"input": [[5, 6]], "encoding_format": "base64"}, ["dense"], {"error"}),
        ("/pooling", {"input": "a", "task": "token_embed"}, ["tokens"], {"error"}),
        ("/voyage/embeddings", {"input": "a"}, ["dense"], {"detail"}),
        ("/jina/v1/embeddings", {"input": "a"}, ["dense"], {"detail"}),
        ("/embed", {"inputs": "a"}, ["dense"], {"error", "error_type"}),
        ("/", {"inputs": "a"}, ["dense"], {"error", "error_type"}),
        ("/embed_all", {"inputs": "a"}, ["tokens"], {"error", "error_type"}),
        ("/similarity", {"inputs": PAIR}, ["dense"], {"error", "error_type"}),
        ("/v1/embed", {"texts": ["a"]}, ["dense"], {"message"}),
        ("/v2/embed", {"texts": ["a"], "input_type": "search_query"}, ["dense"], {"message"}),
        ("/tokenize", {"inputs": "a"}, [], {"error", "error_type"}),
    ],
)
def test_vectors_of_a_space_that_the_client_does_not_know_are_not_computed(
    minilm_server: ServerProcess, path: str, body: object, outputs: list[str], shape: set[str]
) -> None:
    spaces = minilm_server.get("/info").json()["model"]["spaces"]
    assert minilm_server.get("/v1/models").json()["data"][0]["spaces"] == {key: spaces[key]["name"] for key in spaces}
    names = [spaces[output]["name"] for output in outputs]
    plain = minilm_server.post(path, body)
    assert (plain.status_code, plain.headers.get(SPACE)) == (200, ", ".join(names) or None)
    known = minilm_server.post(path, body, **{SPACE: ",".join([OTHER_SPACE, *reversed(names)])})
    assert (known.status_code, known.headers.get(SPACE)) == (200, plain.headers.get(SPACE))
    tokens = minilm_server.metric("inferctl_offered_tokens_total", basis="counted")
    # Of two outputs, both must be known.
    refused = minilm_server.post(path, body, **{SPACE: ", ".join([OTHER_SPACE, *names[1:]])})
    if not outputs:  # nothing of a space is in the response
        assert refused.status_code == 200
        return
    assert (refused.status_code, set(refused.json()), refused.headers[SPACE]) == (412, shape, ", ".join(names))
    assert all(part in refused.text for part in (*names, OTHER_SPACE, "/info"))
    assert "error_type" in shape or "error" not in shape or refused.json()["error"]["code"] == "other_space"
    assert minilm_server.metric("inferctl_offered_tokens_total", basis="counted") == tokens


def test_a_header_in_two_lines_is_one_list(minilm_server: ServerProcess) -> None:
    name = minilm_server.get("/info").json()["model"]["spaces"]["dense"]["name"]
    for lines, status in (([name, OTHER_SPACE], 200), ([OTHER_SPACE, name], 200), ([""], 412), (["", ""], 412)):
        headers = [(SPACE, each) for each in lines]
        assert httpx.post(f"{minilm_server.url}/embed", json={"inputs": "a"}, headers=headers).status_code == status
