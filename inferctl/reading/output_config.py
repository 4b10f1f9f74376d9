"""Which outputs a model folder has besides one dense vector: its sparse weights and its vectors of tokens.

The formats are those of sentence-transformers (`SparseEncoder`, `MultiVectorEncoder`), of PyLate 3 and older, of
Stanford's ColBERT (`artifact.metadata`), and of BGE-M3 as `inferctl convert` writes it. Read without torch.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from inferctl.core.errors import UsageError, shown
from inferctl.models import model
from inferctl.models.model import BGE_M3, ROUTER_FILE, ModelFolder
from inferctl.reading import modules
from inferctl.reading.modules import Dense, Normalize, read_object
from inferctl.reading.outputs import Expansion, SparseConfig, TokensConfig
from inferctl.reading.tokenizer_files import token_text

_HINT = "use a model of another kind, or save it again with a current sentence-transformers"
_TOKEN_SETTINGS = ("query_length", "document_length", "query_expansion")
# What ColBERT and PyLate add to a query, and the tokens that documents of them do not return.
_DEFAULT_QUERY_LENGTH = 32
_PUNCTUATION = tuple(string.punctuation)
TOKENIZER = "tokenizer_config.json"
# The most tokens of what no transformer reads. The tokenizer needs 100 bytes per token.
STATIC_TOKENS = 32_768
_SPECIAL = ("cls_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class OutputConfig:
    """`dense`: whether there is a dense vector too. `prompts`: those that its files name in another way."""

    dense: bool = False
    sparse: SparseConfig | None = None
    tokens: TokensConfig | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)


def read(folder: Path) -> OutputConfig | None:
    """Return the outputs of a model folder; None if it has dense vectors alone.

    Raises `UsageError` for modules and settings that are not supported.
    """
    settings = modules.library_settings(folder)
    kind = settings.get("model_type")
    packages = {str(module.get("type", "")).partition(".")[0] for module in ModelFolder(folder).modules}
    if kind is None and ("pylate" in packages or {"query_prefix", "document_prefix"} & settings.keys()):
        kind = "ColBERT"  # of a PyLate that did not say so
    if kind == "SparseEncoder":
        return OutputConfig(sparse=_splade(folder))
    if kind in ("MultiVectorEncoder", "ColBERT"):
        return _multi_vector(folder, old=kind == "ColBERT")
    if model.architecture(read_object(folder / "config.json")) == "HF_ColBERT":
        return _stanford(folder)
    if all((folder / name / "model.safetensors").is_file() for name in BGE_M3):
        return _bge_m3(folder)
    return None


def _splade(folder: Path) -> SparseConfig:
    first, *others = modules.listed_modules(folder)
    if [name for name, _ in others] != ["SpladePooling"]:
        listed = ", ".join(name for name, _ in (first, *others))
        raise UsageError(f"{folder} is a sparse encoder of {listed}, which is not supported", _HINT)
    modules.check_transformer(folder, first, "fill-mask")
    settings = modules.settings_of(folder, others[0][1])
    pooling, activation = settings.get("pooling_strategy", "max"), settings.get("activation_function", "relu")
    if pooling not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise UsageError(f"{folder} has SpladePooling with {shown(pooling)} and {shown(activation)}", _HINT)
    routes = modules.read_object(folder / ROUTER_FILE).get("structure") or {}
    query = str(routes["query"][0]) if routes.get("query") else None
    length = (
        None if query is None else modules.number(folder, read_object(folder / query / TOKENIZER), "model_max_length")
    )
    return SparseConfig(
        pooling=pooling,
        twice=activation == "log1p_relu",
        query_weights=query,
        query_length=None if query is None else min(length or STATIC_TOKENS, STATIC_TOKENS),
        most=modules.number(folder, modules.library_settings(folder), "max_active_dims"),
    )


def _multi_vector(folder: Path, *, old: bool) -> OutputConfig:
    """Return the outputs of a `MultiVectorEncoder`, or of a PyLate model, whose mask and normalization are implied."""
    settings = modules.library_settings(folder)
    first, *others = modules.listed_modules(folder, ("sentence_transformers", "pylate"))
    modules.check_transformer(folder, first, known=_TOKEN_SETTINGS)
    own = modules.transformer_settings(folder)
    layers, words, tasks = [], list[str](), ["document"]
    for name, path in others:
        found = modules.settings_of(folder, path)
        if name == "MultiVectorMask":
            words, tasks = _words(found, "skiplist_words", []), _words(found, "skiplist_tasks", ["document"])
            if found.get("keep_only_token_ids"):
                raise UsageError(f"{folder} keeps the vectors of some tokens alone, which is not supported", _HINT)
            continue
        layer = modules.read_layer(folder, name, path)
        source = found.get("module_input_name") or ("token_embeddings" if name == "Dense" else "sentence_embedding")
        if source != "token_embeddings" or found.get("module_output_name") not in (None, source):
            raise UsageError(f"the {name} module in {path} of {folder} does not continue with token vectors", _HINT)
        layers.append(layer)
    prefixes = {
        role: str(settings.get(f"{role}_prefix") or "")
        for role in ("query", "document")
        if f"{role}_prefix" in settings
    }
    prompts = settings.get("prompts") or {}
    composed = {role: prefix + str(prompts.get(role) or "").removeprefix(prefix) for role, prefix in prefixes.items()}
    lengths = {name: settings.get(name) if own.get(name) is None else own[name] for name in _TOKEN_SETTINGS}
    without = "query_expansion" not in own and "query_expansion" not in settings
    if without and (old or prefixes) and settings.get("do_query_expansion") is not False:
        attend = settings.get("attend_to_expansion_tokens", settings.get("attend_to_mask_tokens"))
        length = lengths.pop("query_length", None) or _DEFAULT_QUERY_LENGTH
        lengths["query_expansion"] = {"strategy": "fixed", "attend": bool(attend), "length": length}
    if old:
        words = _words(settings, "skiplist_words", list(_PUNCTUATION))
        layers.append(Normalize())
    tokenizer = _tokenizer(folder)
    config = TokensConfig(
        layers=tuple(layers),
        skipped=_ids(tokenizer, words),
        skips_queries="query" in tasks,
        query_length=modules.number(folder, lengths, "query_length"),
        document_length=modules.number(folder, lengths, "document_length"),
        expansion=_expansion(folder, tokenizer, lengths.get("query_expansion")),
        markers=_markers(tokenizer, prefixes.values()),
        mean=settings.get("similarity_fn_name") == "meanmaxsim",
    )
    return OutputConfig(tokens=config, prompts=composed)


def _stanford(folder: Path) -> OutputConfig:
    """Return the outputs of Stanford's ColBERT, whose projection is among the weights of the transformer."""
    metadata = read_object(folder / "artifact.metadata")
    shape = next((s for f in ModelFolder(folder).weight_files for n, s in model.shapes(f) if n == "linear.weight"), ())
    if len(shape) != 2:
        raise UsageError(f"{folder} has no weights linear.weight, which ColBERT projects with", _HINT)
    tokenizer = _tokenizer(folder)
    prompts = {
        "query": (metadata.get("query_token_id") or "[unused0]") + " ",
        "document": (metadata.get("doc_token_id") or "[unused1]") + " ",
    }
    expansion = {
        "strategy": "fixed",
        "attend": bool(metadata.get("attend_to_mask_tokens")),
        "length": metadata.get("query_maxlen") or _DEFAULT_QUERY_LENGTH,
    }
    config = TokensConfig(
        layers=(Dense("", shape[1], shape[0], bias=False, activation="Identity", residual=False), Normalize()),
        skipped=_ids(tokenizer, _PUNCTUATION if metadata.get("mask_punctuation", True) else ()),
        document_length=modules.number(folder, {"document_length": metadata.get("doc_maxlen")}, "document_length"),
        expansion=_expansion(folder, tokenizer, expansion),
        markers=_markers(tokenizer, prompts.values()),
    )
    return OutputConfig(tokens=config, prompts=prompts)


