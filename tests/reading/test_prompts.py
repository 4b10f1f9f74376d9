"""Prompts of requests: what is tokenized and computed equals sentence-transformers, or the request is rejected."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.image import verify
from inferctl.reading import embedding_config, prompts
from inferctl.serve.reference import reference
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests import tiny_models
from tests.processes import CLIENT, ServerProcess, start, until
from tests.tenancy.key_files import add

TEXTS = ["Which river flows through Vienna?", " 北京 naïve [SEP] text [MASK]", "long words of a text " * 60, "x"]
QUERY, PASSAGE = "Instruct: find it\nQuery: ", "passage: "
LONG = "a long prompt that leaves no room for the text " * 30
# The prompts of a model, as its file has them.
MODELS: dict[str, dict[str, Any]] = {
    "none": {},
    "null": {"prompts": {"query": None}, "default_prompt_name": None},
    "default": {"prompts": {"query": QUERY, "document": PASSAGE}, "default_prompt_name": "document"},
    "retrieval": {"prompts": {"query": QUERY, "document": ""}},
    "empty query": {"prompts": {"query": "", "s2s": "[CLS]雨 [SEP]"}, "default_prompt_name": "s2s"},
    "default of another name": {"prompts": {"s2s": "symmetric: "}, "default_prompt_name": "s2s"},
    "added default": {"prompts": {"s2s": "symmetric: "}, "default_prompt_name": "query"},
    "tasks": {"prompts": {"query": "q: ", "classification": "c: ", "clustering": "雨の日: "}},
    "long": {"prompts": {"query": LONG, "document": "d"}},
}
SERVED = {"prompts": {"query": QUERY, "document": "", "clustering": "雨の日: "}}
# What a request has, and the method of sentence-transformers that does the same. An `input_type` counts last.
REQUESTS: list[tuple[dict[str, str], str, dict[str, str]]] = [
    ({}, "encode", {}),
    ({"input_type": "query"}, "encode_query", {}),
    ({"input_type": "search_query"}, "encode_query", {}),
    ({"input_type": "document"}, "encode_document", {}),
    ({"input_type": "search_document"}, "encode_document", {}),
    ({"prompt_name": "query"}, "encode", {"prompt_name": "query"}),
    ({"prompt_name": "s2s"}, "encode", {"prompt_name": "s2s"}),
    ({"prompt_name": "s2s", "input_type": "query"}, "encode_query", {"prompt_name": "s2s"}),
    ({"prompt_name": "QUERY"}, "encode", {"prompt_name": "QUERY"}),
    ({"input_type": "classification"}, "encode", {"prompt_name": "classification"}),
    ({"input_type": "clustering"}, "encode", {"prompt_name": "clustering"}),
    ({"prompt": ""}, "encode", {"prompt": ""}),
    ({"prompt": "雨 [SEP] <s> é: "}, "encode", {"prompt": "雨 [SEP] <s> é: "}),
    ({"prompt": LONG}, "encode", {"prompt": LONG}),
    ({"prompt": "p: ", "prompt_name": "query"}, "encode", {"prompt": "p: ", "prompt_name": "query"}),
    ({"prompt": "p: ", "prompt_name": "unknown"}, "encode_query", {"prompt": "p: ", "prompt_name": "unknown"}),
    ({"prompt": "p: ", "input_type": "document"}, "encode_document", {"prompt": "p: "}),
]
# sentence-transformers knows them for each model, as empty prompts. Here they are unknown unless the file has them.
ADDED = {"query", "document"}


@pytest.fixture(scope="module")
def folder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder(**settings)` returns a model with random weights and these prompts. All are one model."""
    base = tmp_path_factory.mktemp("prompts")
    tiny_models.make(minilm, base / "base", "bert", "mean_tokens")

    def make(**settings: Any) -> Path:
        path = base / str(len(list(base.iterdir())))
        shutil.copytree(base / "base", path)
        (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
        return path

    return make


@pytest.fixture(scope="module")
def oracle(folder: Any) -> Callable[..., tuple[list[list[int]], np.ndarray[Any, Any]]]:
    """`oracle(settings, method, arguments)` returns the token ids of TEXTS and their vectors, in fp32."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    loaded: dict[str, Any] = {}

    def compute(settings: dict[str, Any], method: str, arguments: dict[str, str]) -> Any:
        key = json.dumps(settings)
        if key not in loaded:
            loaded[key] = sentence_transformers.SentenceTransformer(str(folder(**settings)), device="cpu")
        model = loaded[key]
        seen: list[list[int]] = []
        preprocess = type(model).preprocess

        def record(inputs: list[str], **options: Any) -> Any:
            found = preprocess(model, inputs, **options)
            rows = zip(found["input_ids"].tolist(), found["attention_mask"].tolist(), strict=True)
            seen.extend([id for id, real in zip(*row, strict=True) if real] for row in rows)
            return found

        model.preprocess = record
        # One text at a time, in order: batches are sorted by length.
        vectors = [getattr(model, method)(text, **arguments) for text in TEXTS]
        return seen, np.stack(vectors)

    return compute


@pytest.mark.parametrize("model", MODELS)
def test_requests_tokenize_and_compute_what_sentence_transformers_does(folder: Any, oracle: Any, model: str) -> None:
    from inferctl.serve.engines import plain

    path = folder(**MODELS[model])
    config = embedding_config.read(path)
    computed = plain.Reference(path, config)
    pool = TokenizerPool(path, config)
    rejected = []
    for request, method, arguments in REQUESTS:
        name = request.get("prompt_name", request.get("input_type"))
        try:
            prompt = config.prompts.select(*(request.get(key) for key in ("prompt", "prompt_name", "input_type")))
        except UsageError as error:
            rejected.append(request)
            assert name not in config.prompts.texts
            assert error.hint
            assert all(known in error.hint for known in config.prompts.texts)
            if name not in ADDED:
                with pytest.raises(ValueError, match="not found in the configured prompts"):
                    oracle(MODELS[model], method, arguments)
            continue
        if request == {"input_type": name} and name in ("classification", "clustering") and model in ("none", "null"):
            arguments = {}  # a model without prompts needs none
        ids, vectors = oracle(MODELS[model], method, arguments)
        rows = pool.encode_now(TEXTS, truncate=True, prompt=prompt)
        assert [row.tolist() for row in rows] == ids, request
        np.testing.assert_allclose(computed.embed(rows), vectors, atol=1e-5, err_msg=str(request))
    assert ({"prompt_name": "QUERY"} in rejected) and len(rejected) < len(REQUESTS) / 2


def test_the_first_of_document_passage_and_corpus_precedes_documents(folder: Any, oracle: Any) -> None:
    # sentence-transformers 6.2 documents this order, but its own empty `document` hides the others.
    names = {"corpus": "c: ", "passage": "p: ", "document": ""}
    for least in range(3):
        settings = {"prompts": dict(list(names.items())[: least + 1])}
        config = embedding_config.read(folder(**settings))
        expected = list(names)[least]
        ids, _ = oracle(settings, "encode", {"prompt_name": expected})
        pool = TokenizerPool(folder(**settings), config)
        found = pool.encode_now(TEXTS, truncate=True, prompt=config.prompts.select(input_type="search_document"))
        assert [row.tolist() for row in found] == ids
        assert config.prompts.select(input_type="query") == ""


def test_models_whose_prompts_nobody_gets_without_a_choice_are_known() -> None:
    found = {model: prompts.read(settings) for model, settings in MODELS.items()}
    assert [model for model in MODELS if found[model].unused] == ["retrieval", "added default", "tasks", "long"]
    assert [model for model in MODELS if not found[model].summary] == ["none", "null"]
    assert "have `document`" in found["default"].summary
    other = prompts.read({"prompts": {"web_search_query": QUERY}})
    assert [word for word in (None, "query", "search_query", "document") if other.misses_query(word)] == [
        "query",
        "search_query",
    ]
    assert not prompts.read({"prompts": {"query": ""}}).misses_query("query")
    assert not prompts.read({"prompts": {"query": QUERY}}, pooled=False).unused


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": ["query: "]},
        {"prompts": {"query": 3}},
        {"prompts": {"query": "q"}, "default_prompt_name": "passage"},
        {"default_prompt_name": ["query"]},
    ],
)
def test_invalid_prompts_are_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"config_sentence_transformers\.json"):
        prompts.read(settings)


def test_a_pooling_without_the_prompt_is_rejected_by_the_name_of_the_default(folder: Any) -> None:
    # The pooling of GritLM and Instructor excludes the tokens of the prompt.
    for settings, served in ((MODELS["default"], False), (MODELS["retrieval"], True), ({}, True)):
        path = folder(**settings)
        pooling = json.loads((path / "1_Pooling" / "config.json").read_text())
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"include_prompt": False}))
        if not served:
            with pytest.raises(UsageError, match="its default prompt 'document'"):
                embedding_config.read(path)
            continue
        found = embedding_config.read(path).prompts
        assert found.select() == found.select("") == found.select(input_type="document") == ""
        assert "query" not in found.names
        for selected in ({"prompt": "p: "}, {"name": "query"}, {"input_type": "search_query"}):
            if selected == {"prompt": "p: "} or settings:
                with pytest.raises(UsageError, match="excludes the tokens of a prompt"):
                    found.select(**selected)


@pytest.fixture(scope="module")
def server(
    folder: Any, tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> tuple[ServerProcess, Path]:
    """A server with prompts, a cache and a request log, and its model folder."""
    place, path = tmp_path_factory.mktemp("prompted"), folder(**SERVED)
    spec: dict[str, Any] = {"name": "prompted", "model": {"source": str(path)}, "cache": {"size": "16MiB"}}
    spec |= {"serve": {"precision": "fp32"}, "metering": {"mode": "on", "data": str(place / "usage")}}
    (place / "inferctl.yaml").write_text(json.dumps(spec))
    return serve_module("--log", "json", place=place), path


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": "a", "prompt_name": "Query"}, "invalid_prompt", "prompt_name"),
        ({"input": "a", "prompt_name": ""}, "invalid_prompt", "prompt_name"),
        ({"input": "a", "input_type": "classification"}, "invalid_prompt", "input_type"),
        ({"input": "a", "input_type": "image"}, "invalid_prompt", "input_type"),
        ({"input": "a", "input_type": "x" * 1_000_000}, "invalid_prompt", "input_type"),
        ({"input": "a", "prompt": "p" * 8193}, "invalid_value", "prompt"),
        ({"input": "a", "prompt": ["p"]}, "invalid_value", "prompt"),
        ({"input": "a", "prompt_name": 1}, "invalid_value", "prompt_name"),
        ({"input": ["a"] * 2048, "prompt": "p" * 8192}, "prompt_too_long", "input"),
        ({"input": [5, 6], "prompt_name": "query"}, "prompt_without_text", "input"),
        ({"input": [[5, 6]], "prompt": "p"}, "prompt_without_text", "input"),
    ],
)
def test_a_prompt_that_the_model_does_not_have_is_400(server: Any, body: Any, code: str, param: str) -> None:
    response = server[0].embed(**body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    if code == "invalid_prompt":
        assert all(name in error["message"] for name in SERVED["prompts"])


def test_prompts_are_computed_counted_and_cached_apart(server: Any) -> None:
    found, path = server
    text = "a text of the cache"
    selected: list[dict[str, Any]] = [
        {},
        {"prompt_name": "document"},
        {"input_type": "search_document"},
        {"prompt_name": "query"},
        {"input_type": "search_query"},
        {"prompt": QUERY},
        {"input_type": "clustering"},
        {"prompt": "another: "},
    ]
    responses = [found.embed(input=text, **each).json() for each in selected]
    expected = reference(str(path), [{"input": text, **each} for each in selected])
    for response, tokens, packed in zip(responses, expected["tokens"], expected["embeddings"], strict=True):
        vector = np.frombuffer(base64.b64decode(packed), "<f4")
        np.testing.assert_allclose(response["data"][0]["embedding"], vector, atol=1e-5)
        assert response["usage"]["prompt_tokens"] == tokens
    assert len({json.dumps(response["data"]) for response in responses}) == 4
    # The others were in the cache: they have the same tokens.
    assert found.metric("inferctl_cache_hits_total") >= 4
    again = found.embed(input=[text, text], prompt_name="query")
    assert again.headers["x-inferctl-cached-tokens"] == str(2 * expected["tokens"][3])

    def logged() -> list[Any]:
        lines = [json.loads(line) for line in found.log.read_text().splitlines()]
        return [line["tokens"] for line in lines if line["logger"] == "inferctl.request" and line["status"] == 200]

    until(lambda: sum(logged()) >= sum(expected["tokens"]) + 2 * expected["tokens"][3])
    kept = [found.log, *(file for file in (found.log.parent / "usage").rglob("*") if file.is_file())]
    assert len(kept) > 1
    for file in kept:
        assert not any(word in file.read_bytes() for word in (b"Instruct", "雨".encode(), b"another"))


def test_the_server_names_its_prompts(server: Any) -> None:
    found, _ = server
    assert found.get("/info").json()["model"]["prompts"] == {"names": list(SERVED["prompts"]), "default": None}
    fields = found.get("/openapi.json").json()["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert fields["prompt_name"]["anyOf"][0]["enum"] == list(SERVED["prompts"])
    assert {"search_query", "search_document", "clustering"} <= set(fields["input_type"]["anyOf"][0]["enum"])
    assert "classification" not in fields["input_type"]["anyOf"][0]["enum"]
    lines = [json.loads(line)["message"] for line in found.log.read_text().splitlines()]
    assert len([line for line in lines if line.startswith("prompts ")]) == 1


def test_the_verification_of_an_image_compares_all_prompts(server: Any) -> None:
    found, path = server
    names = [None, *SERVED["prompts"]] * 2

    def send(path: str, body: Any) -> Any:
        return CLIENT.post(f"{found.url}{path}", json=body).json()

    vectors = verify._embed(send, list(zip(verify.TEXTS, names, strict=True)), "dense", 0)
    inputs = [{"input": text, "prompt_name": name} for text, name in zip(verify.TEXTS, names, strict=True)]
    expected = reference(str(path), inputs)["embeddings"]
    np.testing.assert_allclose(vectors, [np.frombuffer(base64.b64decode(each), "<f4") for each in expected], atol=1e-5)


def test_each_key_that_selects_no_prompt_gets_one_line(folder: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    added = [add(keys, name) for name in ("without", "too", "with")]
    found = start(tmp_path, "--model", str(folder(**SERVED)), "--engine", "echo", "--keys", str(keys))

    def lines() -> list[str]:
        return [line for line in found.log.read_text().splitlines() if "without a prompt" in line]

    try:
        bodies: list[dict[str, Any]] = [{}, {}, {"prompt": ""}]
        for body in bodies * 2:
            for (key, secret), more in zip(added, ({}, {}, {"input_type": "document"}), strict=True):
                response = CLIENT.post(
                    f"{found.url}/v1/embeddings",
                    json={"input": "a text", **body, **more},
                    headers={"authorization": f"Bearer {secret}"},
                )
                assert response.status_code == 200, key
        until(lambda: len(lines()) == 2)
        assert all(sum(key.id in line for line in lines()) == (key.name != "with") for key, _ in added)
    finally:
        found.kill()
