"""The HTTP side: Starlette routes over a `Dispatcher`. Probes, metrics and info never touch the queue."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from inferctl.serve import http, openapi
from inferctl.serve.batcher import QueueFullError
from inferctl.serve.dispatcher import Answer, Dispatcher, EngineFailedError, EngineUnavailableError
from inferctl.serve.http import ApiError
from inferctl.serve.metrics import CONTENT_TYPE, Metrics
from inferctl.serve.tokenise import TokenizerPool, TooLongError
from inferctl.serve.types import Tokens, Vectors

_JSON = b"application/json"
_MAX_ID = 128


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. `max_body_bytes` bounds the raw body."""

    max_inputs: int
    max_input_tokens: int
    max_batch_tokens: int
    max_queue_tokens: int
    truncate: bool
    max_body_bytes: int = 32 * 1024 * 1024


@dataclass
class State:
    """What the routes share. `info` is the static part of `GET /info`; it is None until the engine is ready."""

    name: str
    aliases: frozenset[str]
    limits: Limits
    tokenizer: TokenizerPool
    dispatcher: Dispatcher
    metrics: Metrics
    matryoshka: tuple[int, ...] | None
    phase: Literal["starting", "ready", "restarting", "draining"] = "starting"
    hopeless: bool = False
    dimensions: int = 0
    info: dict[str, Any] | None = None
    created: int = field(default_factory=lambda: int(time.time()))


