"""Models of StaticEmbedding compute what sentence-transformers computes with them, from raw text, or do not start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.models import model
from inferctl.reading import embedding_config, model_summary, space, task_config
from inferctl.serve.reference import library, reference
from inferctl.serve.text.text_parts import InputError
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests.reading.saved_models import TEXTS
from tests.reading.test_saved_models import CUT, changed, computed, dense, edit, layer_norm, module, normalized
from tests.tiny_models import make_tokenizer

SIZE = 32
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """`save(modules, kind)` returns the folder of random static embeddings with the tokenizer of a kind of models.

    `change` is called with its tokenizer. `options` go to SentenceTransformer.
    """

    def save_(
        modules: list[Any] | None = None,
        kind: str = "bert",
        change: Callable[[Any], Any] = lambda _: None,
        **options: Any,
    ) -> Path:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        torch.manual_seed(0)
        tokenizer = make_tokenizer(kind)._tokenizer
        change(tokenizer)
        tokenizer.no_padding()
        first = StaticEmbedding(tokenizer, embedding_dim=SIZE)
        folder = tmp_path / "model"
        SentenceTransformer(modules=[first, *(modules or [])], device="cpu", **options).save(str(folder))
        return folder

    return save_


def in_a_folder(folder: Path) -> None:
    """Move the module to where older releases of the library have it."""
    (place := folder / "0_StaticEmbedding").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).rename(place / name)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0] |= {"path": place.name, "type": "sentence_transformers.models.StaticEmbedding"}
    (folder / "modules.json").write_text(json.dumps(listed))


def test_the_space_depends_on_the_tokenizer_that_is_used(save: Save) -> None:
    folder = save()
    in_a_folder(folder)
    file = folder / "0_StaticEmbedding" / "tokenizer.json"
    spaces, rows = [], []
    for _ in range(2):
        spaces.append(space.read(folder, embedding_config.read(folder))["dense"].name)
        rows.append(computed(folder)[0])
        found = json.loads(file.read_text())
        found["model"]["vocab"] |= {"a": found["model"]["vocab"]["##a"], "##a": found["model"]["vocab"]["a"]}
        file.write_text(json.dumps(found))
    assert spaces[0] != spaces[1] and not np.allclose(*rows)


def as_model2vec(folder: Path) -> None:
    """Write what model2vec writes: other names, a configuration, and `.` as the path of the module."""
    store(folder, lambda table: {"embeddings": table})
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "architectures": ["StaticModel"]}))
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([listed[0] | {"path": "."}, *listed[1:]]))


def store(folder: Path, change: Callable[[Any], dict[str, Any]]) -> None:
    """Replace the weights by what `change` makes of the table."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)["embedding.weight"]), file)


def quantized(table: Any) -> dict[str, Any]:
    """Return 50 rows that all tokens share, and a weight for each token."""
    import torch

    mapping, weights = torch.arange(len(table)) * 7 % 50, torch.rand(len(table), dtype=torch.float64)
    return {"embeddings": table[:50].clone(), "mapping": mapping, "weights": weights}


