"""Model folders compute what sentence-transformers computes with them, from raw text, or they do not start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from inferctl.core.errors import UsageError
from inferctl.models.model import find, resolve_task
from inferctl.reading import task_config
from inferctl.reading.rerank_config import RerankConfig
from inferctl.reading.rows import Vectors
from inferctl.serve.reference import reference
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from tests import engines, tiny_models
from tests.reading import saved_models
from tests.reading.saved_models import TEXTS, WIDTH, Modules


def pooled(*modes: str, **options: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling

    return Pooling(WIDTH, modes, **options)


def dense(inputs: int, outputs: int, activation: str = "Tanh", **options: Any) -> Any:
    import torch
    from sentence_transformers.base.modules import Dense

    return Dense(inputs, outputs, activation_function=getattr(torch.nn, activation)(), **options)


def layer_norm(size: int) -> Any:
    import torch
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    found = LayerNorm(size)
    torch.nn.init.normal_(found.norm.weight)
    torch.nn.init.normal_(found.norm.bias)
    return found


def dropout() -> Any:
    from sentence_transformers.sentence_transformer.modules import Dropout

    return Dropout()


def normalized() -> Any:
    from sentence_transformers.base.modules import Normalize

    return Normalize()


MEAN: Modules = lambda: [pooled("mean"), normalized()]  # noqa: E731
LAST: Modules = lambda: [pooled("lasttoken"), normalized()]  # noqa: E731

# Name: architecture, modules after the transformer, options of SentenceTransformer, settings of the architecture.
HEADS: dict[str, tuple[Modules, dict[str, Any]]] = {
    "mean + cls, not in the order of the flags": (lambda: [pooled("mean", "cls"), normalized()], {}),
    "all": (lambda: [pooled("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")], {}),
    "prompt excluded, without a prompt": (lambda: [pooled("mean", include_prompt=False)], {}),
    "Dense Tanh, as LaBSE": (lambda: [pooled("cls"), dense(WIDTH, WIDTH), normalized()], {}),
    "Dense Identity without bias, as sentence-t5": (
        lambda: [pooled("mean"), dense(WIDTH, 48, "Identity", bias=False), normalized()],
        {},
    ),
    "two Dense, as embeddinggemma": (
        lambda: [
            pooled("mean"),
            dense(WIDTH, 128, "Identity", bias=False),
            dense(128, WIDTH, "Identity", bias=False),
            normalized(),
        ],
        {},
    ),
    "Dense GELU": (lambda: [pooled("mean"), dense(WIDTH, 24, "GELU")], {}),
    "Dense with a residual": (lambda: [pooled("mean"), dense(WIDTH, WIDTH, use_residual=True)], {}),
    "Dense with a projected residual": (lambda: [pooled("mean"), dense(WIDTH, 12, use_residual=True)], {}),
    "three poolings, Dense, LayerNorm, Normalize": (
        lambda: [
            pooled("cls", "max", "mean"),
            dense(96, 16, "Identity", bias=False),
            layer_norm(16),
            normalized(),
        ],
        {"truncate_dim": 8},
    ),
    "Dropout": (lambda: [pooled("mean"), dropout(), dense(WIDTH, 16)], {}),
    "Normalize before Dense": (lambda: [pooled("mean"), normalized(), dense(WIDTH, 16)], {}),
    "truncated": (MEAN, {"truncate_dim": 8}),
    "truncated to more than there is": (MEAN, {"truncate_dim": 99}),
}
ARCHITECTURES: dict[str, tuple[str, Modules, dict[str, Any]]] = {
    **{
        name: (name, MEAN, {})
        for name in (
            *("bert", "distilbert", "electra", "roberta", "xlm-roberta", "mpnet", "modernbert", "nomic_bert"),
            *("albert", "camembert", "deberta-v2", "eurobert", "gte", "longformer", "big_bird"),
        )
    },
    **{name: (name, LAST, {}) for name in ("qwen3", "mistral", "gemma3_text", "gemma", "llama", "phi3", "qwen2")},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("bert", modules, options, settings)` returns the folder of a model."""
    return lambda architecture, modules=MEAN, options=None, **settings: saved_models.save(
        tmp_path_factory.mktemp(architecture), architecture, modules, options or {}, **settings
    )


def computed(folder: Path, precision: str = "fp32", texts: list[str] = TEXTS) -> tuple[Vectors, Any]:
    """Return what the engine computes for raw texts, and its info."""
    engine, info = engines.loaded(folder, precision, max_batch_tokens=256)
    pool = TokenizerPool(folder, task_config.read("embed", folder), threads=1)
    rows = pool.encode_now(texts, truncate=True)
    pool.close()
    return engine.run(engines.batch(rows)).rows, info


