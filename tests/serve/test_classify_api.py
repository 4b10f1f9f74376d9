"""`/classify` and `/predict` with the echo engine. Its first two logits depend on ids and number of tokens."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import ServerProcess, write_spec
from tests.serve.test_rerank_api import Serve, post, write_classifier

LABELS = [f"mood {number}" for number in range(8)]  # as many as the echo engine returns numbers


@pytest.fixture(scope="module")
def server(minilm: Path, tmp_path_factory: pytest.TempPathFactory, serve_module: Serve) -> ServerProcess:
    model = write_classifier(minilm, tmp_path_factory.mktemp("classify") / "model", LABELS)
    return serve_module("--model", str(model), "--engine", "echo", "--name", "moods")


def classify(server: ServerProcess, texts: list[str], **more: object) -> list[list[float]]:
    answer = post(server, "/classify", input=texts, **more)
    assert answer.status_code == 200, answer.text
    return [entry["probs"] for entry in answer.json()["data"]]


def predict(server: ServerProcess, inputs: object, **more: object) -> Any:
    answer = post(server, "/predict", inputs=inputs, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_classify_returns_the_scores_in_the_order_of_texts_and_labels(server: ServerProcess) -> None:
    answer = post(server, "/classify", input=["one", "one two three four"], model="moods")
    body = answer.json()
    assert {key: body[key] for key in ("id", "object", "model")} == {
        "id": answer.headers["x-request-id"],
        "object": "list",
        "model": "moods",
    }
    assert body["created"] > 1_700_000_000
    assert body["usage"]["total_tokens"] == int(answer.headers["x-inferctl-tokens"]) == 3 + 6
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    for entry in body["data"]:
        assert (entry["num_classes"], len(entry["probs"])) == (8, 8)
        assert sum(entry["probs"]) == pytest.approx(1)
        assert entry["label"] == LABELS[int(np.argmax(entry["probs"]))] == "mood 0"
    (single,) = classify(server, ["one"])
    assert post(server, "/classify", input="one").json()["data"][0]["probs"] == single == body["data"][0]["probs"]


def test_the_scores_are_a_softmax_of_the_logits(server: ServerProcess) -> None:
    (scores,), (logits,) = classify(server, ["one"]), classify(server, ["one"], use_activation=False)
    assert np.linalg.norm(logits) == pytest.approx(1)  # as the echo engine returns them
    np.testing.assert_allclose(scores, np.exp(logits) / np.exp(logits).sum(), atol=1e-6)
    assert classify(server, ["one"], use_activation=True) == classify(server, ["one"], use_activation=None) == [scores]
    raw = {entry["label"]: entry["score"] for entry in predict(server, "one", raw_scores=True)}
    assert [raw[label] for label in LABELS] == pytest.approx(logits)


def test_predict_returns_the_labels_by_score(server: ServerProcess) -> None:
    (scores,) = classify(server, ["one"])
    found = predict(server, "one")
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(dict(zip(LABELS, scores, strict=True)))
    assert [entry["score"] for entry in found] == sorted(scores, reverse=True)
    ties = [entry["label"] for entry in found if entry["score"] == found[-1]["score"]]
    assert len(ties) > 1 and ties == sorted(ties)  # equal scores keep the order of the labels


# `inputs` of /predict, and the texts and pairs that they are.
INPUTS: dict[str, tuple[object, list[tuple[str, ...]]]] = {
    "a text": ("one two", [("one two",)]),
    "a text in a list": (["one two"], [("one two",)]),
    "a pair": (["one", "two"], [("one", "two")]),
    "a list of one text": ([["one"]], [("one",)]),
    "texts": ([["one"], ["two three"]], [("one",), ("two three",)]),
    "pairs": ([["one", "two"], ["three", "four five"]], [("one", "two"), ("three", "four five")]),
    "both": ([["one", "two"], ["three"], ["four", "five six"], ["seven eight"]],
             [("one", "two"), ("three",), ("four", "five six"), ("seven eight",)]),
    "many of both": ([["one", "two"], ["three"]] * 100, [("one", "two"), ("three",)] * 100),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_texts_pairs_or_a_list_of_both(server: ServerProcess, name: str) -> None:
    inputs, items = INPUTS[name]
    found = predict(server, inputs, raw_scores=True)
    single = not isinstance(inputs, list) or isinstance(inputs[0], str)
    rows = [found] if single else found
    expected = {item: predict(server, item[0] if len(item) == 1 else list(item), raw_scores=True) for item in {*items}}
    assert rows == [expected[item] for item in items]
    lengths = [len(item) + 1 + sum(len(text.split()) for text in item) for item in items]
    for row, length in zip(rows, lengths, strict=True):  # [CLS] and a [SEP] after each text
        scores = {entry["label"]: entry["score"] for entry in row}
        assert scores["mood 1"] / scores["mood 2"] == pytest.approx(length, rel=1e-4)


LONG = "word " * 999
ERRORS: list[tuple[str, dict[str, object], int, str]] = [
    ("/classify", {}, 400, "missing_field"),
    ("/classify", {"input": []}, 400, "empty_input"),
    ("/classify", {"input": [["a", "b"]]}, 400, "invalid_type"),
    ("/classify", {"input": ["a"] * 2049}, 400, "too_many_inputs"),
    ("/classify", {"input": "a", "use_activation": 1}, 400, "invalid_value"),
    ("/classify", {"input": ["a", LONG], "truncate": False}, 400, "context_length_exceeded"),
    ("/classify", {"input": ["a " * 3000]}, 200, ""),
    ("/v1/embeddings", {"input": "a"}, 404, "unsupported_task"),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}, 404, "unsupported_task"),
    ("/predict", {}, 400, "validation"),
    ("/predict", {"inputs": []}, 400, "empty"),
    ("/predict", {"inputs": ""}, 400, "empty"),
    ("/predict", {"inputs": [[]]}, 400, "validation"),
    ("/predict", {"inputs": ["a", ""]}, 400, "empty"),
    ("/predict", {"inputs": ["a", "b", "c"]}, 400, "validation"),
    ("/predict", {"inputs": [["a"], "b"]}, 400, "validation"),
    ("/predict", {"inputs": [["a", "b", "c"]]}, 400, "validation"),
    ("/predict", {"inputs": [["a"]] * 2049}, 400, "validation"),
    ("/predict", {"inputs": "a", "raw_scores": None}, 400, "validation"),
    ("/predict", {"inputs": "a", "truncation_direction": "Left"}, 400, "validation"),
    ("/predict", {"inputs": LONG, "truncate": False}, 400, "tokenizer"),
    ("/predict", {"inputs": [["a"], ["b", LONG]], "truncate": False}, 400, "tokenizer"),
]


@pytest.mark.parametrize(("path", "body", "status", "kind"), ERRORS)
def test_errors_have_the_shape_of_their_api(
    server: ServerProcess, path: str, body: dict[str, object], status: int, kind: str
) -> None:
    answer = post(server, path, **body)
    assert answer.status_code == status
    if path == "/predict":
        assert set(answer.json()) == {"error", "error_type"}
        assert answer.json()["error_type"] == kind
    elif status != 200:
        assert answer.json()["error"]["code"] == kind


def test_errors_name_the_input(server: ServerProcess) -> None:
    inputs = [["a", "b"], ["c"], ["d", LONG], [LONG]]
    answer = post(server, "/predict", inputs=inputs, truncate=False)
    assert answer.json()["error"].startswith("inputs[3] ")
    assert post(server, "/predict", inputs=inputs[:3], truncate=False).json()["error"].startswith("inputs[2] ")
    assert post(server, "/classify", input=["a", LONG], truncate=False).json()["error"]["param"] == "input"


def test_errors_of_the_edge_have_the_shape_of_the_path(server: ServerProcess) -> None:
    for path, shape in (("/predict", {"error", "error_type"}), ("/classify", {"error"})):
        broken, large = server.post(path, b"{"), server.post(path, b"0" * (5 * 2**20))
        assert (broken.status_code, large.status_code) == (400, 413)
        assert set(broken.json()) == set(large.json()) == shape


def test_pooling_and_info_have_the_shapes_of_vllm_and_text_embeddings_inference(server: ServerProcess) -> None:
    scores = classify(server, ["one", "one two three four"])
    body = post(server, "/pooling", input=["one", "one two three four"], task="classify").json()
    assert [entry["data"] for entry in body["data"]] == [pytest.approx(row) for row in scores]
    assert {entry["object"] for entry in body["data"]} == {"pooling"}
    assert post(server, "/pooling", input="one", task="embed").status_code == 400
    assert post(server, "/pooling", input="one", encoding_format="base64").status_code == 400
    kind = server.get("/info").json()["model_type"]["classifier"]
    assert kind["id2label"]["7"] == "mood 7"
    assert kind["label2id"] == {label: number for number, label in enumerate(LABELS)}


def test_texts_are_cached_and_pairs_are_not_and_all_are_metered(minilm: Path, tmp_path: Path, serve: Serve) -> None:
    model = write_classifier(minilm, tmp_path / "model", LABELS)
    metering = {"mode": "required", "data": "usage"}
    write_spec(tmp_path, model, cache={"size": "1 MB"}, metering=metering)
    server = serve("--spec", "inferctl.yaml", "--engine", "echo")
    texts = [["one two"], ["three four five"]]
    first = post(server, "/predict", inputs=texts)
    assert first.headers["x-inferctl-tokens"] == "9"
    again = post(server, "/classify", input=[text for (text,) in texts])
    assert (again.headers["x-inferctl-tokens"], again.headers["x-inferctl-cached-tokens"]) == ("9", "9")
    assert [max(entry["probs"]) for entry in again.json()["data"]] == pytest.approx(
        [row[0]["score"] for row in first.json()]
    )
    for _ in range(2):
        pair = post(server, "/predict", inputs=[["one", "two"], ["one two"]])
        assert (pair.headers["x-inferctl-tokens"], "x-inferctl-cached-tokens" in pair.headers) == ("9", False)
    for _ in range(2):  # tokens count for the limits of a key, and not as usage
        tokenized = post(server, "/tokenize", inputs=["one two", "three"])
        assert (tokenized.headers["x-inferctl-tokens"], list(map(len, tokenized.json()))) == ("0", [4, 3])
    assert server.stop() == 0
    with sqlite3.connect(tmp_path / "usage" / "ledger.sqlite") as database:
        rows = database.execute(
            "select endpoint, status, sum(requests), sum(input_tokens), sum(cached_tokens) from usage_events "
            "where status = 200 group by endpoint order by endpoint"
        ).fetchall()
    assert rows == [("classify", 200, 1, 9, 9), ("predict", 200, 3, 9 + 9 + 9, 0), ("tokenize", 200, 2, 0, 0)]
