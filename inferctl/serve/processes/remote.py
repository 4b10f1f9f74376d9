"""The backend in another process, as an API process sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from inferctl.reading.rows import Tokens
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.processes import frames
from inferctl.serve.processes.frames import Kind, Link, Quotas, Reply, Submission
from inferctl.serve.scheduling.dispatcher import RequestResult
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.access.limits import Charge

# For larger bodies, the backend is asked before they are read. A smaller one is tokenized in about the time that takes.
_ASKED_BYTES = 16 * 1024
_GONE = ApiError(503, "the server ends because of an error", code="engine_unavailable", headers={"retry-after": "1"})


class RemoteBackend:
    """It is a `Backend`. Runs on the event loop. `limits_of(key)`: the limits of a key, requests and tokens."""

    def __init__(self, link: Link, limits_of: Callable[[ApiKey], tuple[int | None, int | None]]) -> None:
        self.link, self._limits_of = link, limits_of
        self._ids = frames.ids()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._contexts: dict[int, RequestContext] = {}
        self._uses: dict[int, RemoteUse] = {}  # of cancelled requests

    def charge(self, key: ApiKey, context: RequestContext) -> None:
        """Note whether limits of the key of a request are to be charged. Part of `Backend`."""
        if self._limits_of(key) != (None, None):
            context.charge = RemoteCharge(self, key, context, next(self._ids))

    async def admit(self, context: RequestContext, size: int) -> None:
        """Ask for a large body. Part of `Backend`."""
        if size > _ASKED_BYTES:
            bulk, shared, number = context.priority == b"bulk", context.tenant is not None, next(self._ids)
            await self.ask(context, number, frames.pack_json(Kind.ADMIT, [number, context.key_id, bulk, shared]))

    async def compute(
        self, context: RequestContext, sequences: Sequence[Tokens], marks: Sequence[int] | None
    ) -> RequestResult:
        """Send a request to the backend, and return its result. Part of `Backend`."""
        charge = context.charge
        number = charge.number if isinstance(charge, RemoteCharge) else next(self._ids)
        submission = Submission(
            number,
            context.key_id or "",
            context.priority == b"bulk",
            context.tenant is not None,
            context.cache_control,
            list(sequences),
            None if marks is None else list(marks),
        )
        frame = frames.pack_submit(submission)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number], self._contexts[number] = future, context
        self.link.send(frame)
        try:
            reply = await future
        except asyncio.CancelledError:
            future = self._waiting[number]
            if future.cancelled():
                context.use = self._uses[number] = RemoteUse(sum(map(len, sequences)))
                self.link.send(frames.pack_numbers(Kind.CANCEL, number))
            elif not future.exception():  # the result arrived at the same time
                _count(context, sequences, future.result())
            raise
        finally:
            self._waiting.pop(number, None)
            self._contexts.pop(number, None)
        _count(context, sequences, reply)
        return reply.result

    async def page(self, path: str) -> Page:
        """Return what the server answers at a path of `pages.PATHS`."""
        number = next(self._ids)
        try:
            page: Page = await self.ask(None, number, frames.pack_json(Kind.PAGE, [number, path]))
        except ApiError as error:
            return error.status, error.body(), "application/json"
        return page

    def on_frame(self, kind: Kind, body: bytes) -> None:
        """Take a frame that answers a request."""
        if kind is Kind.RESULT:
            reply = frames.unpack_result(body)
            self._set_usage(reply.id, reply.quotas)
            self._resolve(reply.id, reply)
            self._end_use(reply.id, None, reply.cached_tokens, reply.engine_seconds)
        elif kind is Kind.REJECT:
            number, error, quotas, computed = frames.unpack_reject(body)
            self._set_usage(number, quotas)
            if context := self._contexts.get(number):
                context.input_tokens, context.cached_tokens, context.engine_seconds = computed
            self._resolve(number, error)
            self._end_use(number, *computed)
        elif kind is Kind.ADMITTED:
            number, quotas = json.loads(body)
            self._set_usage(number, quotas)
            self._resolve(number, None)
        elif kind is Kind.ANSWER:
            number, status, text, media_type = json.loads(body)
            self._resolve(number, (status, text.encode(), media_type))
        elif kind is Kind.ENDED:
            number, tokens, seconds = json.loads(body)
            self._end_use(number, tokens, 0, seconds)

    def lost(self) -> None:
        """Fail all requests: the backend ended."""
        for number in self._waiting:
            self._resolve(number, _GONE)
        for use in self._uses.values():
            use.end(0, 0.0)

    async def ask(self, context: RequestContext | None, number: int, frame: bytes) -> Any:
        """Send a frame, and return what answers it. Raises `ApiError`."""
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        if context is not None:
            self._contexts[number] = context
        self.link.send(frame)
        try:
            return await future
        finally:
            del self._waiting[number]
            self._contexts.pop(number, None)

    def _end_use(self, number: int, tokens: int | None, cached_tokens: int, seconds: float) -> None:
        """Set what a cancelled request used, also if its result was on the way. `tokens`: None for all of it."""
        if (use := self._uses.pop(number, None)) is not None:
            use.end((use.submitted if tokens is None else tokens) - cached_tokens, seconds)

    def _resolve(self, number: int, value: Any) -> None:
        if (future := self._waiting.get(number)) is None:
            return
        if future.cancelled():  # its task has not run since, and needs to know that nothing more will arrive
            future = self._waiting[number] = asyncio.get_running_loop().create_future()
        if future.done():
            return
        if isinstance(value, ApiError):
            future.set_exception(value)
            future.exception()  # if its task is cancelled, nobody reads it
        else:
            future.set_result(value)

    def _set_usage(self, number: int, quotas: Quotas | None) -> None:
        if quotas is not None and (context := self._contexts.get(number)):
            context.usage = RemoteUsage(quotas)


class RemoteUsage:
    """What a key used, as the backend said with the response."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas

    def quotas(self, now: float) -> Quotas:
        """Return the state of the limits of requests and of tokens; None for no limit."""
        return self._quotas


