"""The ASGI application between the edge and vLLM's: usage, complete streams, and the status of a lost engine."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferctl.batching.fairness import Shares
from inferctl.serve.api import docs_page
from inferctl.serve.backend.charges import GenerationCharges
from inferctl.serve.edge.edge import ClientDisconnectedError, read_body, respond
from inferctl.serve.edge.errors import ApiError, at_capacity, key_share, wrong_method
from inferctl.serve.edge.request_context import RequestContext, context_of
from inferctl.serve.generate import live_adapters, protocols, vllm_request
from inferctl.serve.generate.control import ENGINE_LOST
from inferctl.serve.generate.engine_usage import EngineUsage
from inferctl.serve.generate.model_names import ModelNames
from inferctl.serve.generate.protocols import COUNT_TOKENS, ENDPOINTS, NAMES, TOKENIZER
from inferctl.serve.generate.vllm_request import VllmRequest
from inferctl.tenancy.access.limits import BYTES_PER_TOKEN

log = logging.getLogger("inferctl.edge")

# vLLM has more endpoints that generate, whose tokens would not be counted, and some that change the server.
_PASSED = frozenset({"/version"})
_MODELS = "/v1/models"
# vLLM's pages load scripts from other hosts.
_DOCUMENTS = frozenset({"/openapi.json", "/docs", "/redoc"})
# Bytes that vLLM tokenizes for these endpoints at a time, in one thread for which all chats wait: about 0.1 s.
_TOKENIZER_BYTES = 256 * 1024
_COUNT = re.compile(rb'\{"(?:count|input_tokens)":(\d+)')  # how the responses of tokenizers start
_STORED = re.compile("/v1/(responses|conversations)/")
# What a client must not tell vLLM, and what the edge tells it.
_NOT_PASSED = frozenset({b"content-length", b"x-request-id", b"x-vllm-priority", b"x-data-parallel-rank"})
# Tokens of an answer, assumed until requests complete: for the metrics of demand.
ASSUMED_ANSWER_TOKENS = 256
# For budgets: what chat templates add to a prompt, at most. A byte of the body is at most one token.
_TEMPLATE_TOKENS = 1024
_FAILED = "generation failed; see the server log"
_STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


class GenerationApp:
    """`app` is vLLM's application, `engine` its `EngineClient`. `names`: of its model and adapters.

    `healthy()` asks vLLM whether its engine runs.

    `sequences`: the most that run at a time. `charges`: of the edge.

    `offer(size)` is called for each request that asks for tokens, with the bytes of its body, also if vLLM rejects it.
    `has_slots`: whether vLLM has slots for adapters. `adapters` answers `/adapters`; None if none can be added.
    `validate`: of vLLM's class for bodies of Responses.
    `stopped()` returns the error for requests that are cancelled when the server ends. `running`: how many complete
    requests vLLM has. `tokenizing`: the same of the tokenizer. `events`: how many parts of streams arrived, which shows
    progress.
    """

    def __init__(
        self,
        app: ASGIApp,
        engine: Any,
        names: ModelNames,
        healthy: Callable[[], Awaitable[bool]],
        stopped: Callable[[], ApiError],
        sequences: int,
        charges: GenerationCharges,
        offer: Callable[[int], None] = lambda _: None,
        has_slots: bool = False,
        adapters: Callable[[Scope, Receive], Awaitable[Any]] | None = None,
        validate: Callable[[Any], object] = lambda _: None,
    ) -> None:
        self._names, self.context, self._charges = names, names.context, charges
        # No more than run at a time: what waits in vLLM's queue, all other keys wait for.
        self._sequences = Shares(sequences)
        self._tokenizer = Shares(_TOKENIZER_BYTES)
        self._app, self.engine = app, engine
        self._healthy, self._stopped, self._offer = healthy, stopped, offer
        self._has_slots, self._adapters, self._validate = has_slots, adapters, validate
        self.running = self.tokenizing = self.events = 0
        self._alone: asyncio.Event | None = None  # set at the end of a request that runs alone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Raises `ApiError` for one without a begun response."""
        try:
            await self._answer(scope, receive, send)
        finally:
            self._names.release(context_of(scope))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in ENDPOINTS and scope["method"] == "POST":
            await self._generate(scope, receive, send)
        elif path in TOKENIZER and scope["method"] == "POST":
            await self._tokenize(scope, receive, send)
        elif path in _DOCUMENTS and scope["method"] == "GET":
            await self._document(scope, receive, send)
        elif path == _MODELS or path.startswith(f"{_MODELS}/"):
            await self._send_models(scope, send)
        elif path in NAMES:
            raise wrong_method(scope["method"], "POST")
        elif path in _PASSED:
            await self._app(scope, receive, send)
        elif path in live_adapters.PATHS and self._adapters:
            await respond(send, 200, orjson.dumps(await self._adapters(scope, receive)), "application/json")
        else:
            # The path may have a key by mistake, and clients log errors.
            message = "this server keeps no responses" if _STORED.match(path) else "no such endpoint"
            raise ApiError(404, f"{message}; POST to {' or '.join(ENDPOINTS)}", code="not_found")

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        name = functools.partial(self._names.resolve, context)
        anthropic = scope["path"] == COUNT_TOKENS
        request = await _read(
            context, receive, lambda raw: vllm_request.tokenization(raw, self.context, name, of_anthropic=anthropic)
        )
        self._reserve(context, request.prompt_tokens)
        size, tenant, used = len(request.body), context.caller.tenant or "", request.prompt_tokens
        if not self._tokenizer.take(tenant, size):
            if tenant:
                raise key_share("bytes that wait to be tokenized")
            raise at_capacity("many texts wait to be tokenized", "tokenizer_full", 1)
        self.tokenizing += 1
        messages, status, error = [_message(request)], 0, b""

        async def read() -> Message:
            if messages:
                return messages.pop()
            # vLLM's tokenizer goes on if the client leaves, so the bytes count in the share until its end.
            await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def pass_on(message: Message) -> None:
            nonlocal used, status, error
            status = message.get("status", status)
            if status >= 400:
                used, context.in_vain = 0, request.prompt_tokens
                error += message.get("body", b"")
                return
            if found := _COUNT.match(message.get("body", b"")):
                used = int(found[1])
            await send(message)

        try:
            await self._app(_scope(scope, context.asked.id, request), read, pass_on)
        finally:
            self.tokenizing -= 1
            self._tokenizer.release(tenant, size)
            self._charges.settle(context.number, used, used)
        if status >= 400:
            raise _error_of(error, status)

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
            if path in NAMES or path in _PASSED or path.startswith(_MODELS)
        }
        if scope["path"] == "/openapi.json":
            media, body = "application/json", orjson.dumps(document)
        else:
            media, body = "text/html; charset=utf-8", docs_page.render(document).encode()
        await respond(send, 200, body, media)

    async def _send_models(self, scope: Scope, send: Send) -> None:
        """Send the names that the key of a request may use, or one of them. vLLM's own list has paths of files."""
        if scope["method"] != "GET":
            raise wrong_method(scope["method"], "GET")
        context, name = context_of(scope), scope["path"][len(_MODELS) + 1 :]
        cards = self._names.cards(context)
        if name:
            self._names.resolve(context, name)
        found = next(card for card in cards if card["id"] == name) if name else {"object": "list", "data": cards}
        await respond(send, 200, orjson.dumps(found), "application/json")

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        caller, name = context.caller, functools.partial(self._names.resolve, context)
        limited, most = (
            caller.limits[1] is not None or bool(caller.budgets) or self._charges.models_have_budgets,
            None if caller.tenant is None else self._sequences.most,
        )
        request = await _read(
            context,
            receive,
            lambda raw: vllm_request.generation(
                context.asked.endpoint,
                raw,
                self.context,
                name,
                limited=limited,
                most_sequences=most,
                validate=self._validate,
            ),
        )
        context.inputs = request.prompts
        self._reserve(context, request.tokens)
        bound = len(request.body) + _TEMPLATE_TOKENS * request.prompts
        prompt = min(bound, self.context * request.prompts)
        if vllm_request.has_media(request.body):
            prompt = self.context * request.prompts
        answers, model = request.sequences * request.answer_tokens, context.model or ""
        context.budget = self._charges.hold(context.number, caller, model, prompt, answers)
        self._offer(context.body_bytes)
        call, tenant = _Call(self, context, request, receive, send), caller.tenant
        if tenant is None:
            await self._run_among(call, scope)
            return
        if not self._sequences.take(tenant, request.sequences, strict=request.sequences > 1):
            raise key_share("sequences in flight")
        try:
            await self._run_among(call, scope)
        finally:
            self._sequences.release(tenant, request.sequences)

    def _reserve(self, context: RequestContext, tokens: int) -> None:
        """Reserve tokens, which are settled when the response ends. Raises `RejectedError`."""
        context.quotas = self._charges.reserve(context.number, tokens)
        context.quotas_known = True

    async def _run_among(self, call: _Call, scope: Scope) -> None:
        """Run a request next to the others. With adapters, one for the log-probabilities of its prompt runs alone.

        vLLM's engine on CPUs (0.32) ends if a step has another request next to it.
        """
        if not (call.request.prompt_logprobs and self._has_slots):
            while self._alone:
                await self._alone.wait()
            await self._run(call, scope)
            return
        if call.request.sequences > 1 or call.request.answer_tokens > 1:
            message = "with adapters, prompt_logprobs and echo require one prompt, n: 1 and max_tokens: 1"
            raise ApiError(400, message, code="invalid_value", param="prompt_logprobs")
        if self.running or self._alone:
            raise at_capacity("log-probabilities of a prompt need an idle server", "prompt_logprobs_busy", 1)
        self._alone = asyncio.Event()
        try:
            await self._run(call, scope)
        finally:
            self._alone.set()
            self._alone = None

    async def _run(self, call: _Call, scope: Scope) -> None:
        self.running += 1
        call.usage.watch()
        try:
            await self._app(_scope(scope, call.id, call.request), call.receive, call.send)
        except asyncio.CancelledError:
            if not call.disconnected:
                if call.begun and not call.complete:
                    await call.break_off(self._stopped())
                raise
        except Exception:
            if not (call.disconnected or call.streams):
                raise
            log.exception("request %s", call.context.asked.id.decode())
            call.failed = True
        finally:
            self.running -= 1
            call.count()
            context = call.context
            tokens = context.input_tokens, context.cached_tokens, context.output_tokens
            context.budget = self._charges.settle(context.number, *tokens)
        if call.error is not None:
            raise await self._as_error(call.error)
        if call.complete:
            if not call.usage.begun:  # by a version of vLLM that generates in another way
                log.error("vLLM generated tokens that the edge did not count")
                call.context.code = "not_counted"
            return
        if call.disconnected:
            raise ClientDisconnectedError
        error = ApiError(500, "the response ended early", code="internal_error")
        if call.failed:
            error = await self._as_error(ApiError(500, _FAILED, code="generation_failed"))
        if not call.begun:
            raise error
        await call.break_off(error)

    async def _as_error(self, error: ApiError) -> ApiError:
        """Return a 503 for vLLM's 500 if the engine is lost, and a 429 for its 503 if the queue is full."""
        if error.status < 500:
            return error
        if not await self._healthy():
            return ApiError(503, ENGINE_LOST, code="engine_lost", headers={"retry-after": "5"})
        return at_capacity("the queue is full", "queue_full", 1) if error.status == 503 else error


