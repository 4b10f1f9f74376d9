"""Folders whose weights are not those of their model do not start; what harms no result does not keep one from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from tokenizers import Tokenizer

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.reading.rows import Vectors
from inferctl.serve.reference import reference
from tests import engines, tiny_models
from tests.processes import python

Weights: TypeAlias = dict[str, Any]
Change: TypeAlias = Callable[[Weights, Path], Weights]

ENCODERS = ("bert", "distilbert", "roberta", "mpnet", "modernbert", "qwen3")
CROSS_ENCODERS = ("bert", "distilbert", "roberta", "modernbert", "qwen3")


@pytest.fixture(scope="module")
def original(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Task, str], Path]:
    """`original("embed", "bert")` returns the folder of a model that nothing is wrong with."""

    @cache
    def make(task: Task, architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        if task == "rerank":
            return tiny_models.make_cross_encoder(folder, architecture)
        if task == "generate":
            return tiny_models.make_generator(folder, architecture)
        return tiny_models.make(minilm, folder, architecture, "mean_tokens")

    return make


def altered(folder: Path, target: Path, change: Change) -> Path:
    """Return a copy of the model in `folder`, with the weights that `change` returns."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = change(load_file(target / "model.safetensors"), target)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / "model.safetensors")
    return target


def vectors(folder: Path, task: Task = "embed", precision: str = "fp32") -> Vectors:
    """Start an engine in this process, and return what it computes for one input."""
    engine, info = engines.loaded(folder, precision, task=task, max_batch_tokens=64)
    assert info.within_limit
    ids = np.arange(20, 40, dtype=np.int32)
    found: Vectors = engine.run(engines.batch([ids], [10] if task == "rerank" else None)).rows
    return found


def configured(**settings: Any) -> Change:
    def change(weights: Weights, folder: Path) -> Weights:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return weights

    return change


def renamed(old: str, new: str) -> Change:
    """Return a change of the names that start with `old`."""
    return lambda weights, _: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in weights.items()
    }


def layers(count: int) -> Change:
    """Return a change of the number of layers in config.json."""

    def change(weights: Weights, folder: Path) -> Weights:
        types = json.loads((folder / "config.json").read_text()).get("layer_types")
        settings = {"layer_types": (types * 2)[:count]} if types else {}
        return configured(num_hidden_layers=count, n_layers=count, **settings)(weights, folder)

    return change


def without_one(weights: Weights, _: Path) -> Weights:
    name = next(name for name in weights if ".2." in name)
    return {other: tensor for other, tensor in weights.items() if other != name}


def without(part: str) -> Change:
    return lambda weights, _: {name: tensor for name, tensor in weights.items() if part not in f".{name}"}


def with_more(*names: str, number: str = "float32") -> Change:
    def change(weights: Weights, _: Path) -> Weights:
        import torch  # not when the tests are collected, which each worker does

        return weights | {name: torch.ones(3, dtype=getattr(torch, number)) for name in names}

    return change


def one_more_layer(weights: Weights, _: Path) -> Weights:
    return weights | {name.replace(".1.", ".7."): tensor.clone() for name, tensor in weights.items() if ".1." in name}


def in_a_layer(edit: Callable[[Any], Any]) -> Change:
    """Return a change of one matrix of a layer."""

    def change(weights: Weights, _: Path) -> Weights:
        name = next(name for name in weights if ".1." in name and weights[name].dim() == 2)
        return weights | {name: edit(weights[name].clone())}

    return change


def in_the_head(edit: Callable[[Any], Any]) -> Change:
    """Return a change of the matrix that returns the score."""

    def change(weights: Weights, _: Path) -> Weights:
        name = next(
            name for name in weights if weights[name].dim() == 2 and len(weights[name]) == 1 and "embed" not in name
        )
        return weights | {name: edit(weights[name])}

    return change


def in_a_row(number: float) -> Change:
    """Return a change of the embedding of a token that is in no check text."""

    def change(weights: Weights, _: Path) -> Weights:
        name = next(
            name for name in weights if name.endswith(("word_embeddings.weight", "tokens.weight")) or "tok_emb" in name
        )
        weights[name][777, 3] = number
        return weights

    return change


