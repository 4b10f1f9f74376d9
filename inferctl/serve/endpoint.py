"""`POST /v1/embeddings`: an ASGI application that answers past ASGI (`protocol.Exchange`), as what Starlette and ASGI add costs more than all the rest."""

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

from inferctl.serve import http, protocol
from inferctl.serve.batcher import RefusedError
from inferctl.serve.dispatcher import Answer, EngineFailedError, EngineUnavailableError
from inferctl.serve.http import ApiError
from inferctl.serve.load import busy
from inferctl.serve.metrics import PHASES
from inferctl.serve.protocol import Exchange
from inferctl.serve.tokenise import TooLongError
from inferctl.serve.types import Tokens, Vectors

if TYPE_CHECKING:
    from inferctl.serve.app import State

log = logging.getLogger("inferctl.request")

_MAX_ID = 128
_HEAD = b"x-request-id: %b\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\n"
_SPENT = "".join([*(f"x-inferctl-{phase}-ms: %.3f\r\n" for phase in PHASES), "x-inferctl-tokens: %d\r\n"]).encode()


class Call:
    """One request: what its headers say, and what is known of it when it is over."""

    __slots__ = ("bulk", "held", "id", "media", "phases", "priority", "tokens")

    def __init__(self, scope: Scope) -> None:
        self.id = self.priority = self.media = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                self.id = value
            elif name == b"x-priority":
                self.priority = value.strip().lower()
            elif name == b"content-type":
                self.media = value
        if not (0 < len(self.id) <= _MAX_ID and all(33 <= character <= 126 for character in self.id)):
            self.id = b"%032x" % random.getrandbits(128)
        self.bulk = self.priority == b"bulk"
        self.held = self.tokens = 0
        self.phases: tuple[float, ...] = ()


class EmbeddingsEndpoint:
    """The application of one route."""

    def __init__(self, state: State) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        state, call, entered, accepted = self._state, Call(scope), False, False
        exchange = protocol.exchange(scope)
        started = time.monotonic()
        close, more = False, b""
        try:
            self._admit(call)
            state.load.enter()
            entered = True
            raw = await self._body(receive, call)
            started = time.monotonic()
            state.load.accepted += 1
            accepted = True
            status, body = 200, await self._answer(raw, exchange, call)
            more = _SPENT % (*[1000 * spent for spent in call.phases], call.tokens)
        except _ClientGoneError:
            state.metrics.cancelled.inc()
            state.load.accepted -= accepted
            return
        except ApiError as error:
            status, body = error.status, error.body()
            close = error.close
            more = b"".join([f"{key}: {value}\r\n".encode() for key, value in error.headers.items()])
            if status == 429 or error.code == "not_ready":
                state.metrics.rejected.labels(error.code).inc()
        except Exception:  # a fault of ours must be answered too
            log.exception("request %s", call.id.decode())
            fault = ApiError(500, "an internal error; the server's log has it", code="internal_error")
            status, body = fault.status, fault.body()
        finally:
            if entered:
                state.load.leave(call.held)
        await exchange.writable()
        exchange.answer(status, _HEAD % (call.id, more, len(body)), body, close=close)
        state.load.accepted -= accepted
        self._ended(scope, call, status, time.monotonic() - started)

    def _admit(self, call: Call) -> None:
        """Refuse what is sure to be refused before anything is spent on it."""
        state = self._state
        if not state.answering:
            raise state.unavailable()
        http.check_content_type(call.media)
        if call.priority not in (b"", b"interactive", b"bulk"):
            raise ApiError(400, "x-priority must be interactive or bulk", code="invalid_priority", param="x-priority")
        try:
            state.dispatcher.check(bulk=call.bulk)
        except RefusedError as error:
            raise _refused(error) from None

    def _ended(self, scope: Scope, call: Call, status: int, seconds: float) -> None:
        state = self._state
        state.metrics.ended(status, seconds)
        if state.log_requests:
            phases = {f"{name}_ms": round(spent * 1000, 3) for name, spent in zip(PHASES, call.phases, strict=False)}
            fields = {"request_id": call.id.decode(), "status": status, "ms": round(seconds * 1000, 3)}
            log.info("request", extra={"fields": {**fields, "tokens": call.tokens, "bulk": call.bulk, **phases}})
        if state.trace is not None:
            phases = dict(zip(PHASES, call.phases, strict=False))
            state.trace(scope["headers"], call.id.decode(), status, call.tokens, seconds, phases)

    async def _answer(self, raw: bytes, exchange: Exchange, call: Call) -> bytes:
        state, metrics = self._state, self._state.metrics
        request = http.parse(raw, max_inputs=state.limits.max_inputs)
        if request.model not in (None, state.name) and request.model not in state.aliases:
            raise state.unknown_model(str(request.model))
        dimensions = state.dimensions_for(request.dimensions)
        started = time.monotonic()
        sequences = await self._tokens(request)
        tokenised = time.monotonic()
        answer = await self._embed(sequences, exchange, call)
        if answer.bad:
            metrics.non_finite.inc(len(answer.bad))
            said = f"the model gave numbers that are not finite for input {min(answer.bad)}"
            raise ApiError(500, said, code="non_finite")
        call.tokens = sum(map(len, sequences))
        call.phases = (tokenised - started, answer.queue_seconds, answer.inference_seconds)
        metrics.answered(call.tokens, len(sequences), call.phases)
        return http.embeddings(_cut(answer.vectors, dimensions), request.encoding_format, state.name, call.tokens)

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

    async def _embed(self, sequences: list[Tokens], exchange: Exchange, call: Call) -> Answer:
        """The answer; the work is dropped when the client leaves."""
        if exchange.gone:
            raise _ClientGoneError
        try:
            answer = self._state.dispatcher.begin(sequences, bulk=call.bulk)
            exchange.when_gone(answer.cancel)
            try:
                return await answer
            finally:
                exchange.forget(answer.cancel)
        except asyncio.CancelledError:
            if exchange.gone:
                raise _ClientGoneError from None
            raise
        except RefusedError as error:
            raise _refused(error) from None
        except EngineUnavailableError as error:
            raise ApiError(503, str(error), code="engine_unavailable", headers={"retry-after": "1"}) from None
        except EngineFailedError as error:
            raise ApiError(500, f"the engine could not compute this: {error}", code="engine_failed") from None

    async def _body(self, receive: Receive, call: Call) -> bytes:
        """The whole body. Raises `ApiError` 413 when it is too large, 429 when too much is held already."""
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(self._part(message, call))
            more = message.get("more_body", False)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, message: Any, call: Call) -> bytes:
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        part: bytes = message.get("body", b"")
        limit = self._state.limits.max_body_bytes
        if call.held + len(part) > limit:
            said = f"the body is larger than {limit} bytes"
            raise ApiError(413, said, code="body_too_large", close=True)
        self._state.load.hold(len(part))
        call.held += len(part)
        return part


class _ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def _refused(error: RefusedError) -> ApiError:
    return busy(str(error), error.reason, max(1, math.ceil(error.retry_after)))


def _cut(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first `dimensions` of each vector, scaled to length one again."""
    if dimensions is None:
        return vectors
    head = vectors[:, :dimensions]
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    cut: Vectors = np.ascontiguousarray(head / np.maximum(norms, np.float32(1e-12)))
    return cut