def create(state: State) -> Starlette:
    """The application. It answers from the first moment on; embeddings get 503 until the engine is ready."""

    async def models(_: Request) -> Response:
        entry = {"id": state.name, "object": "model", "created": state.created, "owned_by": "inferctl"}
        return _json({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        wanted = request.path_params["name"]
        if wanted != state.name and wanted not in state.aliases:
            raise _unknown_model(wanted, state.name)
        return _json({"id": state.name, "object": "model", "created": state.created, "owned_by": "inferctl"})

    async def livez(_: Request) -> Response:
        return Response("the engine does not start\n", 503) if state.hopeless else Response("ok\n")

    async def readyz(_: Request) -> Response:
        return Response("ok\n") if state.phase == "ready" else Response(f"{state.phase}\n", 503)

    async def metrics(_: Request) -> Response:
        return Response(state.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def info(_: Request) -> Response:
        if state.info is None:
            raise _unavailable(state)
        return _json({**state.info, "phase": state.phase})

    async def document(_: Request) -> Response:
        return _json(openapi.document(state.name))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(state.name))

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, ApiError):
            return Response(error.body(), error.status, error.headers, "application/json")
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(getattr(error, "headers", None) or {})
        detail = str(error.detail) if isinstance(error, HTTPException) else "an internal error; the server's log has it"
        return Response(ApiError(status, detail).body(), status, headers, "application/json")

    return Starlette(
        routes=[
            Route("/v1/embeddings", EmbeddingsEndpoint(state), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/info", info),
            Route("/openapi.json", document),
            Route("/docs", docs),
        ],
        exception_handlers={ApiError: failed, HTTPException: failed, Exception: failed},
    )


class EmbeddingsEndpoint:
    """`POST /v1/embeddings` as a plain ASGI application, as Starlette's request objects cost more than all the rest of it."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        state, started = self._state, time.monotonic()
        headers: list[tuple[bytes, bytes]] = [(b"x-request-id", _request_id(scope))]
        try:
            raw = await _body(receive, state.limits.max_body_bytes)
            if raw is None:
                return
            started = time.monotonic()
            body, extra = await self._answer(raw, receive)
            headers += extra
            status = 200
        except _ClientGoneError:
            state.metrics.cancelled.inc()
            return
        except ApiError as error:
            status, body = error.status, error.body()
            headers += [(key.lower().encode(), value.encode()) for key, value in error.headers.items()]
        state.metrics.requests.labels("embeddings", str(status)).inc()
        state.metrics.duration.labels("embeddings").observe(time.monotonic() - started)
        headers += [(b"content-type", _JSON), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, raw: bytes, receive: Receive) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        state, metrics = self._state, self._state.metrics
        if state.phase != "ready":
            metrics.rejected.labels(state.phase).inc()
            raise _unavailable(state)
        request = http.parse(raw, max_inputs=state.limits.max_inputs)
        if request.model not in (None, state.name) and request.model not in state.aliases:
            raise _unknown_model(str(request.model), state.name)
        dimensions = _dimensions(state, request.dimensions)
        started = time.monotonic()
        sequences = await self._tokens(request)
        tokenised = time.monotonic()
        answer = await _unless_gone(self._embed(sequences), receive)
        if not answer.ok.all():
            metrics.non_finite.inc(int((~answer.ok).sum()))
            raise ApiError(
                500,
                f"the model gave numbers that are not finite for input {int((~answer.ok).argmax())}",
                code="non_finite",
            )
        tokens = sum(map(len, sequences))
        body = http.embeddings(_cut(answer.vectors, dimensions), request.encoding_format, state.name, tokens)
        metrics.tokens.inc(tokens)
        metrics.texts.inc(len(sequences))
        phases = (
            ("tokenize", tokenised - started),
            ("queue", answer.queue_seconds),
            ("inference", answer.inference_seconds),
        )
        for phase, seconds in phases:
            metrics.phase.labels(phase).observe(seconds)
        headers = [(f"x-inferctl-{phase}-ms".encode(), f"{seconds * 1000:.3f}".encode()) for phase, seconds in phases]
        return body, [*headers, (b"x-inferctl-tokens", str(tokens).encode())]

    async def _tokens(self, request: http.EmbeddingRequest) -> list[Tokens]:
        state, given = self._state, request.input
        truncate = state.limits.truncate if request.truncate is None else request.truncate
        items: Sequence[Any] = [given] if http.is_single(given) else given
        try:
            if isinstance(items[0], str):
                return await state.tokenizer.encode(items, truncate=truncate)
            size = state.tokenizer.vocabulary_size
            for index, row in enumerate(items):
                if max(row) >= size:
                    raise ApiError(
                        400, f"input[{index}] has a token id of {size} or more", code="invalid_token", param="input"
                    )
            return state.tokenizer.cut(items, truncate=truncate)
        except TooLongError as error:
            message = f"input[{error.index}] has more than {error.limit} tokens; send `truncate: true` to cut it"
            raise ApiError(400, message, code="context_length_exceeded", param="input") from None

    async def _embed(self, sequences: list[Tokens]) -> Answer:
        state = self._state
        try:
            return await state.dispatcher.embed(sequences)
        except QueueFullError as error:
            state.metrics.rejected.labels("queue_full").inc()
            after = str(max(1, math.ceil(error.retry_after)))
            message = f"the server is at capacity: {error.waiting} tokens are waiting; retry after {after} s"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": after}) from None
        except EngineUnavailableError as error:
            raise ApiError(503, str(error), code="engine_unavailable", headers={"retry-after": "1"}) from None
        except EngineFailedError as error:
            raise ApiError(500, f"the engine could not compute this: {error}", code="engine_failed") from None


class _ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def _unless_gone(work: Any, receive: Receive) -> Answer:
    """The result of `work`, cancelled as soon as the client disconnects."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGoneError
        answer: Answer = task.result()
        return answer
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None when the client left before it was complete. Raises `ApiError` 413 past `limit` bytes."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise ApiError(
                413, f"the body is larger than {limit} bytes", code="body_too_large", headers={"connection": "close"}
            )
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _request_id(scope: Scope) -> bytes:
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    if 0 < len(given) <= _MAX_ID and all(33 <= character <= 126 for character in given):
        return given
    return uuid.uuid4().hex.encode()


def _dimensions(state: State, wanted: int | None) -> int | None:
    if wanted in (None, state.dimensions):
        return None
    if wanted is not None and wanted < state.dimensions and (state.matryoshka is None or wanted in state.matryoshka):
        return wanted
    allowed = [str(d) for d in state.matryoshka or () if d <= state.dimensions] or [str(state.dimensions)]
    possible = f"1 to {state.dimensions}" if state.matryoshka is None else ", ".join(allowed)
    raise ApiError(
        400,
        f"{state.name} cannot give {wanted} dimensions, only {possible}",
        code="invalid_dimensions",
        param="dimensions",
    )


def _cut(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first `dimensions` of each vector, scaled to length one again."""
    if dimensions is None:
        return vectors
    import numpy as np

    head = vectors[:, :dimensions]
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    cut: Vectors = np.ascontiguousarray(head / np.maximum(norms, np.float32(1e-12)))
    return cut


def _unknown_model(wanted: str, name: str) -> ApiError:
    return ApiError(
        404, f"there is no model {wanted!r} here; this server has {name!r}", code="model_not_found", param="model"
    )


def _unavailable(state: State) -> ApiError:
    reason = {"starting": "starting", "restarting": "starting its engine again", "draining": "shutting down"}.get(
        state.phase, "not ready"
    )
    return ApiError(503, f"the server is {reason}", code="not_ready", headers={"retry-after": "5"})


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
