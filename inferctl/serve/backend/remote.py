"""The backend in another process, as an API process sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from inferctl.serve.backend import frames
from inferctl.serve.backend.frames import Kind, Link, Quotas, Reply, Submission
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.engine_process.engine_protocol import Tokens
from inferctl.serve.scheduling.dispatcher import RequestResult
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.access.limits import Charge

# For larger bodies, the backend is asked before they are read. A smaller one is tokenized in about the time that takes.
_ASKED_BYTES = 16 * 1024
# Keys that are remembered. Behind a proxy, callers can have any number of ids.
_MANY_KEYS = 10_000
# For this long (s) after a key exceeded a limit, or had texts tokenized in vain, the backend is asked for each request.
_ASKED_S = 60.0
_GONE = ApiError(503, "the server ends because of an error", code="engine_unavailable", headers={"retry-after": "1"})


class RemoteBackend:
    """It is a `Backend`. Runs on the event loop. `limits_of(key)`: the limits of a key, requests and tokens."""

    def __init__(self, link: Link, limits_of: Callable[[ApiKey], tuple[int | None, int | None]]) -> None:
        self.link, self._limits_of = link, limits_of
        self._ids = frames.ids()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._contexts: dict[int, RequestContext] = {}
        self._uses: dict[int, RemoteUse] = {}  # of cancelled requests
        self._keys: dict[tuple[str, int | None, int | None], int] = {}  # id and limits -> number in frames
        self._key_numbers = frames.ids()
        self._suspects: dict[str, float] = {}  # until when the backend is asked for each request of a key

    def charge(self, key: ApiKey, context: RequestContext) -> None:
        """Note that a request has a key. It is charged with its tokens. Part of `Backend`."""
        context.key = key
        if (limits := self._limits_of(key)) != (None, None):
            context.charge = RemoteCharge(self, key, limits[1])

    async def admit(self, context: RequestContext, size: int, *, read: bool = False) -> None:
        """Ask for a large body, also after it was read if the client did not declare its size. Part of `Backend`."""
        most, charge = _ASKED_BYTES, context.charge
        if isinstance(charge, RemoteCharge):
            if charge.token_limit is not None:  # what does not fit for sure
                most = min(most, charge.token_limit)
            if self._suspects.get(context.key_id or "", 0.0) > time.monotonic():
                most = -1
        if size > most:
            flags = (context.priority == b"bulk") + 2 * (context.tenant is not None)
            key = self.index(context.key)
            await self._ask(context, lambda id: frames.pack_numbers(Kind.ADMIT, id, key, flags, size))

    async def compute(
        self, context: RequestContext, sequences: Sequence[Tokens], marks: Sequence[int] | None
    ) -> RequestResult:
        """Send a request to the backend, and return its result. Part of `Backend`."""
        number = next(self._ids)
        submission = Submission(
            number,
            self.index(context.key),
            context.priority == b"bulk",
            context.tenant is not None,
            context.cache_control,
            list(sequences),
            None if marks is None else list(marks),
        )
        frame, charge = frames.pack_submit(submission), context.charge
        if isinstance(charge, RemoteCharge):
            charge.submitted = True
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number], self._contexts[number] = future, context
        self.link.send(frame)
        try:
            reply = await future
        except asyncio.CancelledError:
            future = self._waiting[number]
            if future.cancelled():
                context.use = self._uses[number] = RemoteUse(sum(map(len, sequences)))
                if isinstance(charge, RemoteCharge):
                    charge.cancelled = number
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
        try:
            page: Page = await self._ask(None, lambda id: frames.pack_page(id, path))
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
                if error.code == "rate_limit_exceeded":
                    self.suspect(context.key_id or "")
            self._resolve(number, error)
            self._end_use(number, *computed)
        elif kind is Kind.ADMITTED:
            (number,) = frames.unpack_numbers(body)
            self._resolve(number, None)
        elif kind is Kind.ANSWER:
            number, page = frames.unpack_answer(body)
            self._resolve(number, page)
        elif kind is Kind.ENDED:
            number, tokens, seconds = frames.unpack_ended(body)
            self._end_use(number, tokens, 0, seconds)

    def lost(self) -> None:
        """Fail all requests: the backend ended."""
        for number in self._waiting:
            self._resolve(number, _GONE)
        for use in self._uses.values():
            use.end(0, 0.0)

    async def _ask(self, context: RequestContext | None, frame: Callable[[int], bytes]) -> Any:
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        if context is not None:
            self._contexts[number] = context
        self.link.send(frame(number))
        try:
            return await future
        finally:
            del self._waiting[number]
            self._contexts.pop(number, None)

    def _end_use(self, number: int, tokens: int | None, cached_tokens: int, seconds: float) -> None:
        """Set what a cancelled request used, also if its result was on the way. `tokens`: None for all of it."""
        if (use := self._uses.pop(number, None)) is not None:
            use.end((use.submitted if tokens is None else tokens) - cached_tokens, seconds)

    def suspect(self, key_id: str) -> None:
        """Ask the backend for each request of a key for some time."""
        self._suspects[key_id] = time.monotonic() + _ASKED_S

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

    def index(self, key: ApiKey | None) -> int:
        """Return the number of a key in the next frame, which the backend is told first; 0 for none."""
        if key is None:
            return 0
        fields = key.id, key.requests_per_minute, key.tokens_per_minute
        if (index := self._keys.get(fields)) is None:
            if len(self._keys) >= _MANY_KEYS:
                self._keys.clear()
                self._suspects.clear()
                self.link.send(frames.pack(Kind.FORGET))
            index = self._keys[fields] = next(self._key_numbers)  # never that of another key
            self.link.send(frames.pack_json(Kind.KEY, {"index": index, "fields": fields}))
        return index


class RemoteUsage:
    """What a key used, as the backend said with the response."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas

    def quotas(self, now: float) -> Quotas:
        """Return the state of the limits of requests and of tokens; None for no limit."""
        return self._quotas


class RemoteCharge(Charge):
    """What a request is charged, in the backend. `submitted`: the backend charges and closes it itself.

    `cancelled`: the id of a submitted request whose client left.
    """

    __slots__ = ("_backend", "_in_vain", "_key", "cancelled", "submitted", "token_limit")

    def __init__(self, backend: RemoteBackend, key: ApiKey, token_limit: int | None) -> None:
        self._backend, self._key, self.token_limit, self._in_vain = backend, key, token_limit, 0
        self.submitted, self.cancelled = False, 0

    def check_size(self, size: int, now: float) -> None:
        """Do nothing: `RemoteBackend.admit` asks."""

    def in_vain(self, amount: int, now: float) -> None:
        """Count tokens of a request that was rejected after its texts were tokenized."""
        self._in_vain += amount
        self._backend.suspect(self._key.id)

    def close(self, *, give_back: bool, computed: int = 0) -> None:
        """End the request."""
        backend = self._backend
        if self.cancelled:
            backend.link.send(frames.pack_numbers(Kind.CLOSE, self.cancelled, give_back, computed))
        elif not self.submitted and not give_back:
            backend.link.send(frames.pack_numbers(Kind.CHARGE, backend.index(self._key), self._in_vain))


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
