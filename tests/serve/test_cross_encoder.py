"""Cross-encoders: the engine equals `CrossEncoder` of sentence-transformers, packed and padded."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.reading import rerank_config, task_config
from inferctl.reading import segments as segments_of
from inferctl.reading.rows import Vectors
from inferctl.serve.reference import reference as scores_of
from inferctl.serve.text.text_parts import Pair
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests import engines, tiny_models
from tests.processes import ServerProcess, execute

PADDED = {"mpnet", "deberta-v2", "albert"}


def texts() -> list[tuple[str, str]]:
    lines = [json.loads(line)["text"] for line in tiny_models.CORPUS.read_text().splitlines()[:48]]
    return [(lines[i][: 20 + i], lines[2 * i][: 30 * i + 1]) for i in range(24)]


def encoded(folder: Path) -> list[Pair]:
    return engines.encoded_pairs(folder, texts(), "rerank")


def reference(folder: Path, pairs: list[Pair]) -> Vectors:
    from inferctl.serve.engines import plain

    return plain.Reference(folder, rerank_config.read(folder)).score(pairs)


@pytest.mark.parametrize("architecture", tiny_models.CROSS_ENCODERS)
def test_scores_equal_the_cross_encoder_of_sentence_transformers(tmp_path: Path, architecture: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tiny_models.make_cross_encoder(tmp_path, architecture)
    expected = sentence_transformers.CrossEncoder(str(folder), device="cpu").predict(texts())
    assert np.ptp(expected) > 0.1  # the scores differ
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 2e-2)):
        engine, info = engines.loaded(folder, precision, task="rerank")
        result = engine.run(engines.batch_of_pairs(encoded(folder)))
        scores = rerank_config.read(folder).scores(result.rows)[:, 0]
        np.testing.assert_allclose(scores, expected, atol=tolerance)
        attention = "padded" if architecture in PADDED else "packed"
        assert (info.attention, info.within_limit, info.dimensions) == (attention, True, 1), info.attention_reason
        assert info.cosine_min is None
        assert info.vocabulary_size == json.loads((folder / "config.json").read_text())["vocab_size"]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_pairs_have_the_segments_that_the_tokenizer_gives(tmp_path: Path, file: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tiny_models.make_cross_encoder(tmp_path, "bert")
    given, replacement = {
        "tokenizer.json": ('"type_id": 1', '"type_id": 0'),  # as of XLM-RoBERTa's tokenizer
        "tokenizer_config.json": ('"token_type_ids",', ""),
    }[file]
    settings = (folder / file).read_text()
    assert given in settings
    (folder / file).write_text(settings.replace(given, replacement))
    expected = sentence_transformers.CrossEncoder(str(folder), device="cpu").predict(texts())
    engine, _ = engines.loaded(folder, task="rerank")
    scores = rerank_config.read(folder).scores(engine.run(engines.batch_of_pairs(encoded(folder))).rows)[:, 0]
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_the_server_and_the_reference_give_the_scores_of_the_cross_encoder(
    tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tiny_models.make_cross_encoder(tmp_path / "model", "bert")
    query, documents = texts()[5][0], [document for _, document in texts()]
    ranked = sentence_transformers.CrossEncoder(str(folder), device="cpu").rank(query, documents)
    expected = {entry["corpus_id"]: entry["score"] for entry in ranked}

    server = serve("--model", str(folder), "--precision", "fp32", "--name", "ranker")
    body = server.post("/v1/rerank", {"query": query, "documents": documents}).json()
    got = {entry["index"]: entry["relevance_score"] for entry in body["results"]}
    assert list(got) == list(expected)
    assert got == pytest.approx(expected, abs=1e-3)
    info = server.get("/info").json()
    assert (info["task"], info["model"]["activation"], info["attention"]) == ("rerank", "Sigmoid", "packed")
    assert info["fidelity"]["logit_error"] < 1e-4
    assert info["fidelity"]["within_limit"]
    assert "fidelity   largest relative error of logits: 0.00000 (12 pairs" in server.log.read_text()

    stdin = json.dumps([[query, document] for document in documents])
    command = [sys.executable, "-m", "inferctl.serve.reference", str(folder)]
    done = execute(*command, input=stdin, code=0)
    document = json.loads(done.stdout)
    assert dict(enumerate(document["scores"])) == pytest.approx(expected, abs=1e-5)
    assert sum(document["tokens"]) == body["usage"]["total_tokens"]
    done = execute(*command, input='["a text"]')
    assert (done.returncode, "is a model for rerank" in done.stderr) == (2, True)


def changed(file: str, **settings: Any) -> Callable[[Path], Any]:
    """Return a change of a JSON file. A setting without a value (`...`) is removed."""

    def change(folder: Path) -> None:
        path = folder / file
        content = (json.loads(path.read_text()) if path.is_file() else {}) | settings
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return change


def several(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [change(folder) for change in changes]


CONFIG, LIBRARY, SETTINGS = "config.json", "config_sentence_transformers.json", "sentence_bert_config.json"
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.Identity"
PROMPT = {"prompts": {"q": "Query: "}, "default_prompt_name": "q"}


def named(name: Any, config_name: Any = ...) -> Callable[[Path], Any]:
    """Leave it to the class of the tokenizer whether it returns segments."""
    tokenizer = changed("tokenizer_config.json", model_input_names=..., tokenizer_class=name)
    return several(tokenizer, changed(CONFIG, tokenizer_class=config_name))


# Changes of a folder that transformers saved, and of one that sentence-transformers saved.
BARE: dict[str, Callable[[Path], Any]] = {
    **{
        f"class {name}": named(name)
        for name in ("BertTokenizer", "BertTokenizerFast", "ElectraTokenizer", "PreTrainedTokenizerFast", "Unknown")
    },
    "no class": named(...),
    "class in config.json": named(..., "PreTrainedTokenizerFast"),
    "identity": changed(CONFIG, sentence_transformers={"activation_fn": IDENTITY}),
    "old identity": changed(CONFIG, sbert_ce_default_activation_function=IDENTITY),
    "null": changed(CONFIG, sentence_transformers={"activation_fn": None}),
    "null hides the old key": changed(
        CONFIG, sentence_transformers={"activation_fn": None}, sbert_ce_default_activation_function=IDENTITY
    ),
    "the new key hides the old one": changed(
        CONFIG, sentence_transformers={"activation_fn": IDENTITY}, sbert_ce_default_activation_function=TANH
    ),
    "another new key": changed(
        CONFIG, sentence_transformers={"version": "6"}, sbert_ce_default_activation_function=TANH
    ),
    "activation without modules": changed(LIBRARY, activation_fn=TANH, model_type="CrossEncoder"),
    "prompt without modules": changed(LIBRARY, model_type="CrossEncoder", **PROMPT),
    "limit without modules": changed(SETTINGS, max_seq_length=20),
}
SAVED: dict[str, Callable[[Path], Any]] = {
    "as saved": lambda _: None,
    "activation": several(
        changed(LIBRARY, activation_fn=TANH), changed(CONFIG, sentence_transformers={"activation_fn": IDENTITY})
    ),
    "null leaves it to config.json": several(
        changed(LIBRARY, activation_fn=None), changed(CONFIG, sentence_transformers={"activation_fn": IDENTITY})
    ),
    "prompt": changed(LIBRARY, **PROMPT),
    "limit": changed(SETTINGS, max_seq_length=20),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cross-encoder, saved by transformers (`bare`) and by sentence-transformers (`saved`)."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    bare = tiny_models.make_cross_encoder(tmp_path_factory.mktemp("bare"), "bert")
    saved = tmp_path_factory.mktemp("saved")
    sentence_transformers.CrossEncoder(str(bare), device="cpu").save_pretrained(str(saved))
    return {"bare": bare, "saved": saved}


@pytest.mark.parametrize(("kind", "name"), [*(("bare", name) for name in BARE), *(("saved", name) for name in SAVED)])
def test_files_mean_what_they_mean_to_sentence_transformers(
    folders: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    from sentence_transformers import CrossEncoder

    shutil.copytree(folders[kind], folder := tmp_path / "model")
    {"bare": BARE, "saved": SAVED}[kind][name](folder)
    expected = CrossEncoder(str(folder), device="cpu").predict(texts())
    found = scores_of(str(folder), [list(pair) for pair in texts()])["scores"]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(LIBRARY, activation_fn="my.Code"), r"activation my\.Code"),
        (changed(LIBRARY, activation_fn="torch.special.Tanh"), r"torch\.special\.Tanh"),
        (several(changed(LIBRARY, activation_fn=None), changed(CONFIG, sentence_transformers=5)), "wrong type"),
        (changed("tokenizer_config.json", model_input_names="token_type_ids"), "model_input_names"),
        (changed(LIBRARY, model_type=...), "those of a SentenceTransformer"),
        (changed(LIBRARY, model_type=None), "those of a None"),
        (changed(SETTINGS, transformer_task=...), "feature-extraction"),
        (changed(SETTINGS, modality_config={"text": {"method_output_name": "hidden_states"}}), "hidden_states"),
        (changed(SETTINGS, module_output_name="other"), "returns other"),
        (
            lambda folder: (folder / "modules.json").write_text(
                '[{"type": "sentence_transformers.T"}, {"type": "x.D"}]'
            ),
            r"module x\.D",
        ),
    ],
)
def test_a_cross_encoder_without_support_is_an_error(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(folders["saved"], folder := tmp_path / "model")
    TokenizerPool(folder, task_config.read("rerank", folder), threads=1).close()
    change(folder)
    with pytest.raises(UsageError, match=message):
        TokenizerPool(folder, task_config.read("rerank", folder), threads=1)


def test_classes_of_tokenizers_return_the_segments_that_those_of_transformers_return() -> None:
    importlib.import_module("sentencepiece")  # some of these classes require it
    from transformers.models.auto import tokenization_auto as auto

    classes = {name for name in auto.TOKENIZER_MAPPING_NAMES.values() if name}
    segments = {
        name: "token_type_ids" in getattr(auto.tokenizer_class_from_name(name), "model_input_names", ())
        for name in classes
    }
    assert {name for name, given in segments.items() if given} == {
        name for name in classes if name.removesuffix("Fast").removesuffix("Tokenizer") in segments_of._SEGMENT_CLASSES
    }
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    types = {kind for kind, name in auto.TOKENIZER_MAPPING_NAMES.items() if name and segments[name]}
    assert types >= segments_of._SEGMENT_TYPES
    assert types & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) <= segments_of._SEGMENT_TYPES
