"""Classifiers: the engine equals transformers, its pipeline decides about labels and activations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.reading import classify_config, task_config
from inferctl.reading.classify_config import ClassifyConfig
from inferctl.reading.rows import Vectors
from inferctl.serve.engine_process.engine_protocol import Batch
from inferctl.serve.reference import reference
from inferctl.serve.text.text_parts import Pair
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests import engines, tiny_models
from tests.processes import ServerProcess
from tests.serve.test_cross_encoder import PADDED, changed, several, texts

LABELS = {0: "negative", 1: "neutral", 2: "positive"}


def inputs() -> list[Any]:
    """Texts and pairs in turn."""
    return [[first, second] if index % 2 else second for index, (first, second) in enumerate(texts())]


def make(folder: Path, architecture: str, **settings: Any) -> Path:
    settings = {"id2label": LABELS, **settings}
    return tiny_models.make_cross_encoder(folder, architecture, num_labels=len(settings["id2label"]), **settings)


def encoded(folder: Path, items: list[Any]) -> list[Pair]:
    pool = TokenizerPool(folder, task_config.read("classify", folder), threads=1)
    found = []
    for item in items:
        if isinstance(item, str):
            (ids,) = pool.encode_now([item], truncate=True)
            found.append((ids, len(ids)))
        else:
            found += pool.encode_pairs_now(item[:1], item[1:], truncate=True)
    pool.close()
    return found


def logits_of_transformers(folder: Path, items: list[Any]) -> Vectors:
    """Return what transformers computes from the texts alone: all of them in one padded batch."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    given = [item if isinstance(item, str) else tuple(item) for item in items]
    rows = [tokenizer(*([each] if isinstance(each, str) else each), truncation="longest_first") for each in given]
    with torch.inference_mode():
        found: Vectors = model(**tokenizer.pad(rows, return_tensors="pt")).logits.numpy()
    return found


def pipeline_scores(folder: Path, items: list[Any]) -> list[dict[str, float]]:
    import transformers

    run = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    given = [item if isinstance(item, str) else {"text": item[0], "text_pair": item[1]} for item in items]
    found = [run([each], top_k=None, truncation="longest_first")[0] for each in given]
    return [{entry["label"]: entry["score"] for entry in entries} for entries in found]


@pytest.mark.parametrize("architecture", tiny_models.CROSS_ENCODERS)
def test_logits_equal_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    folder = make(tmp_path, architecture)
    items = inputs()
    expected = logits_of_transformers(folder, items)
    assert np.ptp(expected, axis=0).min() > 0.1  # the logits of each label differ between the texts
    engine, info = engines.loaded(folder, task="classify")
    assert info.attention == ("padded" if architecture in PADDED else "packed"), info.attention_reason
    assert (info.dimensions, info.within_limit, info.cosine_min) == (3, True, None)
    found = engine.run(engines.batch_of_pairs(encoded(folder, items))).rows
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)
    probabilities = classify_config.read(folder).scores(found)
    powers = np.exp(expected.astype(np.float64))
    np.testing.assert_allclose(probabilities, powers / powers.sum(axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("int8", 0.2)])
def test_other_precisions_stay_close_to_fp32(tmp_path: Path, precision: str, tolerance: float) -> None:
    folder = make(tmp_path, "bert")
    engine, info = engines.loaded(folder, precision, task="classify")
    assert (info.attention, info.within_limit) == ("packed", True)
    expected = logits_of_transformers(folder, inputs())
    found = engine.run(engines.batch_of_pairs(encoded(folder, inputs()))).rows
    np.testing.assert_allclose(found / np.abs(expected).max(), expected / np.abs(expected).max(), atol=tolerance)


def test_texts_alone_have_no_segments(tmp_path: Path) -> None:
    """A batch without pairs has no `marks`, and gives the same rows as one with pairs."""
    folder = make(tmp_path, "bert")
    engine, _ = engines.loaded(folder, task="classify")
    sequences = encoded(folder, [item for item in inputs() if isinstance(item, str)])
    whole = engines.batch_of_pairs(sequences)
    alone = engine.run(Batch(1, whole.tokens, whole.lengths)).rows
    np.testing.assert_allclose(alone, engine.run(whole).rows, atol=1e-6)


