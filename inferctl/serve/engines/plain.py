"""The reference implementation that other paths are compared with: transformers, fp32, CPU, one text at a time."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.models.flops import ModelFlops
from inferctl.reading import architecture
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.modules import Dense, Layer, LayerNorm, LogitScore, PoolingMode, read_object
from inferctl.reading.outputs import Form, Outputs, SparseConfig, attended_of, form_of
from inferctl.reading.rows import Tokens, Vectors
from inferctl.reading.segments import returns_segments
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.engines import weights
from inferctl.serve.engines.flops import FlopCounter
from inferctl.serve.text.text_parts import Pair

# Types with a decoder, which `AutoModel` would load with random weights if the folder has only the encoder.
_WITH_DECODER = frozenset({"t5", "mt5", "umt5"})


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, *, task: Task = "embed", config: TaskConfig | None = None
) -> Any:
    """Return the encoder of a model folder, or for other tasks the whole model with its head, in evaluation mode.

    The head of `generate` returns the logits of the next token. With a `config` of sparse weights that are made of
    logits, it is the masked language model.

    Raises `UsageError` as `weights.load` does, and for segments that the server does not compute.
    """
    silence_libraries()
    from transformers import (
        CONFIG_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTextEncoding,
    )

    settings, options = architecture.native_config(folder), dict[str, Any]()
    check_type(settings)
    if settings != read_object(folder / "config.json"):
        options["config"] = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    auto: Any = AutoModelForTextEncoding if settings.get("model_type") in _WITH_DECODER else AutoModel
    if task != "embed":
        auto = AutoModelForCausalLM if task == "generate" else AutoModelForSequenceClassification
    if isinstance(config, EmbeddingConfig):
        options["logits"] = config.has_logits
        options["projection"] = config.tokens is not None and any(
            isinstance(layer, Dense) and not layer.folder for layer in config.tokens.layers
        )
        auto = AutoModelForMaskedLM if config.has_logits else auto
    model = weights.load(auto, folder, task, dtype, **options)
    if returns_segments(folder) and _embeds_segments_as_words(model):
        raise UsageError(
            f"{folder} has a tokenizer that returns segments (token_type_ids), for which {type(model).__name__} adds "
            "the vectors of words; this is not supported",
            "if the model was trained without them, remove `token_type_ids` from `model_input_names` in "
            "tokenizer_config.json",
        )
    if attention(model) == "eager":
        model.set_attn_implementation("eager")
    if task == "embed" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # sentence embeddings do not use it
    model.config.use_cache = False  # there is no next token, for which a decoder would keep all keys and values
    return model


def token_score(config: TaskConfig) -> LogitScore | None:
    """Return of which logits of a language model the score is made; None for other models."""
    return next((layer for layer in config.layers if isinstance(layer, LogitScore)), None)


def loaded_task(config: TaskConfig) -> Task:
    """Return the task of `load_model` for a configuration: that of the model before its pooling and layers."""
    return "generate" if token_score(config) else "embed" if config.pooling else config.task


def check_type(settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` for the `config.json` of a model whose type transformers does not know."""
    from transformers import CONFIG_MAPPING

    if "model_type" in settings and (kind := settings["model_type"]) not in CONFIG_MAPPING:
        raise UsageError(
            f"transformers {transformers.__version__} does not know the model type {kind!r}", "use a newer transformers"
        )


def attention(model: Any) -> str:
    """Return the attention of transformers that computes this model exactly, with padding."""
    # torch's own attention leaves out the soft cap of scores, and some architectures do not have it.
    soft_cap = getattr(model.config, "attn_logit_softcapping", None)
    return "eager" if soft_cap or not getattr(model, "_supports_sdpa", True) else "sdpa"


@torch.inference_mode()
def is_causal(model: Any) -> bool:
    """Return whether the tokens of a model attend only to those before them."""
    encoder = model.base_model
    if getattr(model.config, "is_causal", True) is False:
        return False
    said = [found for each in encoder.modules() if (found := getattr(each, "is_causal", None)) is not None]
    if said:
        return any(said)
    # Bloom, MPT and Mamba say it nowhere. Then the state of a token does not depend on the one after it.
    first, other = (encoder(input_ids=torch.tensor([[1, last]])).last_hidden_state[0, 0] for last in (2, 3))
    return torch.allclose(first, other, rtol=1e-4)


