"""Tests reading a model folder without torch."""

from __future__ import annotations

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from inferctl.config.spec import Task, TaskSetting
from inferctl.core.errors import UsageError
from inferctl.models import model, output_vectors
from inferctl.models.fit import ModelSize
from tests.models.model_folders import write_model


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    found = model.find(str(write_model(tmp_path / "m", {"a": [3, 4], "b": [5], "scalar": []})))
    assert (found.parameters, found.architecture) == (18, "BertModel")


def test_a_second_copy_of_the_weights_is_not_counted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": [10]})
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    found = model.find(str(folder))
    assert (found.parameters, [file.name for file in found.weight_files]) == (10, ["model.safetensors"])


def task(requested: TaskSetting, config: dict[str, Any], **facts: Any) -> Task:
    return model.resolve_task(requested, ModelSize(0, config, **facts), "m")


def test_the_task_is_the_one_that_the_model_is_made_for() -> None:
    encoder = {"architectures": ["BertModel"]}
    cross_encoder = {"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    assert task("auto", encoder) == task("embed", encoder) == "embed"
    assert task("auto", cross_encoder) == task("rerank", cross_encoder) == "rerank"
    assert task("auto", {}) == "embed"
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration"):
        config = {"architectures": [name]}
        assert task("auto", config) == task("generate", config) == "generate"
        # Embedding models such as Qwen3-Embedding have the architecture of a generative model.
        assert task("auto", config, has_modules=True) == "embed"
        assert task("embed", config) == "embed"
    with pytest.raises(UsageError, match=r"generate requires a generative model, but m is an embedding model"):
        task("generate", encoder)
    # Also a language model can be a reranker.
    with pytest.raises(UsageError, match=r"rerank requires a reranker, but m is an embedding model \(BertModel\)"):
        task("rerank", encoder)
    with pytest.raises(UsageError, match=r"m is a reranker \(XLMRobertaForSequenceClassification\)"):
        task("embed", cross_encoder)


def test_the_word_of_sentence_transformers_comes_before_the_architecture() -> None:
    decoder = {"architectures": ["Qwen3ForCausalLM"]}
    assert task("auto", decoder, has_modules=True, library_type="SentenceTransformer") == "embed"
    for config in (decoder, {"architectures": ["ModernBertModel"]}):
        assert task("auto", config, has_modules=True, library_type="CrossEncoder") == "rerank"
        with pytest.raises(UsageError, match="m is a reranker"):
            task("embed", config, has_modules=True, library_type="CrossEncoder")
        for kind in ("SparseEncoder", "MultiVectorEncoder", "ColBERT"):
            assert task("auto", config, has_modules=True, library_type=kind) == "embed"
    for name in ("HF_ColBERT", "BertForMaskedLM"):
        assert task("auto", {"architectures": [name]}) == "embed"


@pytest.mark.parametrize("labels", [{"id2label": {"0": "bad", "1": "good"}}, {"num_labels": 2}, {}])
def test_a_classifier_with_several_labels_classifies(labels: dict[str, object]) -> None:
    config = {"architectures": ["BertForSequenceClassification"], **labels}
    assert task("auto", config) == task("classify", config) == "classify"
    # As `CrossEncoder` of sentence-transformers saves it.
    assert task("auto", config, has_modules=True, library_type="CrossEncoder") == "classify"
    for other in ("rerank", "embed", "generate"):
        with pytest.raises(UsageError, match="m is a classifier with 2 labels"):
            task(other, config)
    assert task("classify", {**config, "id2label": {"0": "score"}}) == "classify"
    with pytest.raises(UsageError, match=r"classify requires a classifier, but m is an embedding model \(BertModel\)"):
        task("classify", {"architectures": ["BertModel"]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "none with the key '1'"),
        ({"id2label": {"1": "a", "2": "b"}}, "none with the key '0'"),
        *(({"num_labels": number}, "num_labels") for number in (0, -1, 10**12, "2", True, None, 2.0)),
    ],
)
def test_labels_that_no_output_has_are_an_error(config: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task("auto", {"architectures": ["BertForSequenceClassification"], **config})


def test_the_digest_depends_on_weights_and_tokenizer_but_not_on_the_readme(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": [2]})
    before = model.ModelFolder(folder).digest
    (folder / "README.md").write_text("hello")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    assert model.ModelFolder(folder).digest == before
    (folder / "tokenizer.json").write_text("{}")
    assert model.ModelFolder(folder).digest != before


def test_a_hub_model_is_found_in_the_local_cache_at_its_revision(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--m"
    write_model(cache / "snapshots" / "abc", {"a": [1]})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc\n")
    for revision in (None, "main", "abc"):
        assert model.find("org/m", revision, {"HF_HOME": str(tmp_path)}).path.name == "abc"
    with pytest.raises(UsageError):
        model.find("org/m", "other", {"HF_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    "broken", ["no-config", "no-weights", "no-shard", "truncated", "lfs-pointer", "bad-config", "not-there", "hub"]
)
def test_an_invalid_model_folder_is_rejected_with_a_hint(tmp_path: Path, broken: str) -> None:
    folder = write_model(tmp_path / "m", {"a": [100]})
    weights = folder / "model.safetensors"
    match broken:
        case "no-config":
            (folder / "config.json").unlink()
        case "no-weights":
            weights.rename(folder / "pytorch_model.bin")
        case "no-shard":
            names = {"a": weights.name, "b": "model-2.safetensors"}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "lfs-pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
        case "bad-config":
            (folder / "config.json").write_text("{")
    source = {"not-there": str(tmp_path / "x"), "hub": "org/m"}.get(broken, str(folder))
    with pytest.raises(UsageError) as caught:
        model.find(source, environment={"HF_HOME": str(tmp_path)})
    assert caught.value.hint


def test_weights_that_only_another_user_can_read_are_named(tmp_path: Path) -> None:
    file, user = tmp_path / "model.safetensors", os.geteuid()
    file.touch(0)
    if user == 0:
        # Root ignores file permissions.
        os.seteuid(65534)
    try:
        with pytest.raises(UsageError, match="cannot be read: permission denied") as refused:
            list(model.tensors(file))
    finally:
        os.seteuid(user)
    assert "chmod -R a+rX" in (refused.value.hint or "")


def test_outputs_become_vectors() -> None:
    encoded = base64.b64encode(struct.pack("<2f", 0.5, -2.0)).decode()
    for row in (encoded, [0.5, -2.0]):
        assert output_vectors.read({"embedding": row}, "dense", 9) == [0.5, -2.0]
        assert output_vectors.read({"token_embeddings": [row, row]}, "tokens", 9) == [0.5, -2.0, 0.5, -2.0]
    sparse = {"sparse_embedding": {"indices": [1, 3], "values": [0.5, 2.0]}}
    assert output_vectors.read(sparse, "sparse", 4) == [0.0, 0.5, 0.0, 2.0]