def _bge_m3(folder: Path) -> OutputConfig:
    """Return the three outputs of BGE-M3: FlagEmbedding gives special tokens no weight, and the first one no vector."""
    sparse, tokens = BGE_M3
    found = [dict(model.shapes(folder / name / "model.safetensors")).get("linear.weight", ()) for name in BGE_M3]
    width = read_object(folder / "config.json").get("hidden_size")
    if found[0] != (1, width) or len(found[1]) != 2 or found[1][1] != width:
        shapes = " and ".join(str(list(shape)) for shape in found)
        raise UsageError(f"{folder} has layers of {shapes} for states of {shown(width)}", "convert the model again")
    out_features, in_features = found[1]
    ignored = _ids(_tokenizer(folder), (token for name in _SPECIAL if (token := _special(folder, name))))
    layer = Dense(tokens, in_features, out_features, bias=True, activation="Identity", residual=False)
    return OutputConfig(
        True, SparseConfig(folder=sparse, ignored=ignored), TokensConfig(layers=(layer, Normalize()), first=1)
    )


def _expansion(folder: Path, tokenizer: Tokenizer, found: Any) -> Expansion | None:
    if found is None:
        return None
    strategy, length = found.get("strategy"), found.get("length")
    if strategy not in ("fixed", "min") or type(length) is not int or length < 1:
        raise UsageError(f"`query_expansion` of {folder} is {shown(found)}", "correct the file")
    token = found.get("token") or _special(folder, "mask_token") or _special(folder, "eos_token")
    number = None if token is None else tokenizer.token_to_id(token)
    if number is None:
        raise UsageError(f"{folder} extends queries by {shown(token)}, which its tokenizer does not have", _HINT)
    return Expansion(length, number, bool(found.get("attend", False)), strategy == "fixed")


def _special(folder: Path, name: str) -> str | None:
    """Return a special token of a tokenizer, by its name in the files of transformers."""
    found = (token_text(read_object(folder / file).get(name)) for file in (TOKENIZER, "special_tokens_map.json"))
    return next((text for text in found if text is not None), None)


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001  # the library raises bare Exception
        raise UsageError(f"{folder / 'tokenizer.json'} cannot be read: {error}", "download the model again") from None


def _ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[int, ...]:
    """Return the ids of the words that are one token."""
    return tuple(sorted({number for word in words if (number := tokenizer.token_to_id(word)) is not None}))


def _markers(tokenizer: Tokenizer, prefixes: Iterable[str]) -> tuple[str, ...]:
    """Return for each prefix the token that it is, or that it begins with, if the tokenizer splits it."""
    found = []
    for prefix in prefixes:
        candidates = (prefix, *prefix.split(maxsplit=1)[:1]) if prefix.split() else ()
        token = next((each for each in candidates if tokenizer.token_to_id(each) is not None), None)
        if token is not None and tokenizer.encode(token, add_special_tokens=False).tokens != [token]:
            found.append(token)
    return tuple(found)


def _words(settings: Mapping[str, Any], name: str, default: list[str]) -> list[str]:
    found = settings.get(name)
    found = default if found is None else [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise UsageError(f"`{name}` is {shown(found)}, not a list of texts", "correct the file")
    return found
