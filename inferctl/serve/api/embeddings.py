"""`POST /v1/embeddings` and the endpoints of other APIs for embeddings, as plain ASGI applications."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from starlette.types import Receive, Scope, Send

from inferctl.reading.outputs import Output
from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.api import outputs
from inferctl.serve.api.embedding_schemas import EmbeddingRequest, unit
from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.api.outputs import SeveralOutputs
from inferctl.serve.api.schemas import ModelRequest
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext

log = logging.getLogger("inferctl.prompts")

# More token ids than this are converted on another thread.
_INLINE_IDS = 16_384
# As in the longest body. A short body could otherwise mean minutes of tokenization.
_MAX_ADDED_CHARACTERS = 4 * 2**20
# Keys that get a line in the log.
_MAX_REMINDED = 1_000


class EmbeddingApi(Protocol):
    """The shape of an API for embeddings. `names`: what it calls fields of OpenAI's. `request`: its requests."""

    @property
    def names(self) -> Mapping[str, str]: ...

    @property
    def request(self) -> type[ModelRequest]: ...

    def embedding(self, request: Any, model: ServedModel) -> EmbeddingRequest:
        """Return a request in the shape of OpenAI's. Raises `ApiError` 400 for what the model does not support."""

    def response(self, request: Any, found: Any, model: ServedModel, context: RequestContext) -> Iterable[bytes]:
        """Return the JSON of a successful response in parts. Raises `ApiError` before the first part.

        `found`: `Vectors`, or `SeveralOutputs` if `embedding` returned a request for others than dense vectors.
        """


@dataclass(frozen=True)
class EmbeddingsEndpoint:
    """The application of an endpoint for embeddings."""

    inference: Inference
    api: EmbeddingApi
    reminded: set[str] = field(default_factory=set, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request. Raises `ApiError`, which the edge sends."""
        try:
            await self._respond(scope, receive, send)
        except ApiError as error:
            raise error.renamed(self.api.names) from None

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, (given, request, prompt) = await self.inference.receive(scope, receive, self._parse)
        model = self.inference.model
        if model.prompts.unused and isinstance(request.items[0], str):
            chosen = request.prompt is not None or request.prompt_name is not None
            if prompt is None or (not chosen and model.prompts.misses_query(request.input_type)):
                self._remind(context.key_id)
        names = outputs.chosen(model, request.outputs)
        dimensions = model.dimensions_for(request.dimensions) if "dense" in names else None
        # What cannot be returned is rejected before anything is computed.
        if "dense" in names and model.normalized and request.normalized is False:
            message = f"model {model.name!r} normalizes its vectors: `normalized` must be true"
            raise ApiError(400, message, code="invalid_value", param="normalized")
        rows = await self.inference.run(scope, partial(self._tokenize, request, prompt, names, context.tenant))
        normalized = None if model.normalized else request.normalized
        if names == ("dense",):
            vectors = np.stack(rows) if isinstance(rows, list) else rows
            vectors = _with_dimensions(vectors, dimensions, normalized)
            await send_json(send, self.api.response(given, vectors, model, context), context)
            return
        found = outputs.unpacked(model, rows, names)
        if "dense" in names:
            shaped = (_with_dimensions(each.dense[None], dimensions, normalized)[0] for each in found)
            found = [each._replace(dense=vector) for each, vector in zip(found, shaped, strict=True)]
        several = SeveralOutputs(names, found, self.inference.tokenizer.own_tokenizer().id_to_token)
        with outputs.held(model, sum(each.size for each in found)):
            await send_json(send, self.api.response(given, several, model, context), context)

    def _parse(self, raw: bytes) -> tuple[ModelRequest, EmbeddingRequest, str | None]:
        """Return the request, also in OpenAI's shape, and its prompt, None if it selects none.

        Raises `ApiError` 400 or 404.
        """
        given = self.inference.parse(self.api.request, raw)
        request = self.api.embedding(given, self.inference.model)
        return given, request, self._prompt(request)

    def _prompt(self, request: EmbeddingRequest) -> str | None:
        model = self.inference.model
        for index, row in enumerate(() if isinstance(request.items[0], str) else request.items):
            if (largest := max(row)) >= model.vocabulary_size:
                limit = model.vocabulary_size - 1
                message = (
                    f"input[{index}] has token id {largest}; the largest of this model is {limit}: send texts, "
                    "or ids of this model's tokenizer (OpenAIEmbeddings of LangChain: check_embedding_ctx_length=False)"
                )
                raise ApiError(400, message, code="invalid_token", param="input")
        if request.prompt is request.prompt_name is request.input_type is None:
            return None
        if not isinstance(request.items[0], str):
            message = "a prompt precedes texts: send texts, or token ids without prompt, prompt_name and input_type"
            raise ApiError(400, message, code="prompt_without_text", param="input")
        prompt = model.prompt_for(request.prompt, request.prompt_name, request.input_type)
        if (length := len(prompt) * len(request.items)) > _MAX_ADDED_CHARACTERS:
            message = f"the prompt has {length} characters in all inputs; the limit is {_MAX_ADDED_CHARACTERS}"
            raise ApiError(400, message, code="prompt_too_long", param="input")
        return prompt

    def _remind(self, key_id: str | None) -> None:
        """Log once for a key that it uses none of the prompts. Without keys, the line at the start is all."""
        if key_id is None or key_id in self.reminded or len(self.reminded) >= _MAX_REMINDED:
            return
        self.reminded.add(key_id)
        names = ", ".join(self.inference.model.prompts.names)
        log.warning(
            "key %s sends texts without a prompt; the model has %s: send its name as `prompt_name`", key_id, names
        )

    async def _tokenize(
        self, request: EmbeddingRequest, prompt: str | None, names: Sequence[Output], tenant: str | None
    ) -> tuple[Sequence[Tokens], list[int] | None]:
        model = self.inference.model
        truncate = model.truncate if request.truncate is None else request.truncate
        role = model.prompts.role(request.prompt_name, request.input_type)
        items: Any = request.items
        left = request.truncation_side == "left"
        if isinstance(items[0], str):
            found = await self.inference.tokenizer.encode(
                items, truncate=truncate, tenant=tenant, prompt=prompt, left=left, **model.text_options(role)
            )
            return outputs.marked(model, found, names, role)
        call = partial(self.inference.tokenizer.truncate, items, truncate=truncate, left=left)
        large = sum(map(len, items)) > _INLINE_IDS
        return outputs.marked(model, await asyncio.to_thread(call) if large else call(), names, role)


def _with_dimensions(vectors: Vectors, dimensions: int | None, normalized: bool | None) -> Vectors:
    """Return the first `dimensions` values of each vector, scaled to length one; None returns all, unchanged.

    `normalized`: whether to scale them, in place of that rule.
    """
    head = vectors if dimensions is None else np.ascontiguousarray(vectors[:, :dimensions])
    return unit(head) if (dimensions is not None if normalized is None else normalized) else head
