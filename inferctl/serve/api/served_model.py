"""A model that a server serves, as clients see it: names, dimensions and limits of requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inferctl.config.spec import MAX_CLIENT_BATCH, Spec, Task
from inferctl.core.errors import UsageError
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Output, Role, TokensConfig
from inferctl.reading.prompts import NO_PROMPTS, Prompts
from inferctl.reading.rows import Vectors
from inferctl.reading.space import Space
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.edge.errors import ApiError

# Tokens of one request, if the queue is not larger. OpenAI's limit is 300,000.
_MAX_REQUEST_TOKENS = 262_144


@dataclass
class ServedModel:
    """`aliases`: other names, which `/v1/models` lists. Requests may also use `source`.

    `matryoshka` and `prompts`: as in `EmbeddingConfig`.

    `max_inputs` and `max_tokens` limit one request.

    `outputs`, `trained`, `tokens`, `text_options`: as in `EmbeddingConfig`. `token_dimensions`: numbers of the vector
    of a token. `held_numbers`: those of sparse weights and vectors of tokens in responses that are being sent.

    `activation` turns logits into scores. `labels`: of a classifier, one for each logit. `takes_instruction`: whether a
    reranker reads one. `dimensions` and `vocabulary_size` are 0 until an engine is ready, and `spaces` is empty.
    `number`: among the models of the server.
    """

    name: str
    source: str
    aliases: Sequence[str]
    matryoshka: tuple[int, ...] | None
    max_inputs: int
    max_tokens: int
    truncate: bool
    task: Task = "embed"
    activation: Callable[[Vectors], Vectors] = lambda logits: logits
    labels: tuple[str, ...] = ()
    prompts: Prompts = NO_PROMPTS
    takes_instruction: bool = False
    normalized: bool = True
    text_options: Callable[[Role], dict[str, Any]] = lambda _: {}
    outputs: tuple[Output, ...] = ("dense",)
    trained: tuple[Output, ...] = ("dense",)
    tokens: TokensConfig | None = None
    dimensions: int = 0
    token_dimensions: int = 0
    held_numbers: int = 0
    max_held_numbers: int = 2**26  # 256 MiB
    vocabulary_size: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    number: int = 0
    spaces: Mapping[Output, Space] = field(default_factory=dict)
    _space_names: dict[Any, bytes] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, spec: Spec, config: TaskConfig, truncate: bool, number: int = 0) -> ServedModel:
        """Return the model of a spec, whose folder has this configuration."""
        served = cls(
            spec.name,
            spec.model.source,
            spec.serve.aliases,
            (),
            MAX_CLIENT_BATCH,
            max(_MAX_REQUEST_TOKENS, spec.serve.max_queue_tokens),
            truncate,
            config.task,
            labels=config.labels,
            takes_instruction=config.takes_instruction,
            number=number,
        )
        if isinstance(config, EmbeddingConfig):
            served.prompts, served.outputs, served.tokens = config.prompts, config.outputs, config.tokens
            served.trained, served.text_options = config.trained, config.text_options
            served.matryoshka, served.normalized = config.matryoshka, config.normalize and config.truncate_dim is None
        else:
            served.activation = config.scores
        return served

    @property
    def names(self) -> list[str]:
        """The names that `/v1/models` lists."""
        return list(dict.fromkeys((self.name, *self.aliases)))

    def has_name(self, wanted: str | None) -> bool:
        """Return whether a request that names a model, or none, is for this one. An empty name is none, as in vLLM."""
        return not wanted or wanted in (self.name, self.source, *self.aliases)

    def check_name(self, wanted: str | None) -> None:
        """Raise `ApiError` 404 for another model's name."""
        if not self.has_name(wanted):
            raise unknown_model(wanted, self.names)

    def prompt_for(self, prompt: str | None, name: str | None, input_type: str | None) -> str:
        """Return the prompt that a request selects. Raises `ApiError` 400 if the model does not support it.

        What another field replaces must be supported too, as the schema says.
        """
        given = {"input_type": {"input_type": input_type}, "prompt_name": {"name": name}, "prompt": {"prompt": prompt}}
        text = ""
        for param, one in [each for each in given.items() if None not in each[1].values()] or [("input_type", {})]:
            try:
                text = self.prompts.select(**one)
            except UsageError as error:
                raise ApiError(400, f"{error.message}; {error.hint}", code="invalid_prompt", param=param) from None
        return text

    def check_instruction(self, instruction: str | None) -> None:
        """Raise `ApiError` 400 if a request has an instruction, and the model reads none."""
        if instruction is not None and not self.takes_instruction:
            message = f"the model {self.name!r} reads no instruction; remove `instruction`"
            raise ApiError(400, message, code="invalid_prompt", param="instruction")

    def dimensions_for(self, wanted: int | None) -> int | None:
        """Return to how many dimensions vectors are truncated; None for full vectors.

        Raises `ApiError` 400 if the model was not trained for `wanted`.
        """
        sizes = self.matryoshka
        if wanted in (None, self.dimensions):
            return None
        if wanted is not None and wanted < self.dimensions and (sizes is None or wanted in sizes):
            return wanted
        allowed = [str(d) for d in sizes or () if d <= self.dimensions] or [str(self.dimensions)]
        possible = f"1 to {self.dimensions}" if sizes is None else " or ".join(allowed)
        message = f"`dimensions` of model {self.name!r} must be {possible}, got {wanted}"
        raise ApiError(400, message, code="invalid_dimensions", param="dimensions")

    def space_names(
        self, outputs: Sequence[Output], dimensions: int | None = None, normalized: bool | None = None
    ) -> bytes:
        """Return the names of the spaces of the outputs of a request, comma separated; empty before one was ready.

        `normalized`: what a request asks for of a model that does not normalize. Truncated vectors are, without it.
        """
        key = outputs, dimensions, normalized
        if not self.spaces:
            return b""
        if (known := self._space_names.get(key)) is None:
            usual = dimensions is not None
            parts = {"dimensions": dimensions} if usual else {}
            parts |= {} if normalized in (None, usual) else {"normalized": normalized}
            found = {name: self.spaces[name] for name in outputs}
            if "dense" in found and parts:
                found["dense"] = found["dense"].variant(**parts)
            known = self._space_names[key] = ", ".join(each.name for each in found.values()).encode()
        return known


def unknown_model(wanted: str | None, names: Sequence[str]) -> ApiError:
    """Return the error of a request for a model that is not there, or not for its key. `names`: those that it may use.

    Without a name, it is for one of several models that have its endpoint.
    """
    possible = " or ".join(map(repr, names))
    if wanted is None:
        message = f"several models have this endpoint; set `model` to {possible}"
        return ApiError(400, message, code="model_required", param="model")
    return ApiError(404, f"model {wanted!r} not found; use {possible}", code="model_not_found", param="model")