def silence_libraries() -> None:
    """Keep what transformers logs while it loads a model out of the log: errors remain."""
    # transformers imports torchao if it is installed, which logs errors about kernels for absent GPUs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class Reference:
    """A model folder with one sequence at a time, in formulas that share no code with `pooling` and `Forward`.

    It shares the configuration of the folder and the model of transformers with them, so errors in those do not show.
    `vocabulary_size`: as in `Forward`. `causal`: as in `EngineInfo`.
    """

    def __init__(self, folder: Path, config: TaskConfig, *, by_layer: bool = False) -> None:
        """Raises `UsageError` as `load_model` does.

        `by_layer`: keep the weights in the format of the files, and convert those of one layer at a time.
        """
        self._folder, self._config = folder, config
        self._scored = token_score(config)
        static = config.static if isinstance(config, EmbeddingConfig) else None
        self._table: npt.NDArray[np.float64] | None = None
        self.causal: bool | None = None
        self._counter = FlopCounter()
        if static is None:
            dtype = weights.stored_format(folder) if by_layer else torch.float32
            self._model = load_model(folder, dtype, task=loaded_task(config), config=config)
            if dtype != torch.float32:
                _compute_in_fp32(self._model)
            self._model.requires_grad_(False)  # else the counter follows gradients
            self.vocabulary_size = int(self._model.base_model.get_input_embeddings().num_embeddings)
            self.causal = is_causal(self._model)
        else:
            self._table = weights.static_table(folder, static).double().numpy()
            self.vocabulary_size = len(self._table) - 1

    @torch.inference_mode()
    def embed(self, sequences: list[Tokens]) -> Vectors:
        """Return float32 [sequences, dimensions]. Each sequence is a forward of its own with a mask of attention."""
        assert isinstance(self._config, EmbeddingConfig)
        return np.stack([self._vector({"input_ids": ids})[: self._config.truncate_dim] for ids in sequences])

    @torch.inference_mode()
    def outputs(self, ids: Tokens, number: int) -> Outputs:
        """Return the outputs of one sequence with a mark."""
        config, form = self._config, form_of(number)
        assert isinstance(config, EmbeddingConfig)
        found = Outputs()
        sparse, tokens = config.sparse, config.tokens
        if sparse is not None and sparse.query_weights is not None and Form.QUERY in form:
            table = weights.query_weights(self._folder, sparse.query_weights)
            by_id = _largest({token: float(table[token]) for token in set(ids.tolist()) if table[token]}, sparse.most)
            return Outputs(ids=np.array(list(by_id), np.int32), weights=np.array([*by_id.values()], np.float32))
        result = self._run({"input_ids": ids}, attended_of(number, len(ids)))
        states = None if config.has_logits else result.last_hidden_state[0].double().numpy()
        if Form.DENSE in form:
            assert states is not None
            found = found._replace(dense=self._pooled(states)[: config.truncate_dim])
        if Form.SPARSE in form and sparse is not None:
            by_id = _sparse(self._folder, sparse, ids, states, None if states is not None else result.logits[0])
            by_id = _largest(by_id, sparse.most)
            found = found._replace(ids=np.array(list(by_id), np.int32), weights=np.array([*by_id.values()], np.float32))
        if Form.TOKENS in form and tokens is not None:
            assert states is not None
            skipped = tokens.skipped if Form.QUERY not in form or tokens.skips_queries else ()
            rows = states[[at for at in range(tokens.first, len(ids)) if int(ids[at]) not in skipped]]
            for layer in tokens.layers:
                rows = _applied(self._folder, layer, rows)
            found = found._replace(tokens=rows.astype(np.float32))
        return found

    @torch.inference_mode()
    def score(self, sequences: list[Pair]) -> Vectors:
        """Return the logits of texts or pairs: float32 [sequences, labels]. Each is a forward of its own."""
        rows = []
        for ids, second_start in sequences:
            inputs: dict[str, npt.NDArray[Any]] = {"input_ids": ids}
            if has_segments(self._model):
                inputs["token_type_ids"] = np.arange(len(ids)) >= second_start
            if self._scored is not None:
                logits = self._run(inputs, logits_to_keep=1).logits[0, -1].float().numpy()
                false = self._scored.false_token
                true = logits[[self._scored.true_token]]
                rows.append(true if false is None else true - logits[false])
            else:
                whole = not self._config.pooling
                rows.append(self._run(inputs).logits[0].float().numpy() if whole else self._vector(inputs))
        return np.stack(rows)

    def _run(self, inputs: dict[str, npt.NDArray[Any]], attended: int | None = None, **options: int) -> Any:
        given = {name: torch.from_numpy(values.astype(np.int64))[None] for name, values in inputs.items()}
        mask = torch.ones_like(given["input_ids"])
        mask[:, attended:] = 0 if attended is not None else 1
        with self._counter.counting(mask.shape[1]):
            return self._model(**given, attention_mask=mask, **options)

    @property
    def flops(self) -> ModelFlops | None:
        """What the sequences so far show of the FLOP of this model; None without matrix products."""
        if self._table is not None:
            return None
        found, config = self._counter.model, self._config
        if self._scored is not None:  # of the vocabulary, the engine computes two logits
            found = replace(found, per_text=0.0)
        tokens = config.tokens if isinstance(config, EmbeddingConfig) and Form.TOKENS in config.checked else None
        per_text, per_token = (
            sum(2.0 * layer.in_features * layer.out_features for layer in layers if isinstance(layer, Dense))
            for layers in (config.layers, tokens.layers if tokens else ())
        )
        return ModelFlops(found.per_token + per_token, found.per_token2, found.per_text + per_text)

    def _vector(self, inputs: dict[str, npt.NDArray[Any]]) -> Vectors:
        if self._table is None:
            states = self._run(inputs).last_hidden_state[0].double().numpy()
        else:
            states = self._table[inputs["input_ids"]]
        return self._pooled(states)

    def _pooled(self, states: npt.NDArray[np.float64]) -> Vectors:
        vector = np.concatenate([_pooled(states, mode) for mode in self._config.pooling])
        for layer in self._config.layers:
            vector = _applied(self._folder, layer, vector)
        return vector.astype(np.float32)


