"""Changes to a model folder keep or change the names of its spaces, as the vectors of the fp32 reference do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from inferctl.reading import embedding_config, space
from inferctl.reading.outputs import Form, mark
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests.reading import saved_models
from tests.reading.saved_models import TEXTS, WIDTH
from tests.reading.test_outputs import multi_vector
from tests.reading.test_saved_models import MEAN, dense, edit, normalized, pooled

Change: TypeAlias = Callable[[Path], Any]
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"
LIBRARY, POOLING = "config_sentence_transformers.json", "1_Pooling/config.json"
MASK = "2_MultiVectorMask/config.json"
PAD = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}


def values(change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS, **options: Any) -> Change:
    """Return a change of the tensors of a file, which `change` gets by name."""

    def write(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / file)
        tensors = change(tensors) or tensors
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, **options)

    return write


def stored(kind: str) -> Change:
    return values(lambda found: {name: getattr(each, kind)() for name, each in found.items()})


def shifted(end: str, by: float = 0.5, file: str = WEIGHTS) -> Change:
    """Return a change that adds random numbers to tensors. LayerNorm would undo equal ones."""

    def add(found: dict[str, Any]) -> None:
        import torch

        for each in (each for name, each in found.items() if name.endswith(end)):
            each.add_(by * torch.randn(each.shape, generator=torch.Generator().manual_seed(0)))

    return values(add, file)


def shards(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    by_name = {name: names[number % 2] for number, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if by_name[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": by_name}))
    (folder / WEIGHTS).unlink()


def swapped_layers(found: dict[str, Any]) -> dict[str, Any]:
    other = {"layer.0.": "layer.1.", "layer.1.": "layer.0."}
    return {
        next((name.replace(old, new) for old, new in other.items() if old in name), name): each
        for name, each in found.items()
    }


def setting(file: str, **changes: Any) -> Change:
    return lambda folder: edit(folder / file, changes)


def rewritten(file: str, change: Callable[[Any], Any]) -> Change:
    def write(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found, indent=1))

    return write


tokenizer, modules = partial(rewritten, TOKENIZER), partial(rewritten, "modules.json")


def swapped_ids(found: dict[str, Any]) -> None:
    vocabulary = found["model"]["vocab"]
    one, other = "a", "##a"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def moved(folder: Path) -> None:
    (folder / "1_Pooling").rename(folder / "pooled")
    modules(lambda found: found[1].update(path="pooled", name="x"))(folder)


def written(file: str, text: str = "{}") -> Change:
    def write(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)

    return write


def modes(name: str) -> Change:
    old = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken", "weightedmean_tokens")
    flags = {f"pooling_mode_{each}": each == name for each in old}
    new = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "weightedmean_tokens": "weightedmean"}
    return lambda folder: edit(folder / POOLING, {**flags, "pooling_mode": new.get(name, name)})


# What was changed: the change, and `serve.max_input_tokens` if it is that.
SAME: dict[str, Change] = {
    "metadata of the weights": values(lambda _: None, metadata={"format": "pt", "by": "someone"}),
    "order of the tensors": values(lambda found: dict(reversed(found.items()))),
    "two shards": shards,
    "exact values in bf16": stored("bfloat16"),
    "exact values in fp64": stored("double"),
    "values of the pooler": shifted("pooler.dense.bias"),
    "no pooler": values(lambda found: {name: each for name, each in found.items() if "pooler" not in name}),
    "stored position ids": values(lambda found: found.update({"embeddings.position_ids": _arange(130)})),
    "a head of the pretraining": values(lambda found: found.update({"cls.seq_relationship.bias": _arange(2).float()})),
    "a prefix of all names": values(lambda found: {f"bert.{name}": each for name, each in found.items()}),
    "README": written("README.md", "other"),
    "an ONNX export": written("onnx/model.onnx", "x"),
    "version of transformers": setting(CONFIG, transformers_version="1.0"),
    "name of the folder of training": setting(CONFIG, _name_or_path="elsewhere"),
    "dtype": setting(CONFIG, torch_dtype="bfloat16", dtype="bfloat16"),
    "cache": setting(CONFIG, use_cache=False),
    "dropout": setting(CONFIG, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, classifier_dropout=0.3),
    "labels": setting(CONFIG, id2label={"0": "yes"}, label2id={"yes": 0}),
    "initialization": setting(CONFIG, initializer_range=0.9),
    "space in tokenizer.json": tokenizer(lambda _: None),
    "truncation of the tokenizer": setting(
        TOKENIZER, truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    ),
    "padding of the tokenizer": setting(TOKENIZER, padding={"strategy": {"Fixed": 40}, "direction": "Right", **PAD}),
    "cleaning of decoded text": setting("tokenizer_config.json", clean_up_tokenization_spaces=True),
    "folder of a module": moved,
    "versions of the library": setting(LIBRARY, __version__={"sentence_transformers": "9"}),
    "similarity function": setting(LIBRARY, similarity_fn_name="dot"),
}
OTHER: dict[str, Change] = {
    "a bias of the last layer": shifted("layer.1.output.LayerNorm.bias"),
    "a small step of training": shifted("layer.0.output.dense.weight", 1e-2),
    "words": shifted("word_embeddings.weight"),
    "positions": shifted("position_embeddings.weight"),
    "segments": shifted("token_type_embeddings.weight"),
    "order of the layers": values(swapped_layers),
    "rounded to fp8": values(lambda found: {name: _rounded(each) for name, each in found.items()}),
    "weights of Dense": shifted("linear.weight", 0.1, "2_Dense/model.safetensors"),
    "activation of Dense": setting("2_Dense/config.json", activation_function="torch.nn.modules.activation.ReLU"),
    "without Dense": modules(lambda found: found.pop(2)),
    "without Normalize": modules(lambda found: found.pop(3)),
    "cls pooling": modes("cls_token"),
    "max pooling": modes("max_tokens"),
    "weighted mean": modes("weightedmean_tokens"),
    "truncated vectors": setting(LIBRARY, truncate_dim=8),
    "prompt of queries": setting(LIBRARY, prompts={"query": "find: ", "document": "passage: "}),
    "prompt of documents": setting(LIBRARY, prompts={"query": "query: ", "document": ""}),
    "default prompt": setting(LIBRARY, default_prompt_name="query"),
    "shorter texts": setting("sentence_bert_config.json", max_seq_length=6),
    "upper case": tokenizer(lambda found: found["normalizer"].update(lowercase=False)),
    "accents": tokenizer(lambda found: found["normalizer"].update(strip_accents=False)),
    "ids of two tokens": tokenizer(swapped_ids),
    "long words": tokenizer(lambda found: found["model"].update(max_input_chars_per_word=3)),
    "no special tokens": tokenizer(lambda found: found.update(post_processor=None)),
    "heads of attention": setting(CONFIG, num_attention_heads=2),
    "activation": setting(CONFIG, hidden_act="relu"),
    "epsilon of norms": setting(CONFIG, layer_norm_eps=0.1),
}


# The parts in which the definitions differ, where they are not the weights.
PARTS: dict[str, str] = {
    **dict.fromkeys([name for name in OTHER if "Dense" in name or "Normalize" in name], "layers"),
    **dict.fromkeys(["cls pooling", "max pooling", "weighted mean"], "pooling"),
    **dict.fromkeys(["upper case", "accents", "ids of two tokens", "long words", "no special tokens"], "tokenizer"),
    "truncated vectors": "truncate_dim",
    "prompt of queries": "prompts.query",
    "prompt of documents": "prompts.document",
    "default prompt": "default_prompt",
    "shorter texts": "max_tokens",
    "heads of attention": "config.num_attention_heads",
    "activation": "config.hidden_act",
    "epsilon of norms": "config.layer_norm_eps",
}


def _arange(count: int) -> Any:
    import torch

    return torch.arange(count)


def _rounded(tensor: Any) -> Any:
    import torch

    return tensor.to(torch.float8_e4m3fn).to(torch.float32)


def computed(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Return the vectors of the reference by output, of texts without a role, and as queries and documents."""
    from inferctl.serve.engines.plain import Reference

    config = embedding_config.read(folder, limit)
    reference, pool = Reference(folder, config), TokenizerPool(folder, config, threads=1)
    prompts = [config.prompts.select(input_type=role) for role in (None, "query", "document")]
    rows = [row for prompt in prompts for row in pool.encode_now(TEXTS[:-1], truncate=True, prompt=prompt)]
    pool.close()
    if config.pooling:
        return {"dense": reference.embed(rows)}
    form = Form.SPARSE if config.sparse else Form.TOKENS
    found = [reference.outputs(row, mark(form)) for row in rows]
    if config.tokens:
        return {"tokens": np.concatenate([outputs.tokens for outputs in found])}
    sparse = np.zeros((len(rows), reference.vocabulary_size), np.float32)
    for row, outputs in zip(sparse, found, strict=True):
        row[outputs.ids] = outputs.weights
    return {"sparse": sparse}