def check(folder: Path, attention: str = "packed", expected: Any = None, *, reduced: bool = True) -> Any:
    """Return the info in fp32. Raise unless the vectors equal those of sentence-transformers.

    `reduced`: they must be close in bf16, too.
    """
    expected = saved_models.vectors(folder, TEXTS) if expected is None else expected
    found, exact = computed(folder)
    assert found.shape == expected.shape
    assert attention in (exact.attention, "either"), exact.attention_reason
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))
    if reduced:
        rows, info = computed(folder, "bf16")
        assert attention in (info.attention, "either"), info.attention_reason
        norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((rows * expected).sum(axis=1) / norms).min() > 0.99
    return exact


@pytest.mark.parametrize("name", HEADS)
def test_poolings_and_layers_equal_sentence_transformers(saved: Any, name: str) -> None:
    modules, options = HEADS[name]
    check(saved("bert", modules, options), reduced=False)


def test_all_poolings_of_padded_states_equal_sentence_transformers(saved: Any) -> None:
    check(saved("mpnet", HEADS["all"][0]), "padded", reduced=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_equal_sentence_transformers(saved: Any, name: str) -> None:
    architecture, modules, settings = ARCHITECTURES[name]
    padded = ("mpnet", "deberta-v2", "longformer", "big_bird")
    attention = "padded" if architecture in padded else "packed"
    info = check(saved(architecture, modules, None, **settings), attention)
    assert info.causal is (modules is LAST)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("fnet", {}, "fp32 is inaccurate"),
        ("canine", {}, "CanineModel cannot be computed"),
        ("big_bird", {"attention_type": "block_sparse"}, "earlier ones"),
        ("nystromformer", {}, "other texts"),
    ],
)
def test_architectures_that_are_not_computed_exactly_do_not_start(
    saved: Any, architecture: str, settings: dict[str, Any], message: str
) -> None:
    folder = saved(architecture, **settings)
    with pytest.raises(UsageError, match=message):
        computed(folder)


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "codegen", "ctrl"])
def test_segments_that_a_model_looks_up_as_words_do_not_start(saved: Any, architecture: str) -> None:
    folder = saved(architecture)
    np.testing.assert_allclose(computed(folder)[0], saved_models.vectors(folder, TEXTS), atol=1e-5)
    edit(folder / "tokenizer_config.json", {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]})
    for changes in ({}, {"type_vocab_size": 2}):
        edit(folder / "config.json", changes)
        with pytest.raises(UsageError, match="segments"):
            computed(folder)