def as_number(name: str) -> Change:
    def converted(tensor: Any) -> Any:
        import torch

        return tensor.to(getattr(torch, name))

    return in_a_layer(converted)


def sharded(weights: Weights, folder: Path, lost: str | None = None) -> Weights:
    """Write the weights into two files with an index, without the weight `lost`."""
    from safetensors.torch import save_file

    names, index = list(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part if name != lost}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return weights


def larger_vocabulary(weights: Weights, folder: Path) -> Weights:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<one more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return weights


FAULTS: dict[str, tuple[Change, str]] = {
    "a layer is missing": (without(".1."), r"lack [\w.]+\.1\..* and \d+ more"),
    "a weight is missing": (without_one, r"lack [\w.]+\.2\.[\w.]+$"),
    "a foreign prefix": (renamed("", "encoder.model."), r"lack .*; they include others .*: encoder\.model\."),
    "the prefix of an old sentence-transformers": (renamed("", "0.auto_model."), r"others .*: 0\.auto_model\."),
    "one more layer": (one_more_layer, r"others than those of the model: [\w.]+\.7\."),
    "fewer layers in config.json": (layers(2), "others than those of the model: "),
    "more layers in config.json": (layers(4), r"lack [\w.]+\.3\."),
    "another shape": (
        in_a_layer(lambda tensor: tensor[:-1]),
        r"another shape than the model: [\w.]+ \(\d+x\d+, not \d+x",
    ),
    "another type": (configured(model_type="albert"), "lack "),
    "a type that nobody knows": (configured(model_type="nothing"), "does not know the model type"),
    "no weights": (lambda weights, _: {}, "lack "),
    "a dense layer at the top": (with_more("linear.weight"), r"others than those of the model: linear\.weight"),
    "an adapter's weights": (with_more("base_model.model.x.lora_A.weight"), "lora_A"),
    "8-bit floats": (as_number("float8_e4m3fn"), r"are quantized: [\w.]+ \(F8_E4M3\)"),
    "8-bit integers": (as_number("int8"), r"are quantized: [\w.]+ \(I8\)"),
    "a quantized checkpoint": (configured(quantization_config={"quant_method": "fp8"}), "are quantized"),
    "NaN": (in_a_row(float("nan")), "have NaN or infinity: "),
    "infinity": (in_a_row(float("-inf")), "have NaN or infinity: "),
    "a vocabulary larger than the embeddings": (larger_vocabulary, "has token ids up to"),
}