def _compute_in_fp32(model: Any) -> None:
    """Let each module compute in fp32, with a copy of its weights that exists while it runs."""
    stored: dict[torch.nn.Module, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def widen(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        stored[module] = [(own, dict(own)) for own in (module._parameters, module._buffers)]
        for own, tensors in stored[module]:
            own |= {name: wide(each) for name, each in tensors.items()}
        return tuple(map(wide, given))  # T5 and DeBERTa take the format from weights of other modules

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for own, tensors in stored.pop(module):
            own |= tensors

    for module in model.modules():
        if module._parameters or module._buffers:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)


def _pooled(states: npt.NDArray[np.float64], mode: PoolingMode) -> npt.NDArray[np.float64]:
    """Return the pooled vector of one sequence: [tokens, dimensions] -> [dimensions]."""
    count = len(states)
    places = np.arange(1, count + 1)
    weights_by_mode = {
        "cls": places == 1,
        "last": places == count,
        "mean": np.full(count, 1 / count),
        "mean_sqrt_len": np.full(count, count**-0.5),
        "weightedmean": places / places.sum(),
    }
    found: npt.NDArray[np.float64] = states.max(axis=0) if mode == "max" else weights_by_mode[mode] @ states
    return found


def _applied(folder: Path, layer: Layer, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return a vector, or rows of vectors, after a layer."""
    if not isinstance(layer, Dense | LayerNorm):
        return np.asarray(vectors / np.maximum(1e-12, np.linalg.norm(vectors, axis=-1, keepdims=True)))
    stored = {name: tensor.double().numpy() for name, tensor in weights.of_module(folder, layer.folder).items()}
    if isinstance(layer, LayerNorm):
        centered = vectors - vectors.mean(axis=-1, keepdims=True)
        scaled = centered / np.sqrt(vectors.var(axis=-1, keepdims=True) + 1e-5)
        return np.asarray(scaled * stored["norm.weight"] + stored["norm.bias"])
    linear = vectors @ stored["linear.weight"].T + stored.get("linear.bias", 0)
    result = getattr(torch.nn, layer.activation)()(torch.from_numpy(linear)).numpy()
    if layer.residual:
        result = result + (vectors @ stored["residual.weight"].T if "residual.weight" in stored else vectors)
    return np.asarray(result)


def _sparse(
    folder: Path,
    config: SparseConfig,
    ids: Tokens,
    states: npt.NDArray[np.float64] | None,
    logits: torch.Tensor | None,
) -> dict[int, float]:
    """Return the weights above zero by token id, in rising order."""
    if states is not None:
        assert config.folder is not None
        stored = {name: tensor.double().numpy() for name, tensor in weights.of_module(folder, config.folder).items()}
        largest: dict[int, float] = {}
        for token, state in zip(ids.tolist(), states, strict=True):
            weight = float((stored["linear.weight"] @ state + stored["linear.bias"]).item())
            if token not in config.ignored and weight > largest.get(token, 0):
                largest[token] = weight
        return dict(sorted(largest.items()))
    assert logits is not None
    values = np.log1p(np.maximum(0, logits.double().numpy()))
    values = np.log1p(values) if config.twice else values
    whole = values.max(axis=0) if config.pooling == "max" else values.sum(axis=0)
    return {int(token): float(whole[token]) for token in np.flatnonzero(whole)}


def _largest(by_id: dict[int, float], most: int | None) -> dict[int, float]:
    """Return the largest weights, in the order of the tokens."""
    return dict(sorted(sorted(by_id.items(), key=lambda item: -item[1])[:most]))


def _embeds_segments_as_words(model: Any) -> bool:
    """Return whether the model adds something for segments that it has no embeddings for: GPT-2 looks up words."""
    accepted = inspect.signature(model.base_model.forward).parameters
    return "token_type_ids" in accepted and not hasattr(type(model.config), "type_vocab_size")


def has_segments(model: Any) -> bool:
    """Return whether the model distinguishes the segments of a pair."""
    known = hasattr(type(model.config), "type_vocab_size")  # config.json can name it for any architecture
    return known and int(model.config.type_vocab_size or 0) > 1