def spaces(folder: Path, limit: int | None = None) -> dict[Any, space.Space]:
    return space.read(folder, embedding_config.read(folder, limit))


def names(folder: Path, limit: int | None = None) -> dict[str, str]:
    return {output: each.name for output, each in spaces(folder, limit).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder whose weights bf16 has exactly, its spaces, and its vectors."""
    import torch

    parts = lambda: [pooled("mean"), dense(WIDTH, 24, bias=True), normalized()]  # noqa: E731
    prompts = {"query": "query: ", "document": "passage: "}
    folder = saved_models.save(tmp_path_factory.mktemp("space"), "bert", parts, {"prompts": prompts})
    values(lambda found: {name: each.bfloat16().to(torch.float32) for name, each in found.items()})(folder)
    return folder, spaces(folder), computed(folder)["dense"]


@pytest.fixture(scope="module")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multi_vector(tmp_path_factory.mktemp("colbert"), "bert", ["the"], {})


@pytest.mark.parametrize(("name", "same"), [(name, each is SAME) for each in (SAME, OTHER) for name in each])
def test_a_name_changes_if_the_vectors_do(base: Any, tmp_path: Path, name: str, same: bool) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(base[0], folder)
    (SAME if same else OTHER)[name](folder)
    found = computed(folder)["dense"]
    equal = found.shape == base[2].shape and np.allclose(found, base[2], rtol=0, atol=1e-5)
    old, new = base[1]["dense"], spaces(folder)["dense"]
    assert (old.name == new.name, equal) == (same, same)
    assert set(space.differences(old.definition, new.definition)) == (set() if same else {PARTS.get(name, "weights")})


@pytest.mark.parametrize(("limit", "same"), [(6, False), (128, True)])
def test_a_limit_of_the_server_is_part_of_it(base: Any, limit: int, same: bool) -> None:
    equal = np.allclose(computed(base[0], limit)["dense"], base[2], rtol=0, atol=1e-5)
    assert (spaces(base[0], limit) == base[1], equal) == (same, same)


@pytest.mark.parametrize(
    ("model", "output", "change", "same"),
    [
        ("splade", "sparse", shifted("pooler.dense.bias"), True),
        ("splade", "sparse", setting(CONFIG, torch_dtype="float16"), True),
        ("splade", "sparse", shifted("predictions.transform.dense.weight"), False),
        ("splade", "sparse", shifted("layer.0.output.dense.bias"), False),
        ("colbert", "tokens", setting(CONFIG, torch_dtype="float16"), True),
        ("colbert", "tokens", setting(MASK, skiplist_words=["the", ","]), False),  # one text has a comma
        ("colbert", "tokens", shifted("linear.weight", 0.1, "1_Dense/model.safetensors"), False),
        ("colbert", "tokens", setting(LIBRARY, prompts={"query": "[D] ", "document": "[D] "}), False),
    ],
)
def test_sparse_weights_and_vectors_of_tokens_have_spaces(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, output: str, change: Change, same: bool
) -> None:
    source, folder = request.getfixturevalue(model), tmp_path / "changed"
    shutil.copytree(source, folder)
    change(folder)
    before, after = computed(source)[output], computed(folder)[output]
    equal = before.shape == after.shape and np.allclose(before, after, rtol=0, atol=1e-5)
    assert (names(folder) == names(source), equal) == (same, same)


def test_the_dropout_of_tokens_of_esm_is_computed(tmp_path: Path) -> None:
    folder = saved_models.save(tmp_path, "esm", MEAN, {}, mask_token_id=4)
    before = names(folder), computed(folder)["dense"]
    setting(CONFIG, token_dropout=False)(folder)
    assert names(folder)["dense"] != before[0]["dense"]
    assert not np.allclose(computed(folder)["dense"], before[1], rtol=0, atol=1e-5)


def test_variants_and_outputs_have_names_of_their_own(base: Any) -> None:
    whole = base[1]["dense"]
    found = [whole, *base[1].values(), whole.variant(dimensions=8), whole.variant(dimensions=9), whole.variant(a=1)]
    assert len({each.name for each in found}) == len(found) - 1
    assert space.Space("dense", json.loads(json.dumps(whole.definition))).name == whole.name