@pytest.mark.parametrize("architecture", ["bert", "qwen3"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_weights_of_an_encoder_are_refused(original: Any, tmp_path: Path, architecture: str, fault: str) -> None:
    change, message = FAULTS[fault]
    folder = altered(original("embed", architecture), tmp_path / "model", change)
    with pytest.raises(UsageError, match=message):
        vectors(folder)
    # The reference is of use for texts without the additional token.
    if architecture == "bert" and "vocabulary" not in fault:
        with pytest.raises(UsageError, match=message):
            reference(str(folder), ["a text"])


def prefixed(weights: Weights, folder: Path) -> Weights:
    """Add the prefix that a model with a head gives to its encoder."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return renamed("", "model." if kind in ("modernbert", "qwen3") else f"{kind.replace('-', '_')}.")(weights, folder)


HARMLESS: dict[str, Change] = {
    "stored positions": with_more("embeddings.position_ids", number="int64"),
    "stored frequencies": with_more("rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.inv_freq"),
    "a counter of the training": with_more("pooler.bn.num_batches_tracked", number="int64"),
    "heads of the pretraining": with_more("cls.predictions.bias", "lm_head.weight", "vocab_transform.bias"),
    "a head for classes": with_more("classifier.dense.weight", "score.weight"),
    "no pooler": without(".pooler."),
    "the prefix of a model with a head": prefixed,
    "constants in config.json of another library": configured(torch_dtype="float16"),
}


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_harmless_differences_do_not_change_a_vector(
    original: Any, tmp_path: Path, architecture: str, change: Change
) -> None:
    folder = original("embed", architecture)
    np.testing.assert_array_equal(vectors(altered(folder, tmp_path / "model", change)), vectors(folder))


@pytest.mark.parametrize("lost", [False, True])
def test_the_files_of_an_index_are_loaded_and_none_of_their_weights_is_missing(
    original: Any, tmp_path: Path, lost: bool
) -> None:
    folder = original("embed", "bert")
    name = "encoder.layer.2.output.dense.weight"
    copy = altered(folder, tmp_path / "model", lambda weights, to: sharded(weights, to, name if lost else None))
    (copy / "model.safetensors").unlink()
    if lost:
        with pytest.raises(UsageError, match=f"lack {name}$"):
            vectors(copy)
    else:
        np.testing.assert_array_equal(vectors(copy), vectors(folder))


CROSS_ENCODER_FAULTS: dict[str, tuple[Change, str]] = {
    "no head": (without(".classifier."), "lack classifier."),
    "a layer is missing": (without(".1."), r"lack [\w.]+\.1\."),
    "a foreign prefix": (renamed("", "encoder.model."), "lack .*; they include others"),
    "a head of another architecture": (with_more("scores.weight"), r"others than those of the model: scores\.weight"),
    "two labels": (in_the_head(lambda tensor: tensor.repeat(2, 1)), r"another shape than the model: [\w.]+ \(2x"),
    "NaN in the head": (in_the_head(lambda tensor: tensor * float("nan")), "have NaN or infinity: "),
}


@pytest.mark.parametrize("architecture", ["bert", "qwen3"])
@pytest.mark.parametrize("fault", CROSS_ENCODER_FAULTS)
def test_wrong_weights_of_a_cross_encoder_are_refused(
    original: Any, tmp_path: Path, architecture: str, fault: str
) -> None:
    change, message = CROSS_ENCODER_FAULTS[fault]
    if architecture == "qwen3" and fault == "no head":
        change, message = without(".score."), "lack score."
    folder = altered(original("rerank", architecture), tmp_path / "model", change)
    with pytest.raises(UsageError, match=message):
        vectors(folder, "rerank")
    if architecture == "bert":
        with pytest.raises(UsageError, match=message):
            reference(str(folder), [["a query", "a document"]])


@pytest.mark.parametrize("architecture", CROSS_ENCODERS)
def test_heads_of_the_pretraining_do_not_change_a_score(original: Any, tmp_path: Path, architecture: str) -> None:
    folder = original("rerank", architecture)
    change = with_more("lm_head.bias", "cls.predictions.bias")
    np.testing.assert_array_equal(vectors(altered(folder, tmp_path / "m", change), "rerank"), vectors(folder, "rerank"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head"), "lack lm_head.weight$"),
        (without(".1."), r"lack model\.layers\.1\."),
        (one_more_layer, r"others than those of the model: model\.layers\.7\."),
        (as_number("float8_e4m3fn"), "are quantized"),
        (prefixed, "lack "),
    ],
)
def test_the_reference_of_generation_refuses_wrong_weights(
    original: Any, tmp_path: Path, change: Change, message: str
) -> None:
    folder = altered(original("generate", "llama"), tmp_path / "model", change)
    with pytest.raises(UsageError, match=message):
        reference(str(folder), ["a text"])


def test_tied_weights_are_not_missing(original: Any, tmp_path: Path) -> None:
    def tie(weights: Weights, folder: Path) -> Weights:
        configured(tie_word_embeddings=True)(weights, folder)
        return without("lm_head")(weights, folder)

    folder = altered(original("generate", "llama"), tmp_path / "model", tie)
    assert reference(str(folder), ["a text"])["texts"]


@pytest.mark.parametrize("command", [["inferctl", "serve"], ["inferctl.serve"]])
def test_a_server_ends_once_with_what_is_wrong(original: Any, tmp_path: Path, command: list[str]) -> None:
    folder = altered(original("embed", "bert"), tmp_path / "model", without(".1."))
    done = python("-m", *command, "--model", folder, "--port", "0", cwd=tmp_path, timeout=120, code=2)
    assert done.stderr.count("encoder.layer.1.attention.output.LayerNorm.bias") == 1
    assert "and 13 more" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
