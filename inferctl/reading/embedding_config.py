"""The embedding configuration of a model folder: pooling, layers, prompts, longest input. Read without torch.

The formats are those of the files that sentence-transformers writes (see `modules`,
`config_sentence_transformers.json`) and of transformers' `config.json` and `tokenizer_config.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, ClassVar

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.models import model
from inferctl.reading import architecture, modules, output_config, prompts
from inferctl.reading.modules import NO_LIMIT, Layer, Normalize, PoolingMode, read_object
from inferctl.reading.output_config import STATIC_TOKENS
from inferctl.reading.outputs import FORMS, ROLES, Form, Output, Role, SparseConfig, TokensConfig
from inferctl.reading.prompts import NO_PROMPTS, Prompts

# RoBERTa-like models number positions from the padding index + 1, which reduces the usable positions.
_OFFSET_TYPES = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm", "data2vec-text"}
)


@dataclass(frozen=True)
class EmbeddingConfig:
    """How a model turns token vectors into an embedding.

    `pooling`: modes whose vectors are concatenated. `layers`: applied to the pooled vector. `truncate_dim`: numbers
    that remain of the result, without another normalization; None for all. `max_tokens` includes special tokens.
    `assumed`: the folder does not name a pooling, so that of its kind is used. `matryoshka`: the dimensions that
    vectors can be truncated to, empty if the model was not trained for truncation, None if any number is allowed.
    `static`: as in `ModelFolder`; then the token vectors are rows of a table, and no special tokens are added.
    `sparse`, `tokens`: how the other outputs are computed, None without them. Without a dense vector, `pooling` is
    empty. The vectors of tokens of a model that was not trained for them are their states.
    """

    task: ClassVar[Task] = "embed"
    takes_texts: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = False
    labels: ClassVar[tuple[str, ...]] = ()
    takes_instruction: ClassVar[bool] = False
    pooling: tuple[PoolingMode, ...]
    max_tokens: int
    layers: tuple[Layer, ...] = ()
    truncate_dim: int | None = None
    prompts: Prompts = NO_PROMPTS
    lower_case: bool = False
    assumed: bool = False
    matryoshka: tuple[int, ...] | None = ()
    static: str | None = None
    sparse: SparseConfig | None = None
    tokens: TokensConfig | None = None

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs that a request can have; the first one is that of requests that name none."""
        found: dict[Output, object] = {"dense": self.pooling, "sparse": self.sparse, "tokens": self.tokens}
        return tuple(name for name, config in found.items() if config)

    @property
    def trained(self) -> tuple[Output, ...]:
        """The outputs that the model was trained for: the states of tokens are none of them."""
        return tuple(name for name in self.outputs if name != "tokens" or self.tokens != TokensConfig())

    @property
    def checked(self) -> Form:
        """The outputs that a start compares with fp32: those that the model was trained for."""
        return reduce(or_, (FORMS[name] for name in self.trained))

    def text_options(self, role: Role) -> dict[str, Any]:
        """Return the options of `TokenizerPool.encode` for a query, a document, or a text of unknown role."""
        limit = self.tokens.limit(role) if self.tokens else None
        if self.sparse is None or self.sparse.query_length is None:
            return {"limit": limit, "special_tokens": True}
        looked_up = role == "query"
        return {"limit": self.sparse.query_length if looked_up else self.max_tokens, "special_tokens": not looked_up}

    @property
    def longest_text(self) -> int:
        """The most tokens of any text, also of a query that the transformer does not read."""
        return max(self.max_tokens, (self.sparse.query_length or 0) if self.sparse else 0)

    @property
    def has_logits(self) -> bool:
        """Whether the sparse weights are made of the logits of a masked language model."""
        return self.sparse is not None and self.sparse.folder is None

    @property
    def facts(self) -> dict[str, Any]:
        """What `GET /info` says of it, besides what all tasks have."""
        return {
            "static": self.static is not None,
            "pooling_assumed": self.assumed,
            "normalize": self.normalize,
            "truncate_dim": self.truncate_dim,
            "outputs": self.outputs,
            "trained_outputs": self.trained,
            "prompts": {"names": self.prompts.names, "default": self.prompts.default},
        }

    @property
    def tei_type(self) -> dict[str, Any]:
        """What clients of text-embeddings-inference choose by."""
        pooling = "splade" if self.outputs == ("sparse",) else "+".join(self.pooling) or "mean"
        return {"embedding": {"pooling": "last_token" if pooling == "last" else pooling}}

    @property
    def normalize(self) -> bool:
        """Whether the vectors have length 1, if they are not truncated."""
        return self.layers[-1:] == (Normalize(),)