# Changes of config.json, and why the model does not start; None if they change nothing.
ODD: dict[str, tuple[dict[str, Any], str | None]] = {
    "no padding token": ({"pad_token_id": None}, None),
    "negative padding token": ({"pad_token_id": -1}, None),
    "padding token outside of the vocabulary": ({"pad_token_id": 99_999}, "cannot load"),
    "heads that do not divide the width": ({"num_attention_heads": 5}, "cannot load"),
    "chunks of one token": ({"chunk_size_feed_forward": 1}, None),
    "chunks that do not divide a text": ({"chunk_size_feed_forward": 3}, "BertModel cannot be computed"),
    "a decoder": ({"is_decoder": True}, "same result"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_change_nothing_or_do_not_start(with_dense: Path, tmp_path: Path, name: str) -> None:
    changes, message = ODD[name]
    shutil.copytree(with_dense, folder := tmp_path / "model")
    edit(folder / "config.json", changes)
    if message is None:
        np.testing.assert_allclose(computed(folder)[0], computed(with_dense)[0], atol=1e-6)
        return
    with pytest.raises(UsageError, match=message) as error:
        computed(folder)
    assert error.value.hint


# Architecture, and changes of config.json.
BARE: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder": ("bert", {}),
    "decoder": ("llama", {"architectures": ["LlamaModel"]}),
    "generative decoder": ("llama", {"architectures": ["LlamaForCausalLM"]}),
    "generative decoder in both directions": ("llama", {"architectures": ["LlamaForCausalLM"], "is_causal": False}),
}


@pytest.mark.parametrize("name", BARE)
def test_without_modules_the_library_reads_none_of_its_own_files(saved: Any, name: str) -> None:
    architecture, changes = BARE[name]
    folder = saved(architecture, LAST)
    (folder / "modules.json").unlink()
    edit(folder / LIBRARY, {"prompts": {"q": "Query: "}, "default_prompt_name": "q", "truncate_dim": 8})
    edit(folder / SETTINGS, {"max_seq_length": 20, "do_lower_case": True})
    edit(folder / "config.json", changes)
    np.testing.assert_allclose(computed(folder)[0], saved_models.vectors(folder, TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("part", "fault", "message"),
    [
        ("_pool", lambda vectors: vectors.roll(1, dims=1), "fp32 is inaccurate"),
        ("_Dense.forward", lambda vectors: vectors.roll(1, dims=1), "fp32 is inaccurate"),
        ("_Normalize.forward", lambda vectors: vectors * 1.1, "fp32 is inaccurate"),
        ("_pool", lambda vectors: vectors * 0, "same result for all"),
    ],
)
def test_the_start_finds_a_fault_in_poolings_and_layers(
    with_dense: Path, monkeypatch: pytest.MonkeyPatch, part: str, fault: Callable[[Any], Any], message: str
) -> None:
    from inferctl.serve.engines import pooling

    owner, _, name = part.rpartition(".")
    place: Any = getattr(pooling, owner) if owner else pooling
    original = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *arguments: fault(original(*arguments)))
    with pytest.raises(UsageError, match=message):
        computed(with_dense)


# Architecture, settings, attention ("either" if windows decide), modules.
DIRECTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama in both directions": ("llama", {"is_causal": False}, "packed"),
    "mistral in both directions": ("mistral", {"is_causal": False, "sliding_window": None}, "packed"),
    "mistral in both directions, in a window": ("mistral", {"is_causal": False}, "either"),
    "gemma3 in both directions, as BidirLM": ("gemma3_text", {"is_causal": False}, "either"),
    "gemma3 with its flag, as embeddinggemma": ("gemma3_text", {"use_bidirectional_attention": True}, "packed"),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_of_attention_equal_sentence_transformers(saved: Any, name: str) -> None:
    architecture, settings, attention = DIRECTIONS[name]
    folder = saved(architecture, **settings)
    info = check(folder, attention)
    assert info.causal is False
    causal = computed(saved(architecture, **settings | {"is_causal": True, "use_bidirectional_attention": False}))
    assert causal[1].causal is True
    assert np.abs(causal[0] - computed(folder)[0]).max() > 0.01  # so the direction matters to these weights


def test_a_soft_cap_is_computed(saved: Any) -> None:
    folder = saved("gemma2", LAST)
    expected = saved_models.vectors(folder, TEXTS, attn_implementation="eager")
    uncapped = saved("gemma2", LAST, attn_logit_softcapping=None)
    assert np.abs(expected - saved_models.vectors(uncapped, TEXTS, attn_implementation="eager")).max() > 0.01
    check(folder, "packed", expected)


@pytest.mark.parametrize("architecture", ["t5", "mt5"])
def test_the_encoder_of_t5_is_computed_alone(saved: Any, architecture: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(architecture)
    assert check(folder, "padded").causal is False
    computed(folder, "int8")  # whose layers it asks for their format; the start compares it with fp32
    weights = load_file(folder / "model.safetensors")
    decoder = {f"decoder.{name}": tensor.clone() for name, tensor in weights.items() if "block" in name}
    save_file(weights | decoder, folder / "model.safetensors", {"format": "pt"})
    check(folder, "padded")


def test_a_text_with_the_padding_token_has_the_positions_of_the_model(saved: Any) -> None:
    texts = ["one <pad> two <pad><pad> three", "plain", "<pad> first"]
    folder = saved("roberta")
    found, info = computed(folder, texts=texts)
    assert info.attention == "packed"
    np.testing.assert_allclose(found, saved_models.vectors(folder, texts), atol=1e-5)


def code(name: str, **settings: Any) -> dict[str, Any]:
    """Return what names code of its own in config.json."""
    return {"auto_map": {"AutoModel": name}, **settings}


# Changes of config.json after which transformers itself would compute something else, and the equal native settings.
@pytest.mark.parametrize(
    ("architecture", "foreign", "native"),
    [
        ("mistral", code("modeling_gritlm7b.MistralModel"), {"is_causal": False}),
        (
            "llama",
            code("llama_bidirectional_model.LlamaBidirectionalModel", model_type="llama_bidirec", pooling="avg")
            | {"architectures": ["LlamaBidirectionalModel"]},
            {"is_causal": False},
        ),
        ("qwen2", code("modeling_qwen.Qwen2Model", is_causal=False), {"is_causal": False}),
        ("gte", code("Alibaba-NLP/new-impl--modeling.NewModel", model_type="new"), {}),
        ("nomic_bert", code("nomic-ai/x--modeling_hf_nomic_bert.NomicBertModel"), {}),
    ],
)
def test_known_code_of_a_model_is_replaced_by_what_computes_the_same(
    saved: Any, architecture: str, foreign: dict[str, Any], native: dict[str, Any]
) -> None:
    folder = saved(architecture)
    edit(folder / "config.json", native)
    expected = saved_models.vectors(folder, TEXTS)
    edit(folder / "config.json", foreign)
    np.testing.assert_allclose(computed(folder)[0], expected, atol=1e-5)


def test_rotary_embeddings_of_gte_scale_as_its_own_code_does(saved: Any) -> None:
    import torch

    from inferctl.serve.engines import plain

    folder = saved("gte")
    scaling = {"model_type": "new", "rope_theta": 20000, "rope_scaling": {"type": "ntk", "factor": 8.0}}
    edit(folder / "config.json", scaling, without=("rope_parameters",))
    size = 8  # of a head
    found = plain.load_model(folder).rotary_emb.inv_freq
    expected = 1 / (20000 * 8.0) ** (torch.arange(0, size, 2) / size) / 8.0 ** (2 / size)
    torch.testing.assert_close(found, expected)


def edit(file: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({key: value for key, value in (content | changes).items() if key not in without}))


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "xlm-roberta"])
def test_a_cross_encoder_with_head_modules_equals_sentence_transformers(tmp_path: Path, architecture: str) -> None:
    from sentence_transformers import CrossEncoder

    first = saved_models.transformer(tmp_path / "transformer", architecture)
    scorer = dense(WIDTH, 1, "Identity", module_output_name="scores")
    modules = [first, pooled("cls"), dense(WIDTH, WIDTH, "GELU", bias=False), layer_norm(WIDTH), scorer]
    prompts = {"prompts": {"q": "the query: "}, "default_prompt_name": "q"} if architecture == "bert" else {}
    CrossEncoder(modules=modules, device="cpu", **prompts).save_pretrained(str(tmp_path / "saved"))
    folder = tmp_path / "saved"
    pairs = list(zip(TEXTS[:8], TEXTS[:8][::-1], strict=True))
    expected = CrossEncoder(str(folder), device="cpu").predict(pairs)

    assert resolve_task("auto", find(str(folder)), "m") == "rerank"
    config = task_config.read("rerank", folder)
    assert isinstance(config, RerankConfig)
    engine, info = engines.loaded(folder, task="rerank", max_batch_tokens=256)
    assert info.attention == "packed"
    batch = engines.batch_of_pairs(engines.encoded_pairs(folder, pairs, "rerank"))
    scores = config.scores(engine.run(batch).rows)[:, 0]
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    found = reference(str(folder), [list(pair) for pair in pairs])
    np.testing.assert_allclose(found["scores"], expected, atol=1e-5)