# Modules after the first one, kind of tokenizer, options of SentenceTransformer, change of the folder.
CASES: dict[str, tuple[Callable[[], list[Any]], str, dict[str, Any], Callable[[Path], Any]]] = {
    "alone": (list, "bert", {}, lambda _: None),
    "normalized": (lambda: [normalized()], "bert", {}, lambda _: None),
    "byte-level": (list, "qwen3", {}, lambda _: None),
    "sentencepiece": (list, "xlm-roberta", {}, lambda _: None),
    "truncated": (lambda: [normalized()], "bert", {"truncate_dim": 8}, lambda _: None),
    "with Dense and LayerNorm": (lambda: [dense(SIZE, 12), layer_norm(12)], "bert", {}, lambda _: None),
    "with a default prompt": (
        list, "bert", {"prompts": {"query": "find this: "}, "default_prompt_name": "query"}, lambda _: None,
    ),
    "in a folder of its own": (list, "bert", {}, in_a_folder),
    "of model2vec": (lambda: [normalized()], "bert", {}, as_model2vec),
    "of model2vec, quantized": (list, "bert", {}, lambda folder: store(folder, quantized)),
    "of model2vec, with a mapping": (
        list, "bert", {},
        lambda folder: store(
            folder, lambda table: {name: quantized(table)[name] for name in ("embeddings", "mapping")}
        ),
    ),
    "in fp16": (list, "bert", {}, lambda folder: store(folder, lambda table: {"embedding.weight": table.half()})),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_vectors_equal_sentence_transformers(save: Save, name: str) -> None:
    modules, kind, options, change = CASES[name]
    change(folder := save(modules(), kind, **options))
    found, info = computed(folder)
    expected = library(folder, "embed")(TEXTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert (info.attention, info.dimensions, info.cosine_min) == ("none", expected.shape[1], pytest.approx(1))
    assert len(reference(str(folder), TEXTS)["embeddings"]) == len(TEXTS)


@pytest.mark.parametrize("precision", ["auto", "bf16", "int8"])
def test_every_precision_is_fp32(save: Save, precision: str) -> None:
    folder = save()
    found, info = computed(folder, precision)
    assert (info.precision.requested, info.precision.effective) == (precision, "fp32")
    np.testing.assert_array_equal(found, computed(folder)[0])


def test_no_special_tokens_are_added_and_a_text_without_tokens_is_zero(save: Save) -> None:
    folder = save()
    pool = TokenizerPool(folder, task_config.read("embed", folder))
    assert [len(ids) for ids in pool.encode_now(["a", "a a", " "], truncate=False)] == [1, 2, 1]
    assert pool.facts["eos"] is None
    pool.close()
    found, _ = computed(folder, texts=["a", " ", "a  "])
    assert not found[1].any()
    np.testing.assert_array_equal(found[0], found[2])


def test_only_truncation_of_the_tokenizer_itself_counts(save: Save) -> None:
    text = "word " * 5_000
    folder = save()
    assert task_config.read("embed", folder).max_tokens > 5_000
    np.testing.assert_allclose(computed(folder, texts=[text])[0], library(folder, "embed")([text]), atol=1e-5)
    edit(folder / "sentence_bert_config.json", {"max_seq_length": 3})
    assert task_config.read("embed", folder).max_tokens > 5_000
    edit(folder / "tokenizer.json", {"truncation": CUT | {"direction": "Right", "max_length": 7}})
    texts = ["one two three four five six seven eight nine"]
    np.testing.assert_allclose(computed(folder, texts=texts)[0], library(folder, "embed")(texts), atol=1e-5)
    pool = TokenizerPool(folder, task_config.read("embed", folder))
    assert pool.facts["max_tokens"] == 7
    with pytest.raises(InputError):
        pool.encode_now(texts, truncate=False)
    pool.close()
    np.testing.assert_allclose(library(folder, "embed", 2)(texts), library(folder, "embed")(["one two"]), atol=1e-5)


def test_what_is_said_of_a_folder(save: Save) -> None:
    in_a_folder(folder := save([normalized()]))
    found = model.find(str(folder))
    assert (found.architecture, model.resolve_task("auto", found, "m")) == ("StaticEmbedding", "embed")
    assert found.parameters > 0
    assert found.parameters == sum(map(len, [make_tokenizer("bert")])) * SIZE
    summary = model_summary.read("embed", folder)
    assert (summary["static"], summary["pooling"], summary["normalize"]) == (True, "mean", True)
    with pytest.raises(UsageError, match="an embedding model"):
        model.resolve_task("rerank", found, "m")


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def table(change: Callable[[Any], dict[str, Any]]) -> Callable[[Path], Any]:
    return lambda folder: store(folder, change)


def mapped(**changes: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def change(table: Any) -> dict[str, Any]:
        found = quantized(table)
        return found | {name: make(found[name]) for name, make in changes.items()}

    return lambda folder: store(folder, change)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


# Change of a folder, and a part of the error.
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (without("model.safetensors"), "safetensors"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer.json"),
    "pickled": (pickled, "pickle"),
    "no table": (table(lambda table: {"weight": table}), "weight"),
    "another tensor": (table(lambda table: {"embedding.weight": table, "bias": table[0].clone()}), "bias"),
    "one dimension": (table(lambda table: {"embedding.weight": table[0].clone()}), "embedding.weight"),
    "three dimensions": (table(lambda table: {"embeddings": table[None].clone()}), "embeddings"),
    "less rows than tokens": (
        table(lambda table: {"embedding.weight": table[:-9].clone()}),
        "embeddings or weights for",
    ),
    "8-bit rows": (table(lambda table: {"embeddings": (table * 40).char()}), "fp32, bf16 or fp16"),
    "NaN": (table(lambda table: {"embedding.weight": table * float("nan")}), "NaN"),
    "a short mapping": (mapped(mapping=lambda values: values[:-9].clone()), "mapping"),
    "a mapping outside": (mapped(mapping=lambda values: values + 1), "mapping"),
    "a negative mapping": (mapped(mapping=lambda values: values - 1), "mapping"),
    "a mapping of fractions": (mapped(mapping=lambda values: values.float()), "mapping"),
    "weights of another shape": (mapped(weights=lambda values: values[:, None].clone()), "weights"),
    "weights of NaN": (mapped(weights=lambda values: values * float("nan")), "NaN"),
    "Pooling": (module("Pooling"), "Pooling module"),
    "a module of tokens": (module("WeightedLayerPooling"), "WeightedLayerPooling"),
    "truncation at the start": (changed("tokenizer.json", {"truncation": CUT}), "truncates at the start"),
    "an adapter": (changed("adapter_config.json", {"peft_type": "LORA"}), "adapter"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_computed_otherwise_does_not_start(save: Save, name: str) -> None:
    change, message = WRONG[name]
    change(folder := save())
    with pytest.raises(UsageError, match=message):
        computed(folder)