def read(folder: Path, max_input_tokens: int | None = None) -> EmbeddingConfig:
    """Return the configuration of a model folder. Raises `UsageError` for what is not supported."""
    outputs = output_config.read(folder)
    if outputs is not None and not outputs.dense:
        tokens, sparse = outputs.tokens, outputs.sparse
        lengths = [tokens.limit(role) or 0 for role in ROLES] if tokens else []
        settings = input_settings(folder, max_input_tokens, pooled=True, lengths=lengths)
        texts = {**settings["prompts"].texts, **outputs.prompts}
        expansion = tokens.expansion if tokens else None
        if expansion is not None and expansion.length > settings["max_tokens"]:
            raise UsageError(
                f"queries of {folder} have {expansion.length} tokens, above the limit of {settings['max_tokens']}",
                "raise `serve.max_input_tokens`, or correct the length of `query_expansion` in the files of the model",
            )
        settings["prompts"] = replace(settings["prompts"], texts=texts)
        if tokens is not None:
            tokens = replace(tokens, length=input_settings(folder, max_input_tokens, pooled=True)["max_tokens"])
        if sparse is not None and sparse.query_length is not None and max_input_tokens is not None:
            sparse = replace(sparse, query_length=min(sparse.query_length, max_input_tokens))
        return EmbeddingConfig((), sparse=sparse, tokens=tokens, **settings)
    found = modules.read(folder, "embed")
    static = found.static if found else None
    pooled = found is None or found.include_prompt
    tokens = outputs.tokens if outputs else None if static else TokensConfig()
    return EmbeddingConfig(
        sparse=outputs.sparse if outputs else None,
        tokens=tokens,
        pooling=found.pooling if found else _assumed_pooling(folder),
        layers=found.layers if found else (),
        truncate_dim=modules.number(folder, modules.library_settings(folder), "truncate_dim"),
        assumed=found is None,
        matryoshka=_matryoshka(read_object(folder / "config.json")),
        static=static,
        **input_settings(folder, max_input_tokens, pooled=pooled, static=static is not None),
    )


def _assumed_pooling(folder: Path) -> tuple[PoolingMode, ...]:
    """Return the pooling that sentence-transformers chooses for a folder without modules."""
    config = architecture.native_config(folder)
    causal = model.architecture(config).endswith("ForCausalLM") and config.get("is_causal", True)
    return ("last",) if causal else ("mean",)


def input_settings(
    folder: Path, max_input_tokens: int | None, *, pooled: bool, static: bool = False, lengths: Sequence[int] = ()
) -> dict[str, Any]:
    """Return `max_tokens`, `prompts` and `lower_case` of a model folder of any task. `pooled`: as in `Prompts`.

    `lengths`: of queries and documents, which may be above `max_seq_length`.
    """
    transformer = {} if static else modules.transformer_settings(folder)
    config = read_object(folder / "config.json")
    longest = STATIC_TOKENS if static else _longest(folder, config, transformer)
    if max(lengths, default=0) > longest:
        longest = _longest(folder, config, transformer | {"max_seq_length": max(lengths)})
    return {
        "max_tokens": min(longest, max_input_tokens or longest),
        "prompts": prompts.read(modules.library_settings(folder), pooled=pooled),
        "lower_case": bool(transformer.get("do_lower_case", False)),
    }


def _longest(folder: Path, config: dict[str, Any], transformer: dict[str, Any]) -> int:
    tokenizer = read_object(folder / "tokenizer_config.json")
    own = modules.number(folder, transformer, "max_seq_length")
    positions = None
    if not (own and _rotates(config)) and config.get("max_position_embeddings") != -1:  # XLNet has no limit
        positions = modules.number(folder, config, "max_position_embeddings")
    if positions and config.get("model_type") in _OFFSET_TYPES:
        positions -= int(config.get("pad_token_id") or 0) + 1
    if own and positions and own > positions and _rope_type(config) == "dynamic":
        raise UsageError(
            f"`max_seq_length` of {folder} is {own}, above max_position_embeddings ({positions}): with dynamic RoPE, "
            "the vector of a longer text depends on the other texts of its batch",
            f"set `max_seq_length` to {positions} in sentence_bert_config.json",
        )
    if own is None:
        name = "max_len" if tokenizer.get("model_max_length") is None else "model_max_length"
        own = modules.number(folder, tokenizer, name)
    return min((limit for limit in (positions, own) if limit is not None and limit < NO_LIMIT), default=512)


def _rotates(config: dict[str, Any]) -> bool:
    """Return whether positions are angles that exist for texts of any length, as sentence-transformers uses them."""
    known = ("rope_theta", "rope_parameters", "rotary_emb_base", "global_rope_theta")
    return any(config.get(name) for name in known) and _rope_type(config) not in ("dynamic", "longrope")


def _rope_type(config: dict[str, Any]) -> str:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _matryoshka(config: dict[str, Any]) -> tuple[int, ...] | None:
    dimensions = config.get("matryoshka_dimensions")
    if isinstance(dimensions, list):
        return tuple(int(d) for d in dimensions)
    return None if config.get("is_matryoshka") else ()
