"""Prompts of requests: what is tokenized and computed equals sentence-transformers, or the request is rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.serve import embedding_config, prompts
from inferctl.serve.tokenizer_pool import TokenizerPool
from tests.processes import ServerProcess
from tests.serve import tiny_models

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
        model, seen = loaded[key], []
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
    config, weights = embedding_config.read(path), plain.load_model(path)
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
        np.testing.assert_allclose(plain.embed(weights, rows, config), vectors, atol=1e-5, err_msg=str(request))
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