class _Call:
    """One request on its way to vLLM and back. `streams`: its response is a stream of events.

    The head of a response waits for its first token, so that an error before has its own status.
    """

    def __init__(
        self, app: GenerationApp, context: RequestContext, request: VllmRequest, receive: Receive, send: Send
    ) -> None:
        self._app, self.context, self.request, self._receive, self._send = app, context, request, receive, send
        self.id = b"%s-%016x" % (context.asked.id, random.getrandbits(64))  # of a client, it may not be unique
        self.usage, self._format = EngineUsage(), protocols.stream_of(context.asked.endpoint)
        self._body: Message | None = _message(request)
        self._head: Message | None = None
        self._early = self._error = b""
        self._events, self._done = 0, False
        self.begun = self.complete = self.disconnected = self.failed = self.streams = False
        self.error: ApiError | None = None

    async def receive(self) -> Message:
        """Return the next message for vLLM. It does not learn that a client left whose request the engine has."""
        if self._body is not None:
            body, self._body = self._body, None
            return body
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = True
            if self.usage.begun and not self.complete:
                await self.usage.abort(self._app.engine)
                await asyncio.Event().wait()  # for the response, which ends now
        return message

    async def send(self, message: Message) -> None:
        """Pass on a message of vLLM."""
        if message["type"] == "http.response.start":
            self._head = message
            self.streams = (b"content-type", b"text/event-stream; charset=utf-8") in message["headers"]
            if self.streams:
                message["headers"] = [*message["headers"], *_STREAM_HEADERS]
        elif message["type"] != "http.response.body" or self._head is None or self.disconnected:
            return
        elif self._head["status"] >= 400:
            self._error += message.get("body", b"")
            if not message.get("more_body", False):
                self.error = _error_of(self._error, self._head["status"])
        elif self.streams:
            self._app.events += 1
            await self._pass_events(message)
        else:
            await self._pass(message.get("body", b""), message.get("more_body", False))

    async def _pass_events(self, message: Message) -> None:
        """Pass on events. vLLM sends complete ones."""
        passed, more = b"", message.get("more_body", False)
        for event in message.get("body", b"").split(b"\n\n"):
            if not event or self.failed:
                continue
            if event.startswith(self._format.error):
                self.failed = True
                if not self.begun:
                    self.error = _error_of(event.partition(b"data: ")[2], 500)
            elif event.startswith(self._format.early):
                self._early += event + b"\n\n"
            else:
                self._done = self._done or event.startswith(self._format.end)
                passed += self._early + event + b"\n\n"
                self._early = b""
            self._events += 1
        if (passed or not more) and (more or self._done):  # else, `_run` ends the stream with an error event
            await self._pass(passed, more)

    async def _pass(self, body: bytes, more: bool) -> None:
        if not self.begun and self._head is not None:
            self.begun = True
            await self._send(self._head)
        self.complete = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def break_off(self, error: ApiError) -> None:
        """End a begun stream with an error event: clients take an early end for a complete answer."""
        self.context.code = error.code
        self.complete = True
        events = self._format.error_event(error, self._events) if self.streams else b""
        await self._send({"type": "http.response.body", "body": events})

    def count(self) -> None:
        """Write the tokens to the context."""
        context, usage = self.context, self.usage
        context.input_tokens, context.output_tokens, context.cached_tokens = usage.prompt, usage.output, usage.cached
        if usage.first_token is not None:
            context.phases["first_token"] = usage.first_token - context.started
        # vLLM tokenized it, also for a client that left then.
        if not usage.begun and (self.disconnected or (self.error and self.error.status < 500)):
            context.in_vain = self.request.prompt_tokens


async def _read(context: RequestContext, receive: Receive, parse: Callable[[bytes], VllmRequest]) -> VllmRequest:
    """Return what the body asks for. Raises what `read_body` raises, and the `ApiError` of `parse`."""
    raw = await read_body(receive)
    try:
        return parse(raw)
    except ApiError:
        context.in_vain = -(-len(raw) // BYTES_PER_TOKEN)
        raise


def _message(request: VllmRequest) -> Message:
    return {"type": "http.request", "body": request.body, "more_body": False}


def _scope(scope: Scope, request_id: bytes, request: VllmRequest) -> Scope:
    """Return the scope of a request for vLLM."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _NOT_PASSED]
    headers += [(b"content-length", b"%d" % len(request.body)), (b"x-request-id", request_id)]
    return {**scope, "headers": headers}


def _error_of(body: bytes, status: int) -> ApiError:
    """Return the error in vLLM's envelope. `status`: if the envelope has none."""
    try:
        error = orjson.loads(body)["error"]
        code = error.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else status
        message, code = str(error["message"]), None if isinstance(code, int) else code
        code = "context_length_exceeded" if "maximum context length" in message else code
        return ApiError(status, message, code=code, param=error.get("param"))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return ApiError(status, _FAILED, code="internal_error")