class RemoteCharge(Charge):
    """What a request is charged, in the backend, which knows the request by `number` until `close`."""

    __slots__ = ("_asked", "_backend", "_context", "_in_vain", "_key", "number")

    def __init__(self, backend: RemoteBackend, key: ApiKey, context: RequestContext, number: int) -> None:
        self._backend, self._context, self.number = backend, context, number
        self._key = key.id, key.requests_per_minute, key.tokens_per_minute
        self._in_vain, self._asked = 0, False

    async def body(self, size: int, now: float) -> None:
        """Let the backend charge the request, if it has not yet, and the least that its body costs."""
        backend, self._asked = self._backend, True
        frame = frames.pack_json(Kind.CHARGE, [self.number, self._key, size])
        await backend.ask(self._context, self.number, frame)

    def in_vain(self, amount: int, now: float) -> None:
        """Count tokens of a request that was rejected after its texts were tokenized."""
        self._in_vain += amount

    def close(self, *, give_back: bool, computed: int = 0) -> None:
        """End the request."""
        if self._asked:
            numbers = self.number, give_back, computed, self._in_vain
            self._backend.link.send(frames.pack_numbers(Kind.CLOSE, *numbers))


class RemoteUse:
    """What engines computed for a cancelled request of `submitted` tokens: known when the backend says so. A `Use`."""

    def __init__(self, submitted: int) -> None:
        self.submitted, self.tokens, self.seconds = submitted, 0, 0.0
        self._ended = asyncio.Event()

    def end(self, tokens: int, seconds: float) -> None:
        """Set what was computed."""
        self.tokens, self.seconds = tokens, seconds
        self._ended.set()

    async def settled(self) -> None:
        """Return when engines compute nothing more for the request."""
        await self._ended.wait()


def _count(context: RequestContext, sequences: Sequence[Tokens], reply: Reply) -> None:
    context.input_tokens, context.cached_tokens = sum(map(len, sequences)), reply.cached_tokens
    context.engine_seconds = reply.engine_seconds