def test_segments_of_pairs_are_compared_if_the_size_of_their_table_is_the_default(tmp_path: Path) -> None:
    tiny_models.make_cross_encoder(folder := tmp_path / "model", "bert")
    edit(folder / "config.json", {}, without=("type_vocab_size",))
    started(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["pair"][2]["SpecialToken"]["type_id"] = 1  # the token between the texts
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="segments"):
        started(folder)


@pytest.mark.parametrize(
    ("architecture", "settings", "texts"),
    [
        ("esm", {"mask_token_id": 4}, ["a [MASK] b", "a river"]),  # scaled by the share of masks in a text
        ("phimoe", {"sliding_window": 1500, "max_position_embeddings": 4000}, ["the river " * 2000, "a"]),
        ("llama4_text", {"attention_chunk_size": 1500, "max_position_embeddings": 4000}, ["the river " * 2000, "a"]),
    ],
)
def test_what_only_padding_computes_is_padded(
    saved: Any, architecture: str, settings: dict[str, Any], texts: list[str]
) -> None:
    folder = saved(architecture, **settings)
    edit(folder / SETTINGS, {"max_seq_length": settings.get("max_position_embeddings", 128)})
    expected = np.concatenate([saved_models.vectors(folder, [text]) for text in texts])
    found, info = computed(folder, texts=texts)
    assert info.attention == "padded"
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("longest", [4, 64])
def test_a_token_that_the_configuration_asks_for_ends_each_text(saved: Any, longest: int) -> None:
    from transformers import AutoTokenizer

    folder = saved("qwen3", LAST)
    file = folder / "tokenizer.json"
    edit(file, {"post_processor": None})
    texts = ["a", *TEXTS]
    plain_ids = [ids[: longest - 1] for ids in AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]]
    sep = json.loads(file.read_text())["model"]["vocab"]["[SEP]"]
    edit(folder / "tokenizer_config.json", {"add_eos_token": True, "eos_token": "[SEP]"})
    pool = TokenizerPool(folder, task_config.read("embed", folder, longest), threads=1)
    found = [ids.tolist() for ids in pool.encode_now(texts, truncate=True)]
    pool.close()
    assert found == [[*ids, sep] for ids in plain_ids]
    expected = {"eos": "[SEP]", "eos_added_by": "add_eos_token", "lower_case": False, "max_tokens": longest}
    assert pool.facts == expected


