"""The steps that all endpoints share: check the headers, read the body, run the sequences, send the response."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from starlette.types import Receive, Scope, Send

from inferctl.reading.rows import Rows, Tokens
from inferctl.reading.space import HEADER
from inferctl.serve.api import schemas
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge.edge import read_body, unless_disconnected
from inferctl.serve.edge.errors import ApiError, at_capacity, key_share
from inferctl.serve.edge.request_context import RequestContext, context_of
from inferctl.serve.text.text_parts import InputError
from inferctl.serve.text.tokenizer_pool import Token, TokenizerBusyError, TokenizerPool, TokenizerShareError
from inferctl.serve.work import Backend, Outcome, Work
from inferctl.tenancy.access.limits import BYTES_PER_TOKEN

# Larger bodies are parsed on another thread. For smaller ones, the switch takes longer than the work.
_INLINE_BODY_BYTES = 64 * 1024
# Longer responses are sent in parts, without their length before. So many bytes are about one part of floats.
_WHOLE_BODY_BYTES = 320 * 1024
_TURN_S = 0.001  # of one response on the event loop, until others have their turn
_PHASES = ("tokenize", "queue", "inference")
_TIMES = {name: f"x-inferctl-{name}-ms".encode() for name in _PHASES}  # phase -> header
_SPACE = HEADER.encode()
T = TypeVar("T")
Tokenize: TypeAlias = Callable[[], Awaitable[tuple[Sequence[Tokens], Sequence[int] | None]]]
_large_body = threading.Lock()


@dataclass(frozen=True)
class Inference:
    """What the endpoints of a model share: its tokenizer, and the backend that computes."""

    model: ServedModel
    tokenizer: TokenizerPool
    backend: Backend

    def parse(self, kind: type[schemas.Request], raw: bytes) -> schemas.Request:
        """Return a request. Raises `ApiError` 400, or 404 for another model."""
        request = schemas.parse(kind, raw, max_inputs=self.model.max_inputs)
        self.model.check_name(request.model)
        return request

    async def receive(self, scope: Scope, receive: Receive, parse: Callable[[bytes], T]) -> tuple[RequestContext, T]:
        """Return the context of a request, and `parse(body)`, run on another thread for a large body.

        Raises `ApiError` or `RejectedError` if its headers or a full queue rule it out, what `read_body` raises, and
        the error of `parse`.
        """
        context = context_of(scope)
        schemas.check_content_type(context.asked.content_type)
        if (priority := context.asked.priority) not in (b"", b"interactive", b"bulk"):
            message = f"x-priority must be `interactive` or `bulk`, got {priority.decode('latin-1')!r}"
            raise ApiError(400, message, code="invalid_priority", param="x-priority")
        if context.full is not None:  # so the body is not read
            raise context.full
        raw = await read_body(receive)
        try:
            large = len(raw) > _INLINE_BODY_BYTES
            return context, await asyncio.to_thread(_parse_large, parse, raw) if large else parse(raw)
        except ApiError:
            context.in_vain = len(raw) // BYTES_PER_TOKEN
            raise

    async def run(self, scope: Scope, tokenize: Tokenize) -> Rows:
        """Return the rows of the sequences, and store counts and times in the context.

        `tokenize` gives the sequences and their marks (see `Batch`). Raises `ApiError`, `RejectedError`, and
        `ClientDisconnectedError` if the client disconnects first.
        """
        context, started = context_of(scope), time.monotonic()

        async def compute() -> tuple[Outcome, float]:
            try:
                sequences, marks = await tokenize()
            except (InputError, asyncio.CancelledError):
                context.in_vain = context.body_bytes // BYTES_PER_TOKEN
                raise
            context.inputs, tokens = len(sequences), sum(map(len, sequences))
            if tokens > self.model.max_tokens:
                context.in_vain = tokens
                message = f"the request has at least {tokens} tokens; the limit is {self.model.max_tokens}"
                raise ApiError(400, message, code="too_many_tokens")
            tokenized = time.monotonic()
            work = Work(context.caller, sequences, marks, context.asked.cache_control, self.model.number)
            return await self.backend.submit(context.number, work), tokenized

        outcome, tokenized = await self.unless_disconnected(compute, scope)
        context.count(outcome.used)
        context.quotas_known, context.model = True, self.model.name
        times = (tokenized - started, outcome.queue_seconds, outcome.inference_seconds)
        context.phases = dict(zip(_PHASES, times, strict=True))
        return outcome.rows

    async def tokens(self, scope: Scope, tokenize: Callable[[], Awaitable[list[list[Token]]]]) -> list[list[Token]]:
        """Return the tokens of texts. They count for the limits of the key, but are not computed: no usage."""
        context = context_of(scope)
        found = await self.unless_disconnected(tokenize, scope)
        context.model, context.inputs = self.model.name, len(found)
        context.in_vain = sum(map(len, found))
        return found

    async def unless_disconnected(self, work: Callable[[], Awaitable[T]], scope: Scope) -> T:
        """Return `work()`. Raises `ApiError` in place of an error of the tokenizer, and `ClientDisconnectedError`."""
        try:
            return await unless_disconnected(work, scope)
        except TokenizerBusyError as error:
            raise at_capacity(str(error), "tokenizer_full", 1) from None
        except TokenizerShareError:
            raise key_share("characters that wait to be tokenized") from None
        except InputError as error:
            raise ApiError(400, str(error), code=error.code, param=error.field) from None


def _parse_large(parse: Callable[[bytes], T], raw: bytes) -> T:
    """Return `parse(raw)`, one body at a time: parsed objects need up to 30 times the memory of the body.

    The garbage collector would visit millions of new objects again and again. Meanwhile no other thread runs.
    """
    with _large_body:
        gc.disable()
        try:
            return parse(raw)
        finally:
            gc.enable()


async def send_json(send: Send, parts: Iterable[bytes], context: RequestContext) -> None:
    """Send a successful response whose body is `parts`, with the times and the tokens of the request as headers."""
    headers = [(b"content-type", b"application/json"), (b"x-inferctl-tokens", b"%d" % context.input_tokens)]
    if context.cached_tokens:
        headers.append((b"x-inferctl-cached-tokens", b"%d" % context.cached_tokens))
    if context.space:
        headers.append((_SPACE, context.space))
    headers += [(_TIMES[name], b"%.3f" % (1000 * s)) for name, s in context.phases.items()]
    rest, body, turn = iter(parts), b"", time.monotonic()
    for part in rest:
        body += part
        if len(body) > _WHOLE_BODY_BYTES:
            break
        if time.monotonic() - turn > _TURN_S:  # parts can be short and still take long, such as the largest weights
            await asyncio.sleep(0)
            turn = time.monotonic()
    else:
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in rest:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await asyncio.sleep(0)  # other requests have their turn
        body = part
    await send({"type": "http.response.body", "body": body})
