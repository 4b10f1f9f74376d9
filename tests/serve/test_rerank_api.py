"""`/v1/rerank` and `/v1/score` with the echo engine, whose score grows with the token ids of a pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import ServerProcess

Serve = Callable[..., ServerProcess]


def write_classifier(minilm: Path, folder: Path, labels: list[str]) -> Path:
    """Write a folder that the echo engine serves as a classifier, or with one label as a cross-encoder."""
    shutil.copytree(minilm, folder, symlinks=False, ignore=shutil.ignore_patterns("modules.json"))
    config = json.loads((minilm / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate(labels))}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(minilm: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Serve) -> ServerProcess:
    model = write_classifier(minilm, tmp_path_factory.mktemp("rerank") / "model", ["LABEL_0"])
    return serve_module("--model", str(model), "--engine", "echo", "--name", "ranker")


def post(server: ServerProcess, path: str, **body: object) -> httpx.Response:
    return server.post(path, body)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/jina/v1/rerank", "/rerank"])
def test_results_are_ordered_by_score(server: ServerProcess, path: str) -> None:
    documents = ["one", "one two three four", {"text": "one two", "title": "ignored"}]
    answer = post(server, path, query="a query", documents=documents, return_documents=True)
    assert answer.status_code == 200
    body = answer.json()
    scores = [result["relevance_score"] for result in body["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in body["results"]) == [0, 1, 2]
    texts = ["one", "one two three four", "one two"]
    assert all(result["document"] == {"text": texts[result["index"]]} for result in body["results"])
    assert body["id"] == answer.headers["x-request-id"]
    assert body["usage"]["total_tokens"] == int(answer.headers["x-inferctl-tokens"]) > 0
    assert post(server, path, query="a query", documents=documents, top_n=1).json()["results"] == [
        {key: body["results"][0][key] for key in ("index", "relevance_score")}
    ]


def test_clients_of_other_apis_rank_as_v1_rerank_does(server: ServerProcess) -> None:
    import cohere
    import voyageai

    documents = ["one", "one two three four", "one two"]
    ranked = post(server, "/v1/rerank", query="a query", documents=documents).json()["results"]
    expected = [(result["index"], pytest.approx(result["relevance_score"])) for result in ranked]
    client = cohere.ClientV2(api_key="unused", base_url=server.url)
    found = client.rerank(model="ranker", query="a query", documents=documents).results
    assert [(result.index, result.relevance_score) for result in found] == expected
    with pytest.raises(cohere.NotFoundError, match="use 'ranker'"):
        client.rerank(model="other", query="a query", documents=documents)
    voyage = voyageai.Client(api_key="unused", base_url=f"{server.url}/voyage")
    best = voyage.rerank("a query", documents, model="ranker", top_k=2).results
    assert [(result.index, result.relevance_score) for result in best] == expected[:2]
    assert best[0].document == documents[best[0].index]
    with pytest.raises(voyageai.error.InvalidRequestError, match="documents"):
        voyage.rerank("a query", [], model="ranker")
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.cohere import CohereRanker
    from haystack_integrations.components.rankers.jina import JinaRanker

    options = {"model": "ranker", "api_key": Secret.from_token("unused")}
    cohere_ranker: Any = CohereRanker(api_base_url=server.url, **options)
    for ranker in (cohere_ranker, JinaRanker(base_url=f"{server.url}/jina/v1/rerank", **options)):
        ranked = ranker.run(query="a query", documents=[Document(content=text) for text in documents])["documents"]
        assert [(documents.index(each.content), each.score) for each in ranked] == expected
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    nodes = [NodeWithScore(node=TextNode(text=text), score=0) for text in documents]
    tei = TextEmbeddingInference(base_url=server.url, top_n=3, model_name="ranker")
    found = tei.postprocess_nodes(nodes, QueryBundle("a query"))
    assert [(documents.index(node.node.get_content()), node.score) for node in found] == expected
    for path in ("/rerank", "/"):  # of text-embeddings-inference
        rows = post(server, path, query="a query", texts=documents, return_text=True).json()
        assert [(row["index"], row["score"]) for row in rows] == expected
        assert [row["text"] for row in rows] == [documents[row["index"]] for row in rows]
    raw = post(server, "/rerank", query="a query", texts=documents, raw_scores=True).json()
    assert [row["index"] for row in raw] == [row["index"] for row in rows]
    assert len(post(server, "/rerank", query="a query", texts=["", "one"]).json()) == 2
    empty = post(server, "/v1/rerank", query="a query", documents=["one", "", {"text": ""}])
    assert len({result["relevance_score"] for result in empty.json()["results"]}) == 2
    assert len(post(server, "/v1/score", text_1="a query", text_2=["", "one"]).json()["data"]) == 2
    assert post(server, "/v1/rerank", query="", documents=["one"]).status_code == 400
    long = post(server, "/rerank", query="a query", texts=["one " * 999], truncate=False)
    assert long.json()["error"].startswith("texts[0]")
    # Two tokens of each document count.
    short = post(server, "/v2/rerank", query="q", documents=["one two", "one two one"], max_tokens_per_doc=2).json()
    assert len({result["relevance_score"] for result in short["results"]}) == 1
    assert short["usage"]["total_tokens"] == 2 * (1 + 2 + 3)
    assert post(server, "/v2/rerank", query="q", documents=["a"], max_tokens_per_doc=0).status_code == 400
    neither = post(server, "/rerank", query="a query")
    assert (neither.status_code, neither.json()["error_type"]) == (400, "validation")


def test_scores_have_the_order_of_the_request_and_equal_those_of_rerank(server: ServerProcess) -> None:
    documents = ["one", "one two three four", "one two"]
    ranked = post(server, "/v1/rerank", query="a query", documents=documents).json()["results"]
    expected = [result["relevance_score"] for result in sorted(ranked, key=lambda result: result["index"])]
    for first in ("a query", ["a query"], ["a query"] * 3):
        data = post(server, "/v1/score", text_1=first, text_2=documents).json()["data"]
        assert [entry["score"] for entry in data] == pytest.approx(expected)
        assert [entry["index"] for entry in data] == [0, 1, 2]


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/rerank", {"documents": ["a"]}, 400, "missing_field", "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, 400, "invalid_value", "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b", 1]}, 400, "invalid_value", "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 2049}, 400, "too_many_inputs", "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 400, "invalid_value", "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "x"}, 404, "model_not_found", "model"),
        (
            "/v1/rerank",
            {"query": "a", "documents": ["b", "word " * 999], "truncate": False},
            400,
            "context_length_exceeded",
            "documents",
        ),
        ("/v1/rerank", {"query": "a " * 1000, "documents": ["b"] * 2048}, 400, "too_many_tokens", None),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, 400, "unequal_lengths", None),
        ("/v1/score", {"text_1": "a", "text_2": ""}, 400, "invalid_value", "text_2"),
        ("/v1/embeddings", {"input": "a"}, 404, "unsupported_task", None),
    ],
)
def test_errors_use_the_envelope(
    server: ServerProcess, path: str, body: dict[str, object], status: int, code: str, param: str | None
) -> None:
    answer = post(server, path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


def test_the_openapi_document_has_the_endpoints_of_the_task(server: ServerProcess) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/rerank", "/v1/score"} <= set(paths)
    assert not {"/v1/embeddings", "/pooling"} & set(paths)
    assert len(post(server, "/tokenize", inputs="a query").json()[0]) == 4
    kind = server.get("/info").json()["model_type"]
    assert kind == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    assert "/v1/rerank" in server.get("/docs").text