CONFIG = "config.json"
# What config.json says, which decides about labels and activation.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "three labels": ({}, {}),
    "one of several": ({}, {"problem_type": "single_label_classification"}),
    "several of several": ({}, {"problem_type": "multi_label_classification"}),
    "numbers": ({}, {"problem_type": "regression"}),
    "no problem": ({}, {"problem_type": None}),
    "two labels": ({"id2label": {0: "no", 1: "yes"}}, {}),
    "no names": ({"id2label": {0: "no", 1: "yes"}}, {"id2label": ..., "label2id": ...}),
    "a number of labels": ({}, {"id2label": ..., "label2id": ..., "num_labels": 3}),
    "one label": ({"id2label": {0: "toxic"}}, {}),
    "one number": ({"id2label": {0: "toxic"}}, {"problem_type": "regression"}),
    "another number than names": ({}, {"id2label": {"0": "a"}, "num_labels": 3}),
    "the number of names": ({}, {"num_labels": 3}),
    "keys in another order": ({}, {"id2label": {"2": "c", "0": "a", "1": "b"}}),
    "a function that is applied": ({}, {"function_to_apply": "softmax"}),
    "a function in capitals": ({}, {"function_to_apply": "SIGMOID", "problem_type": "multi_label_classification"}),
    "an activation of sentence-transformers": ({}, {"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(id2label={...})` returns a small BERT with these labels, the same folder for the same labels."""
    folders: dict[str, Path] = {}

    def make_once(**settings: Any) -> Path:
        key = str(settings)
        if key not in folders:
            folders[key] = make(tmp_path_factory.mktemp("bert"), "bert", **settings)
        return folders[key]

    return make_once


@pytest.mark.parametrize("name", CASES)
def test_config_json_means_what_it_means_to_the_pipeline(made: Callable[..., Path], tmp_path: Path, name: str) -> None:
    settings, change = CASES[name]
    shutil.copytree(made(**settings), folder := tmp_path / "model")
    changed(CONFIG, **change)(folder)
    expected = pipeline_scores(folder, inputs()[:6])
    found = reference(str(folder), inputs()[:6], task="classify")
    assert sorted(found["labels"]) == sorted(expected[0])
    for row, wanted in zip(found["scores"], expected, strict=True):
        assert dict(zip(found["labels"], row, strict=True)) == pytest.approx(wanted, abs=1e-5)
    compared = reference(str(folder), inputs()[:6], task="classify", with_library=True)
    np.testing.assert_allclose(compared["scores"], found["scores"], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(CONFIG, function_to_apply="sigmoid"), r"function_to_apply.*applies softmax"),
        (changed(CONFIG, function_to_apply="none", problem_type="multi_label_classification"), "applies sigmoid"),
        (changed(CONFIG, problem_type="multi"), "problem_type"),
        (changed(CONFIG, problem_type=["regression"]), "wrong type"),
        (changed(CONFIG, id2label={"0": "a", "5": "b"}), "none with the key '1'"),
        (
            several(
                lambda folder: (folder / "modules.json").write_text("[]"),
                changed("config_sentence_transformers.json", model_type="SentenceTransformer"),
            ),
            "those of a SentenceTransformer",
        ),
    ],
)
def test_what_no_head_computes_is_an_error(
    made: Callable[..., Path], tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(made(), folder := tmp_path / "model")
    change(folder)
    with pytest.raises(UsageError, match=message):
        task_config.read("classify", folder)


def test_a_classifier_that_sentence_transformers_saved_is_the_same_model(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    sentence_transformers.CrossEncoder(str(made()), device="cpu").save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "modules.json").is_file()
    before = reference(str(made()), inputs()[:4], task="classify")
    after = reference(str(tmp_path / "saved"), inputs()[:4])
    assert after["labels"] == before["labels"]
    np.testing.assert_allclose(after["scores"], before["scores"], atol=1e-6)


def test_large_logits_have_finite_scores() -> None:
    logits = np.array([[-3e38, 3e38], [1e4, 1e4]], dtype=np.float32)
    found = {name: ClassifyConfig(name, ("a", "b"), 512).scores(logits) for name in ("softmax", "sigmoid", "none")}
    np.testing.assert_array_equal(found["softmax"], [[0, 1], [0.5, 0.5]])
    np.testing.assert_array_equal(found["sigmoid"], [[0, 1], [1, 1]])
    np.testing.assert_array_equal(found["none"], logits)


def test_the_server_gives_the_scores_of_the_pipeline(
    made: Callable[..., Path], serve: Callable[..., ServerProcess]
) -> None:
    folder = made()
    items = inputs()
    expected = pipeline_scores(folder, items)
    server = serve("--model", str(folder), "--precision", "fp32", "--name", "moods")

    answer = server.post("/predict", {"inputs": [[i] if isinstance(i, str) else i for i in items]})
    predicted = [{entry["label"]: entry["score"] for entry in row} for row in answer.json()]
    for row, wanted in zip(predicted, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
        assert list(row) == list(wanted)  # in the order of the scores

    alone = [item for item in items if isinstance(item, str)]
    body = server.post("/classify", {"input": alone, "model": "moods"}).json()
    names = list(LABELS.values())
    for entry, wanted in zip(
        body["data"], [e for i, e in zip(items, expected, strict=True) if i in alone], strict=True
    ):
        assert dict(zip(names, entry["probs"], strict=True)) == pytest.approx(wanted, abs=1e-5)
        assert entry["label"] == max(wanted, key=lambda label: wanted[label])
    found = reference(str(folder), alone)
    assert sum(found["tokens"]) == body["usage"]["total_tokens"]

    info = server.get("/info").json()
    assert (info["task"], info["attention"]) == ("classify", "packed")
    assert (info["model"]["activation"], info["model"]["labels"]) == ("softmax", names)
    assert info["fidelity"]["logit_error"] < 1e-4
    assert info["fidelity"]["within_limit"]
