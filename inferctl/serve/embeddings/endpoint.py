"""`POST /v1/embeddings`: an ASGI application that writes directly to the connection (`protocol.Exchange`).

It bypasses Starlette and ASGI, because their overhead is larger than the rest of the work per request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.types import Receive, Scope, Send

from inferctl.serve.edge import connection as protocol
from inferctl.serve.edge.connection import Exchange
from inferctl.serve.edge.limits import at_capacity
from inferctl.serve.embeddings import schemas as http
from inferctl.serve.embeddings.schemas import ApiError
from inferctl.serve.engine_process.engine_protocol import Tokens, Vectors
from inferctl.serve.metrics import PHASES
from inferctl.serve.scheduling.batcher import AdmissionError
from inferctl.serve.scheduling.dispatcher import EngineFailedError, EngineUnavailableError, RequestResult
from inferctl.serve.tokenizer_pool import TooLongError

if TYPE_CHECKING:
    from inferctl.serve.embeddings.app import State

log = logging.getLogger("inferctl.request")

_MAX_ID_LENGTH = 128
_HEAD = b"x-request-id: %b\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\n"
_TIMING_HEADERS = "".join(
    [*(f"x-inferctl-{phase}-ms: %.3f\r\n" for phase in PHASES), "x-inferctl-tokens: %d\r\n"]
).encode()


class RequestContext:
    """One request: the headers that matter, and its tokens, times and body bytes for logs and metrics."""

    __slots__ = ("body_bytes", "bulk", "id", "media", "phases", "priority", "tokens")

    def __init__(self, scope: Scope) -> None:
        self.id = self.priority = self.media = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                self.id = value
            elif name == b"x-priority":
                self.priority = value.strip().lower()
            elif name == b"content-type":
                self.media = value
        if not (0 < len(self.id) <= _MAX_ID_LENGTH and all(33 <= character <= 126 for character in self.id)):
            self.id = b"%032x" % random.getrandbits(128)
        self.bulk = self.priority == b"bulk"
        self.body_bytes = self.tokens = 0
        self.phases: tuple[float, ...] = ()


class EmbeddingsEndpoint:
    """The application of `POST /v1/embeddings`."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request."""
        state, call, counted, unanswered = self._state, RequestContext(scope), False, False
        exchange = protocol.exchange(scope)
        started = time.monotonic()
        close, extra_head = False, b""
        try:
            self._admit(call)
            state.in_flight.add_request()
            counted = True
            raw = await self._body(receive, call)
            started = time.monotonic()
            state.in_flight.unanswered += 1
            unanswered = True
            status, body = 200, await self._embeddings(raw, exchange, call)
            extra_head = _TIMING_HEADERS % (*[1000 * seconds for seconds in call.phases], call.tokens)
        except _ClientDisconnectedError:
            state.metrics.cancelled.inc()
            state.in_flight.unanswered -= unanswered
            return
        except ApiError as error:
            status, body = error.status, error.body()
            close = error.close
            extra_head = b"".join([f"{key}: {value}\r\n".encode() for key, value in error.headers.items()])
            if status == 429 or error.code == "not_ready":
                state.metrics.rejected.labels(error.code).inc()
        except Exception:  # a bug of the server must not leave a request without a response
            log.exception("request %s", call.id.decode())
            internal = ApiError(500, "internal error; see the server log", code="internal_error")
            status, body = internal.status, internal.body()
        finally:
            if counted:
                state.in_flight.release(call.body_bytes)
        await exchange.writable()
        exchange.respond(status, _HEAD % (call.id, extra_head, len(body)), body, close=close)
        state.in_flight.unanswered -= unanswered
        self._record(scope, call, status, time.monotonic() - started)

    def _admit(self, call: RequestContext) -> None:
        """Reject a request that its headers or the full queue rule out, before its body is read."""
        state = self._state
        if not state.accepts_requests:
            raise state.unavailable()
        http.check_content_type(call.media)
        if call.priority not in (b"", b"interactive", b"bulk"):
            message = f"x-priority must be `interactive` or `bulk`, got {call.priority.decode('latin-1')!r}"
            raise ApiError(400, message, code="invalid_priority", param="x-priority")
        try:
            state.dispatcher.check(bulk=call.bulk)
        except AdmissionError as error:
            raise _rejection(error) from None

    def _record(self, scope: Scope, call: RequestContext, status: int, seconds: float) -> None:
        """Count, log and trace a request that got its response after `seconds`."""
        state = self._state
        state.metrics.count_request(status, seconds)
        if state.log_requests:
            phases = {f"{name}_ms": round(1000 * value, 3) for name, value in zip(PHASES, call.phases, strict=False)}
            fields = {"request_id": call.id.decode(), "status": status, "ms": round(seconds * 1000, 3)}
            log.info("request", extra={"fields": {**fields, "tokens": call.tokens, "bulk": call.bulk, **phases}})
        if state.trace is not None:
            phases = dict(zip(PHASES, call.phases, strict=False))
            state.trace(scope["headers"], call.id.decode(), status, call.tokens, seconds, phases)

    async def _embeddings(self, raw: bytes, exchange: Exchange, call: RequestContext) -> bytes:
        """Return the body of a successful response."""
        state, metrics = self._state, self._state.metrics
        request = http.parse(raw, max_inputs=state.limits.max_inputs)
        if request.model not in (None, state.name) and request.model not in state.aliases:
            raise state.unknown_model(str(request.model))
        dimensions = state.dimensions_for(request.dimensions)
        started = time.monotonic()
        sequences = await self._tokens(request)
        tokenized = time.monotonic()
        result = await self._run(sequences, exchange, call)
        if result.non_finite:
            metrics.non_finite.inc(len(result.non_finite))
            message = f"the model returned NaN or infinity for input[{min(result.non_finite)}]"
            raise ApiError(500, message, code="non_finite")
        call.tokens = sum(map(len, sequences))
        call.phases = (tokenized - started, result.queue_seconds, result.inference_seconds)
        metrics.count_response(call.tokens, len(sequences), call.phases)
        vectors = _with_dimensions(result.vectors, dimensions)
        return http.embeddings(vectors, request.encoding_format, state.name, call.tokens)

    async def _tokens(self, request: http.EmbeddingRequest) -> list[Tokens]:
        """Return the token ids of each input. Raises `ApiError` 400."""
        state, inputs = self._state, request.input
        truncate = state.limits.truncate if request.truncate is None else request.truncate
        items: Sequence[Any] = [inputs] if http.is_single(inputs) else inputs
        try:
            if isinstance(items[0], str):
                return await state.tokenizer.encode(items, truncate=truncate)
            size = state.tokenizer.vocabulary_size
            for index, row in enumerate(items):
                if (largest := max(row)) >= size:
                    message = f"input[{index}] has token id {largest}; the largest of this model is {size - 1}"
                    raise ApiError(400, message, code="invalid_token", param="input")
            return state.tokenizer.truncate(items, truncate=truncate)
        except TooLongError as error:
            message = f"input[{error.index}] has more than {error.limit} tokens; set `truncate` to true to shorten it"
            raise ApiError(400, message, code="context_length_exceeded", param="input") from None

    async def _run(self, sequences: list[Tokens], exchange: Exchange, call: RequestContext) -> RequestResult:
        """Return the vectors. The request is cancelled if the client disconnects."""
        if exchange.disconnected:
            raise _ClientDisconnectedError
        try:
            future = self._state.dispatcher.submit(sequences, bulk=call.bulk)
            exchange.add_disconnect_callback(future.cancel)
            try:
                return await future
            finally:
                exchange.remove_disconnect_callback(future.cancel)
        except asyncio.CancelledError:
            if exchange.disconnected:
                raise _ClientDisconnectedError from None
            raise
        except AdmissionError as error:
            raise _rejection(error) from None
        except EngineUnavailableError as error:
            raise ApiError(503, str(error), code="engine_unavailable", headers={"retry-after": "1"}) from None
        except EngineFailedError as error:
            raise ApiError(500, f"the engine could not compute this request: {error}", code="engine_failed") from None

    async def _body(self, receive: Receive, call: RequestContext) -> bytes:
        """Return the whole body. Raises `ApiError` 413 if it is too large, 429 if all bodies together are."""
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(self._part(message, call))
            more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, message: Any, call: RequestContext) -> bytes:
        if message["type"] == "http.disconnect":
            raise _ClientDisconnectedError
        part: bytes = message.get("body", b"")
        limit = self._state.limits.max_body_bytes
        if call.body_bytes + len(part) > limit:
            message = f"the body is larger than the limit of {limit} bytes"
            raise ApiError(413, message, code="body_too_large", close=True)
        self._state.in_flight.add_bytes(len(part))
        call.body_bytes += len(part)
        return part


class _ClientDisconnectedError(Exception):
    """The client disconnected, so no response is needed."""


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
