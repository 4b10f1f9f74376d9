"""The ASGI application between the edge and vLLM's: usage, complete streams, and the status of a lost engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferctl.access.fairness import Shares
from inferctl.serve import docs_page
from inferctl.serve.edge.errors import ApiError, at_capacity, key_share
from inferctl.serve.edge.middleware import ClientDisconnectedError
from inferctl.serve.edge.usage import RequestContext, context_of
from inferctl.serve.generate import meter
from inferctl.serve.generate.control import ENGINE_LOST
from inferctl.serve.generate.meter import StreamMeter

# Path -> name in events. What they generate is counted.
ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
# vLLM has more endpoints that generate, whose tokens would not be counted, and some that change the server.
_TOKENIZER = frozenset({"/tokenize", "/detokenize"})
_PASSED = _TOKENIZER | {"/v1/models", "/version"}
# vLLM's pages load scripts from other hosts.
_DOCUMENTS = frozenset({"/openapi.json", "/docs", "/redoc"})
# Of a body for the tokenizer: for each token of the context, and in addition. English has about 4 bytes per token.
_BYTES_PER_TOKEN, _FEW_BYTES = 16, 64 * 1024
# Tokens of an answer, assumed until requests complete: for the metrics of demand.
ASSUMED_ANSWER_TOKENS = 256
# The most sequences that vLLM runs at a time, if the spec does not say.
_SEQUENCES = 1024
_STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


class GenerationApp:
    """`app` is vLLM's application. `healthy()` asks it whether its engine runs. `context`: the largest one, in tokens.

    `sequences`: the most that vLLM runs at a time, None if unknown. `offer(size)` is called for each request that asks
    for tokens, with the bytes of its body, also if vLLM rejects it.
    `stopped()` returns the error for requests that are cancelled when the server ends. `running`: how many complete
    requests vLLM has. `tokenizing`: the same of the tokenizer. `events`: how many parts of streams arrived, which shows
    progress.
    """

    def __init__(
        self,
        app: ASGIApp,
        healthy: Callable[[], Awaitable[bool]],
        stopped: Callable[[], ApiError],
        context: int,
        sequences: int | None = None,
        offer: Callable[[int], None] = lambda _: None,
    ) -> None:
        # Running, and as many that wait: then one key keeps vLLM busy, and others do not wait long.
        self.sequences = Shares(2 * (sequences or _SEQUENCES))
        self._app, self._healthy, self._stopped, self._offer = app, healthy, stopped, offer
        self.context = context
        self._tokenize_bytes = _FEW_BYTES + _BYTES_PER_TOKEN * context
        self.running = self.tokenizing = self.events = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Raises `ApiError` for one without a begun response."""
        path = scope["path"]
        if path in ENDPOINTS and scope["method"] == "POST":
            await self._generate(scope, receive, send)
        elif path in _TOKENIZER:
            await self._tokenize(scope, receive, send)
        elif path in _DOCUMENTS and scope["method"] == "GET":
            await self._document(scope, receive, send)
        elif path in ENDPOINTS or path in _PASSED or path.startswith("/v1/models/"):
            await self._app(scope, receive, send)
        else:
            # The path may have a key by mistake, and clients log errors.
            raise ApiError(404, f"no such endpoint; POST to {' or '.join(ENDPOINTS)}", code="not_found")

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Bound the body by the context: vLLM tokenizes it in one thread, and all chats wait for it."""
        context, started = context_of(scope), False

        def check(size: int) -> None:
            if size > self._tokenize_bytes:
                raise ApiError(413, f"the body is larger than {self._tokenize_bytes} bytes", code="body_too_large")

        async def read() -> Message:
            nonlocal started
            message = await receive()
            check(context.body_bytes)
            if message["type"] == "http.request" and not (started or message.get("more_body", False)):
                started = True
                self.tokenizing += 1
            return message

        check(context.content_length)
        try:
            await self._app(scope, read, send)
        finally:
            self.tokenizing -= started

    async def _document(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send vLLM's OpenAPI document, or a page of it, without the endpoints that the edge does not pass on."""
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            parts.append(message.get("body", b""))

        await self._app({**scope, "path": "/openapi.json", "raw_path": b"/openapi.json"}, receive, collect)
        document = orjson.loads(b"".join(parts))
        if "paths" not in document:
            raise ApiError(404, "vLLM was started without its documentation", code="not_found")
        document["paths"] = {
            path: operations
            for path, operations in document["paths"].items()
            if path in ENDPOINTS or path in _PASSED or path.startswith("/v1/models/")
        }
        if scope["path"] == "/openapi.json":
            media, body = b"application/json", orjson.dumps(document)
        else:
            media, body = b"text/html; charset=utf-8", docs_page.render(document).encode()
        headers = [(b"content-type", media), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _Call(self, context_of(scope), receive, send)
        await call.read()
        tenant = call.context.tenant
        if tenant is not None and not self.sequences.take(tenant):
            self._offer(call.context.body_bytes)
            raise key_share("requests in flight")
        self.running += 1
        try:
            call.reserve()
            self._offer(call.context.body_bytes)
            await self._app(scope, call.receive, call.send)
        except asyncio.CancelledError:
            if call.begun and not call.complete:
                await call.break_off(self._stopped())
            raise
        except Exception:
            if call.disconnected and not call.begun:
                raise ClientDisconnectedError from None
            raise
        finally:
            self.running -= 1
            if tenant is not None:
                self.sequences.release(tenant)
            call.count()
        if call.error is not None:
            raise await self._as_error(call.error)
        if call.disconnected and not call.complete:
            raise ClientDisconnectedError
        if not call.complete:
            early = ApiError(500, "the response ended early", code="internal_error")
            if not call.begun:
                raise early
            await call.break_off(early)
        if call.failed:
            call.context.code = "generation_failed" if await self._healthy() else "engine_lost"

    async def _as_error(self, error: ApiError) -> ApiError:
        """Return a 503 for vLLM's 500 if the engine is lost, and a 429 for its 503 if the queue is full."""
        if error.status < 500:
            return error
        if not await self._healthy():
            return ApiError(503, ENGINE_LOST, code="engine_lost", headers={"retry-after": "5"})
        return at_capacity("the queue is full", "queue_full", 1) if error.status == 503 else error


class _Call:
    """One request on its way to vLLM and back.

    The head of a response waits for its first part, so that an error before the first token has its own status.
    """

    def __init__(self, app: GenerationApp, context: RequestContext, receive: Receive, send: Send) -> None:
        self._app, self.context, self._receive, self._send = app, context, receive, send
        self._body: bytes | None = None
        self._prompt_tokens = 0  # estimated
        self._options: dict[str, Any] = {}
        self._head: Message | None = None
        self._stream: StreamMeter | None = None
        self._parts: list[bytes] = []  # of a response that is not a stream
        self.begun = self.complete = self.disconnected = self.failed = False
        self.error: ApiError | None = None

    async def read(self) -> None:
        """Read the body, and note what the client asks for. Raises `ClientDisconnectedError`."""
        parts, more = [], True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        self._body = b"".join(parts)
        self._options = meter.request_options(self._body)
        self.context.inputs = 1

    def reserve(self) -> None:
        """Reserve the tokens of this request. Raises `LimitError`."""
        if self.context.charge is not None and self._body is not None:
            self._prompt_tokens, answers = meter.expected_tokens(self._body, self._app.context)
            self.context.charge.reserve(self._prompt_tokens + answers, time.time())

    async def receive(self) -> Message:
        """Return the next message for vLLM."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        """Pass on a message of vLLM."""
        if message["type"] == "http.response.start":
            self._head = message
            if message["status"] < 400 and (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]:
                self._stream = StreamMeter(self.context, self._options)
                message["headers"] = [*message["headers"], *_STREAM_HEADERS]
        elif message["type"] != "http.response.body" or self._head is None or self.error or self.disconnected:
            return
        elif self._head["status"] >= 500:
            await self._collect_error(message)
        elif self._stream is not None:
            await self._pass_event(self._stream, message)
        else:
            await self._pass_body(message)

    async def _collect_error(self, message: Message) -> None:
        self._parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            self.error = _error_of(b"".join(self._parts), self._head["status"] if self._head else 500)

    async def _pass_event(self, stream: StreamMeter, message: Message) -> None:
        body, more = message.get("body", b""), message.get("more_body", False)
        passed = stream.pass_on(body) if body else b""
        self._app.events += 1
        if stream.error and not stream.events:
            self.error = _error_of(stream.error, 500)
            return
        self.failed = stream.error is not None
        if not more and not stream.done:
            return  # `_generate` ends the stream with an error event
        if passed or not more:
            await self._begin()
            self.complete = not more
            await self._send({"type": "http.response.body", "body": passed, "more_body": more})

    async def _pass_body(self, message: Message) -> None:
        await self._begin()
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._head and self._head["status"] < 400:
            self._parts.append(body)
        self.complete = not more
        await self._send(message)

    async def _begin(self) -> None:
        if not self.begun and self._head is not None:
            self.begun = True
            await self._send(self._head)

    async def break_off(self, error: ApiError) -> None:
        """End a begun stream with an error event: clients take an early end for a complete answer."""
        self.context.code = error.code
        self.complete = True
        events = b"data: " + error.body() + b"\n\n" + meter.DONE if self._stream else b""
        await self._send({"type": "http.response.body", "body": events})

    def count(self) -> None:
        """Write the tokens to the context, and charge them to the key."""
        if self._stream is not None:
            self._stream.count()
        elif self._parts and self.error is None:
            meter.count_body(self.context, b"".join(self._parts))
        if self.context.charge is not None:
            used = self.context.input_tokens + self.context.output_tokens
            # vLLM does not say what it computed for a client that left before the response.
            self.context.charge.settle(used or self._prompt_tokens * self.disconnected, time.time())


def _error_of(body: bytes, status: int) -> ApiError:
    """Return the error in vLLM's envelope. `status`: if the envelope has none."""
    try:
        error = orjson.loads(body)["error"]
        code = error.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else status
        return ApiError(status, str(error["message"]), code=None if isinstance(code, int) else code)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return ApiError(status, "generation failed; see the server log", code="internal_error")
