"""`POST /v1/embeddings`: parse, tokenize, run, respond. A plain ASGI application, because frameworks take longer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.types import Receive, Scope, Send

from inferctl.serve.edge.errors import ApiError, at_capacity
from inferctl.serve.edge.middleware import ClientDisconnectedError, unless_disconnected
from inferctl.serve.edge.usage import RequestContext, context_of
from inferctl.serve.embeddings import schemas
from inferctl.serve.embeddings.served_model import ServedModel
from inferctl.serve.engine_process.engine_protocol import Tokens, Vectors
from inferctl.serve.metrics import Metrics
from inferctl.serve.scheduling.batcher import AdmissionError
from inferctl.serve.scheduling.dispatcher import (
    Dispatcher,
    EngineFailedError,
    EngineUnavailableError,
    RequestResult,
)
from inferctl.serve.tokenizer_pool import InputError, TokenizerPool

# Larger bodies are parsed on another thread. Below this, that would take longer than parsing.
_INLINE_BODY_BYTES = 64 * 1024
_PHASES = ("tokenize", "queue", "inference")


@dataclass(frozen=True)
class EmbeddingsEndpoint:
    """The application of `POST /v1/embeddings`."""

    model: ServedModel
    tokenizer: TokenizerPool
    dispatcher: Dispatcher
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request. Raises `ApiError`, which the edge sends."""
        context = context_of(scope)
        bulk = self._check_head(context)
        raw = await read_body(receive)
        if len(raw) > _INLINE_BODY_BYTES:
            request, sequences = await asyncio.to_thread(self._parse, raw)
        else:
            request, sequences = self._parse(raw)
        dimensions = self.model.dimensions_for(request.dimensions)
        started = time.monotonic()
        if sequences is None:
            sequences = await self._tokenize(request)
        tokenized = time.monotonic()
        result = await self._run(sequences, bulk, receive)
        if result.non_finite:
            self.metrics.non_finite.inc(len(result.non_finite))
            message = f"the model returned NaN or infinity for input[{min(result.non_finite)}]"
            raise ApiError(500, message, code="non_finite")
        context.model, context.inputs, context.input_tokens = self.model.name, len(sequences), sum(map(len, sequences))
        times = (tokenized - started, result.queue_seconds, result.inference_seconds)
        context.phases = dict(zip(_PHASES, times, strict=True))
        vectors = _with_dimensions(result.vectors, dimensions)
        parts = schemas.embeddings(vectors, request.encoding_format, self.model.name, context.input_tokens)
        await send_json(send, parts, context)

    def _check_head(self, context: RequestContext) -> bool:
        """Return whether the request is bulk. Rejects it if its headers or the full queue rule it out."""
        schemas.check_content_type(context.content_type)
        if context.priority not in (b"", b"interactive", b"bulk"):
            message = f"x-priority must be `interactive` or `bulk`, got {context.priority.decode('latin-1')!r}"
            raise ApiError(400, message, code="invalid_priority", param="x-priority")
        bulk = context.priority == b"bulk"
        try:
            self.dispatcher.check(bulk=bulk)
        except AdmissionError as error:
            raise _rejection(error) from None
        return bulk

    def _parse(self, raw: bytes) -> tuple[schemas.EmbeddingRequest, list[Tokens] | None]:
        """Return the request, and its sequences if its input is token ids. Raises `ApiError` 400 or 404."""
        request = schemas.parse(raw, max_inputs=self.model.max_inputs)
        self.model.check_name(request.model)
        rows: Sequence[Any] = [request.input] if schemas.is_single(request.input) else request.input
        if isinstance(rows[0], str):
            return request, None
        size = self.model.vocabulary_size
        for index, row in enumerate(rows):
            if (largest := max(row)) >= size:
                message = f"input[{index}] has token id {largest}; the largest of this model is {size - 1}"
                raise ApiError(400, message, code="invalid_token", param="input")
        try:
            return request, self.tokenizer.truncate(rows, truncate=self._truncate(request))
        except InputError as error:
            raise bad_input(error) from None

    def _truncate(self, request: schemas.EmbeddingRequest) -> bool:
        return self.model.truncate if request.truncate is None else request.truncate

    async def _tokenize(self, request: schemas.EmbeddingRequest) -> list[Tokens]:
        texts: Any = [request.input] if isinstance(request.input, str) else request.input
        try:
            return await self.tokenizer.encode(texts, truncate=self._truncate(request))
        except InputError as error:
            raise bad_input(error) from None

    async def _run(self, sequences: list[Tokens], bulk: bool, receive: Receive) -> RequestResult:
        try:
            return await unless_disconnected(self.dispatcher.submit(sequences, bulk=bulk), receive)
        except AdmissionError as error:
            raise _rejection(error) from None
        except EngineUnavailableError as error:
            raise ApiError(503, str(error), code="engine_unavailable", headers={"retry-after": "1"}) from None
        except EngineFailedError as error:
            raise ApiError(500, f"the engine could not compute this request: {error}", code="engine_failed") from None


async def read_body(receive: Receive) -> bytes:
    """Return the whole body of a request. Raises `ClientDisconnectedError`."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def send_json(send: Send, parts: Iterable[bytes], context: RequestContext) -> None:
    """Send a successful response whose body is `parts`, with the times and the tokens of the request as headers."""
    headers = [(b"content-type", b"application/json"), (b"x-inferctl-tokens", b"%d" % context.input_tokens)]
    headers += [(f"x-inferctl-{name}-ms".encode(), b"%.3f" % (1000 * s)) for name, s in context.phases.items()]
    if context.inputs <= schemas.PART_VECTORS:
        body = b"".join(parts)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def bad_input(error: InputError) -> ApiError:
    """Return the 400 for an input that cannot be tokenized."""
    return ApiError(400, str(error), code=error.code, param="input")


def _rejection(error: AdmissionError) -> ApiError:
    return at_capacity(str(error), error.reason, max(1, math.ceil(error.retry_after)))


def _with_dimensions(vectors: Vectors, dimensions: int | None) -> Vectors:
    """Return the first `dimensions` values of each vector, scaled to length one; None returns `vectors` unchanged."""
    if dimensions is None:
        return vectors
    head = vectors[:, :dimensions]
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    scaled: Vectors = np.ascontiguousarray(head / np.maximum(norms, np.float32(1e-12)))
    return scaled
