"""`POST /v1/embeddings`, as a plain ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from starlette.types import Receive, Scope, Send

from inferctl.serve.api import embedding_schemas
from inferctl.serve.api.embedding_schemas import EmbeddingRequest
from inferctl.serve.api.inference import Inference, parsed_body, send_json
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.engine_process.engine_protocol import Tokens, Vectors

# More token ids than this are converted on another thread.
_INLINE_IDS = 16_384


@dataclass(frozen=True)
class EmbeddingsEndpoint:
    """The application of `POST /v1/embeddings`."""

    inference: Inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request. Raises `ApiError`, which the edge sends."""
        context = self.inference.admit(scope)
        request = await parsed_body(context, receive, self._parse)
        model = self.inference.model
        dimensions = model.dimensions_for(request.dimensions)
        vectors = await self.inference.run(context, receive, self._tokenize(request, context.tenant))
        parts = embedding_schemas.response(
            _with_dimensions(vectors, dimensions), request.encoding_format, model.name, context.input_tokens
        )
        await send_json(send, parts, context)

    def _parse(self, raw: bytes) -> EmbeddingRequest:
        """Return the request. Raises `ApiError` 400 or 404."""
        model, request = self.inference.model, self.inference.parse(EmbeddingRequest, raw)
        for index, row in enumerate(() if isinstance(request.items[0], str) else request.items):
            if (largest := max(row)) >= model.vocabulary_size:
                limit = model.vocabulary_size - 1
                message = f"input[{index}] has token id {largest}; the largest of this model is {limit}"
                raise ApiError(400, message, code="invalid_token", param="input")
        return request

    async def _tokenize(self, request: EmbeddingRequest, tenant: str | None) -> tuple[Sequence[Tokens], None]:
        truncate = self.inference.model.truncate if request.truncate is None else request.truncate
        items: Any = request.items
        if isinstance(items[0], str):
            return await self.inference.tokenizer.encode(items, truncate=truncate, tenant=tenant), None
        call = partial(self.inference.tokenizer.truncate, items, truncate=truncate)
        large = sum(map(len, items)) > _INLINE_IDS
        return (await asyncio.to_thread(call) if large else call()), None


def _with_dimensions(vectors: Vectors, dimensions: int | None) -> Vectors:
    """Return the first `dimensions` values of each vector, scaled to length one; None returns `vectors` unchanged."""
    if dimensions is None:
        return vectors
    head = vectors[:, :dimensions]
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    scaled: Vectors = np.ascontiguousarray(head / np.maximum(norms, np.float32(1e-12)))
    return scaled