def test_a_token_that_the_tokenizer_adds_is_not_added_again(saved: Any) -> None:
    folder = saved("qwen3", LAST)
    edit(folder / "tokenizer_config.json", {"add_eos_token": True, "eos_token": "[SEP]"})
    pool = TokenizerPool(folder, task_config.read("embed", folder), threads=1)
    (ids,) = pool.encode_now(["a"], truncate=True)
    assert len(set(ids.tolist()[-2:])) == 2
    assert pool.facts["eos_added_by"] == "tokenizer.json"


def test_the_direction_of_attention_is_that_of_a_model_with_a_mask_of_its_own() -> None:
    from transformers import AutoModel, BloomConfig

    from inferctl.serve.engines import plain

    config = BloomConfig(hidden_size=WIDTH, vocab_size=50, n_layer=2, n_head=4)
    assert plain.is_causal(AutoModel.from_config(config).eval())


Change: TypeAlias = Callable[[Path], Any]


def both(first: Change, second: Change) -> Change:
    return lambda folder: (first(folder), second(folder))


def changed(file: str, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Change:
    return lambda folder: edit(folder / file, changes, without)


def modules_changed(edit_list: Callable[[list[dict[str, Any]]], object]) -> Change:
    def change(folder: Path) -> None:
        listed: list[dict[str, Any]] = json.loads((folder / "modules.json").read_text())
        edit_list(listed)
        (folder / "modules.json").write_text(json.dumps(listed))

    return change


def module(name: str, position: int = 99, package: str = "sentence_transformers.models") -> Change:
    """Return a change that adds a module to the list."""
    entry = {"idx": 9, "name": "9", "path": f"9_{name}", "type": f"{package}.{name}"}
    return modules_changed(lambda listed: listed.insert(position, entry))


def keep_first(modules: list[dict[str, Any]]) -> None:
    del modules[1:]


def module_with(index: int, **values: str) -> Change:
    """Return a change of the entry of a module."""
    return modules_changed(lambda listed: listed[index].update(values))


def not_a_number(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "2_Dense" / "model.safetensors"
    weights = load_file(file)
    weights["linear.weight"] *= float("nan")
    save_file(weights, file)


def pickled(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def tokenizer_json(*path: str, value: Any, settings: dict[str, Any] | None = None) -> Change:
    """Change one value of tokenizer.json, which the class in `tokenizer_config.json` sets in its own way."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        inner = content
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value
        file.write_text(json.dumps(content))
        edit(folder / "tokenizer_config.json", BERT if settings is None else settings)

    return change


def third_token(processor: dict[str, Any]) -> dict[str, Any]:
    first = processor["single"][0]
    return processor | {"single": [first, first, *processor["single"][1:]]}


def without_modules(folder: Path) -> None:
    (folder / "modules.json").unlink()


def hundred_tokens(folder: Path) -> None:
    """Add tokens to tokenizer.json, the last of which strips blanks in `tokenizer_config.json` alone."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    added = {id: ADDED | {"id": id, "content": name} for name, id in content["model"]["vocab"].items() if id >= 1000}
    content["added_tokens"] += added.values()
    file.write_text(json.dumps(content))
    last = max(added)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    edit(
        folder / "tokenizer_config.json",
        settings | {"added_tokens_decoder": {str(last): added[last] | {"single_word": True}}},
    )


def transformer_below(folder: Path) -> None:
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder / name, folder / "0_Transformer")
    module_with(0, path="0_Transformer")(folder)


ADDED = {"content": "foo", **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)}
CUT = {"direction": "Left", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
POOLING, DENSE, SETTINGS = "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"
LIBRARY = "config_sentence_transformers.json"

BERT = {"tokenizer_class": "BertTokenizer"}
of_settings, of_library, of_config, of_dense, of_pooling, of_tokenizer = (
    partial(changed, file) for file in (SETTINGS, LIBRARY, "config.json", DENSE, POOLING, "tokenizer_config.json")
)
# What would be computed in another way than the folder says: the change of a model with Dense, and a part of the error.
HOLES: dict[str, tuple[Change, str]] = {
    "sparse encoder": (of_library({"model_type": "SparseEncoder"}), "sparse encoder of Transformer, Pooling"),
    "multi-vector": (of_library({"model_type": "MultiVectorEncoder"}), "Pooling module"),
    "ColBERT of PyLate": (of_library({"model_type": "ColBERT"}), "Pooling module"),
    "ColBERT of Stanford": (of_config({"architectures": ["HF_ColBERT"]}), "linear.weight"),
    "module of another package": (module("Dense", package="evil.models"), "not that of sentence_transformers"),
    "unknown module": (module("LSTM"), "LSTM module"),
    "module before pooling": (module("Normalize", 1), "no Pooling module"),
    "module before the transformer": (module("Router", 0), "Router module first"),
    "static embeddings before pooling": (module("StaticEmbedding", 0), "no .*safetensors weights"),
    "weighted layers": (module("WeightedLayerPooling", 1), "WeightedLayerPooling"),
    "no pooling module": (modules_changed(keep_first), "no Pooling module"),
    "modules are no list": (lambda folder: (folder / "modules.json").write_text("{}"), "not a list"),
    "transformer in a folder": (module_with(0, path="0_Transformer"), "0_Transformer"),
    "pooling of another folder": (module_with(1, path="2_Dense"), "no configuration of a Pooling"),
    "pooling folder missing": (module_with(1, path="7_Pooling"), "no configuration of a Pooling"),
    "unknown pooling": (of_pooling({"pooling_mode": "attention"}), "attention"),
    **{
        f"prompt excluded by {value}": (
            both(
                of_pooling({"include_prompt": value}),
                of_library({"prompts": {"q": "Query: "}, "default_prompt_name": "q"}),
            ),
            "default prompt",
        )
        for value in (False, None)
    },
    "settings for the tokenizer": (
        of_settings({"processing_kwargs": {"text": {"add_special_tokens": False}}}),
        "processing_kwargs.add_special_tokens",
    ),
    "old settings for the tokenizer": (of_settings({"tokenizer_args": {"do_lower_case": False}}), "do_lower_case"),
    "settings for config.json": (of_settings({"config_kwargs": {"num_hidden_layers": 1}}), "num_hidden_layers"),
    "settings of another tokenizer": (of_settings({"tokenizer_name_or_path": "x"}), "tokenizer_name_or_path"),
    "settings of queries": (of_settings({"query_length": 8}), "query_length"),
    "modules of another class": (of_library({"model_type": "Other"}), "those of a Other"),
    **{
        f"longest text {value!r}": (of_settings({"max_seq_length": value}), message)
        for value, message in [
            *((value, "not a number above 0") for value in (0, -1, True, "512", 20.5)),
            *((value, "no text fits") for value in (1, 2)),
        ]
    },
    "longest text of the tokenizer": (of_tokenizer({"model_max_length": -1}), "model_max_length"),
    "positions that are text": (of_config({"max_position_embeddings": "130"}), "max_position_embeddings"),
    "two modules of a name": (module_with(2, name="1"), "two modules with the name 1"),
    "Normalize of another output": (
        changed("3_Normalize/config.json", {"module_output_name": "other"}),
        "Normalize module",
    ),
    "no direction of attention": (of_config({"is_causal": None}), "is_causal"),
    "positions that grow with the batch": (
        both(
            of_config({"rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            of_settings({"max_seq_length": 500}),
        ),
        "dynamic RoPE",
    ),
    "Dense with pickled weights": (pickled, "a pickle"),
    "Dense of other sizes": (of_dense({"out_features": 8}), "linear.weight"),
    "Dense without its bias": (of_dense({"bias": False}), "linear.bias"),
    "Dense with an activation of its own": (of_dense({"activation_function": "my.GELU"}), "my.GELU"),
    "Dense with an unknown activation": (of_dense({"activation_function": "torch.nn.Softmax"}), "Softmax"),
    "Dense of tokens": (of_dense({"module_input_name": "token_embeddings"}), "token_embeddings"),
    "Dense with scores": (of_dense({"module_output_name": "scores"}), "scores"),
    "Dense with NaN": (not_a_number, "NaN"),
    "truncated to nothing": (of_library({"truncate_dim": 0}), "truncate_dim"),
    "masked language model": (of_settings({"transformer_task": "fill-mask"}), "fill-mask"),
    "chat template": (of_settings({"modality_config": {"message": {}}}), "chat template"),
    "another method": (of_settings({"modality_config": {"text": {"method": "get_text_features"}}}), "features"),
    "another output": (
        of_settings({"modality_config": {"text": {"method_output_name": "pooler_output"}}}),
        "pooler_output",
    ),
    "output of another name": (of_settings({"module_output_name": "pooled"}), "pooled"),
    "code of its own": (of_config(code("modeling_x.BertModel")), "code of its own"),
    "code of a renamed class": (of_config(code("jina--modeling_bert.JinaBertModel")), "code of its own"),
    "adapter": (changed("adapter_config.json", {"peft_type": "LORA"}), "adapter"),
    "tokenizer with code of its own": (
        of_tokenizer({"auto_map": {"AutoTokenizer": ["x.XTokenizer", None]}}),
        "x.XTokenizer",
    ),
    "tokenizer of another case": (tokenizer_json("normalizer", "lowercase", value=False), "disagree"),
    "tokenizer that keeps controls": (tokenizer_json("normalizer", "clean_text", value=False), "disagree"),
    "tokenizer with NFKC": (
        tokenizer_json("normalizer", value=lambda old: {"type": "Sequence", "normalizers": [{"type": "NFKC"}, old]}),
        "disagree",
    ),
    "tokenizer that splits at blanks": (tokenizer_json("pre_tokenizer", value={"type": "WhitespaceSplit"}), "disagree"),
    "tokenizer with another prefix": (tokenizer_json("model", "continuing_subword_prefix", value="@@"), "disagree"),
    "tokenizer of shorter words": (tokenizer_json("model", "max_input_chars_per_word", value=10), "disagree"),
    "tokenizer with another unknown token": (tokenizer_json("model", "unk_token", value="[MASK]"), "disagree"),
    "tokenizer with a third special token": (tokenizer_json("post_processor", value=third_token), "disagree"),
    **{
        f"tokenizer that is of {kind}": (
            of_tokenizer({"tokenizer_class": f"{kind}Tokenizer"}),
            "disagree|cannot load",
        )
        for kind in ("MPNet", "Llama", "T5", "Gemma", "XLMRoberta", "Roberta", "GPT2", "Albert")
    },
    "special tokens that are text": (of_tokenizer({"split_special_tokens": True}), "disagree"),
    "tokenizer of other special tokens": (tokenizer_json("post_processor", value=None), "disagree"),
    **{
        f"token in {file} alone": (changed(file, content), "disagree")
        for file, content in [
            ("tokenizer_config.json", {"added_tokens_decoder": {"1100": ADDED}}),
            ("added_tokens.json", {"foo": 1100}),
        ]
    },
    "the hundredth added token strips": (hundred_tokens, "disagree"),
    **{
        f"chat template in {file} without modules": (
            both(changed(file, {"chat_template": "{{ messages }}"}), without_modules),
            "chat template",
        )
        for file in ("tokenizer_config.json", "chat_template.jinja")
    },
    "truncation at the start": (of_tokenizer({"truncation_side": "left"}), "truncates at the start"),
    "truncation at the start by tokenizer.json": (
        changed("tokenizer.json", {"truncation": CUT}),
        "truncates at the start",
    ),
    "two poolings": (modules_changed(lambda listed: listed.insert(2, {**listed[1], "name": "9"})), "two Pooling"),
    "all of the transformer in a folder": (transformer_below, "Transformer module of .* is in 0_Transformer"),
    **{
        f"positions of {name}": (of_config({"model_type": kind, key: scaling}), "longrope")
        for name, kind, key, scaling in [
            ("longrope", "phi3", "rope_scaling", {"type": "longrope"}),
            ("longrope by its old name", "phi3", "rope_scaling", {"type": "su"}),
            ("longrope that Phi calls yarn", "phi3", "rope_parameters", {"rope_type": "yarn"}),
            ("longrope in some layers", "bert", "rope_parameters", {"full": {"rope_type": "longrope"}}),
        ]
    },
}


@pytest.fixture(scope="module")
def with_dense(saved: Any) -> Path:
    folder = saved("bert", HEADS["Dense Tanh, as LaBSE"][0])
    started(folder)
    return folder


@pytest.mark.parametrize("name", HOLES)
def test_what_would_be_computed_otherwise_does_not_start(with_dense: Path, tmp_path: Path, name: str) -> None:
    change, message = HOLES[name]
    folder = tmp_path / "model"
    shutil.copytree(with_dense, folder)
    change(folder)
    with pytest.raises(UsageError, match=message):
        started(folder)


def test_a_tokenizer_with_dropout_does_not_start(saved: Any) -> None:
    """Each text got other vectors each time."""
    folder = saved("roberta")
    started(folder)
    tokenizer_json("model", "dropout", value=0.1, settings={})(folder)
    with pytest.raises(UsageError, match=r"dropout: 0\.1"):
        started(folder)


def started(folder: Path) -> None:
    """Do what the start of a server does with the files of a folder, without the weights of the transformer."""
    from inferctl.serve.engines import tokenizer_check
    from inferctl.serve.engines.pooling import Layers

    config = task_config.read(resolve_task("auto", find(str(folder)), "m"), folder)
    tokenizer_check.checked(folder, config).close()
    Layers(folder, config.layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "new", "position_embedding_type": "absolute"}, "position_embedding_type"),
        ({"model_type": "new", "rope_scaling": {"type": "ntk", "factor": 2, "mixed_b": 0.1}}, "rope_scaling"),
        ({"model_type": "nomic_bert", "rotary_scaling_factor": 2}, "rotary_scaling_factor"),
        ({"model_type": "nomic_bert", "num_experts": 8}, "num_experts"),
        (code("modeling_qwen.Qwen2Model", model_type="qwen2", hidden_size=1536, is_causal=False), "another direction"),
        ({"model_type": "llama_bidirec", "pooling": "cls"}, "pools in its own way"),
        (code("modeling_jina.JinaEmbeddingsV5Model", model_type="eurobert"), "code of its"),
        (code("x--modeling_lora.XLMRobertaLoRA", model_type="xlm-roberta"), "code of its"),
    ],
)
def test_settings_that_only_code_of_the_model_computes_do_not_start(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit(tmp_path / "config.json", changes)
    with pytest.raises(UsageError, match=message):
        task_config.read("embed", tmp_path)


def test_settings_of_old_releases_have_other_file_names(with_dense: Path, tmp_path: Path) -> None:
    shutil.copytree(with_dense, folder := tmp_path / "model")
    (folder / SETTINGS).unlink()
    edit(folder / "sentence_roberta_config.json", {"max_seq_length": 77, "do_lower_case": True})
    config = task_config.read("embed", folder)
    assert (config.max_tokens, config.lower_case) == (77, True)


def test_positions_that_are_angles_end_where_the_transformer_module_says(saved: Any) -> None:
    folder = saved("qwen3", LAST)
    edit(folder / SETTINGS, {"max_seq_length": 300})  # config.json says 130
    texts = ["word " * 400, "a text"]
    np.testing.assert_allclose(
        computed(folder, texts=texts)[0], saved_models.vectors(folder, texts), atol=1e-5, rtol=1e-5
    )


def test_a_module_may_be_a_link_into_the_cache_of_the_hub(with_dense: Path, tmp_path: Path) -> None:
    snapshot, blobs = (tmp_path / "models--a--b" / name for name in ("snapshots/abc", "blobs"))
    shutil.copytree(with_dense, snapshot)
    blobs.mkdir()
    file = snapshot / "2_Dense" / "model.safetensors"
    shutil.move(file, blobs / "digest")
    file.symlink_to("../../../blobs/digest")
    started(snapshot)


def test_padding_in_the_tokenizer_does_not_count(with_dense: Path, tmp_path: Path) -> None:
    shutil.copytree(with_dense, folder := tmp_path / "model")
    padding = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    edit(folder / "tokenizer.json", {"padding": padding | {"pad_to_multiple_of": None}})
    edit(folder / "tokenizer_config.json", BERT)
    started(folder)


@pytest.mark.parametrize("own", [None, "Lowercase", "Strip"])
def test_lower_case_of_a_model_precedes_the_steps_of_its_tokenizer(saved: Any, own: str | None) -> None:
    folder = saved("modernbert")
    edit(folder / SETTINGS, {"do_lower_case": True})
    if own:
        replace = {"type": "Replace", "pattern": {"String": "SHOUTED"}, "content": "river"}
        last = {"type": own, "strip_left": True, "strip_right": True}
        tokenizer_json("normalizer", value={"type": "Sequence", "normalizers": [replace, last]}, settings={})(folder)
    np.testing.assert_allclose(computed(folder)[0], saved_models.vectors(folder, TEXTS), atol=1e-5)
