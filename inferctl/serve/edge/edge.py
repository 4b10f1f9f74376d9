"""The edge: an ASGI middleware in front of every task. It knows neither the model nor the engine.

It gives each request an id, checks its key and the limits of the key, limits what one and all of them can hold, answers
the probes, turns errors into responses, rejects requests while the server starts or shuts down, and emits one
`UsageEvent` per request.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferctl.batching.fairness import Shares
from inferctl.serve.edge import access as edge_access
from inferctl.serve.edge import errors, pages
from inferctl.serve.edge.access import EdgeAccess
from inferctl.serve.edge.errors import ApiError, at_capacity, key_share, wrong_method
from inferctl.serve.edge.lifecycle import Lifecycle
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge.request_context import CLIENT_DISCONNECTED, OTHER, ConnectionNotes, RequestContext
from inferctl.serve.work import INTERNAL_ERROR, LIMIT_EXCEEDED, EdgeBackend, RejectedError
from inferctl.tenancy.metering.usage_event import UsageEvent

log = logging.getLogger("inferctl.edge")

T = TypeVar("T")
_LARGE_PART_BYTES = 16 * 1024


class ClientDisconnectedError(Exception):
    """The client disconnected, so no response is needed."""


async def unless_disconnected(work: Callable[[], Awaitable[T]], scope: Scope) -> T:
    """Return the result of `work()`. If the client disconnects first, cancel it and raise `ClientDisconnectedError`.

    It runs in the task of the request: a task for it and one that waits for the disconnect would take 7 us.
    """
    notes, task, disconnected = ConnectionNotes.of(scope), asyncio.current_task(), False
    assert task is not None
    if notes.disconnected:
        raise ClientDisconnectedError

    def cancel() -> None:
        nonlocal disconnected
        if not disconnected:  # the connection can notice it twice
            disconnected = True
            task.cancel()

    notes.on_disconnect = cancel
    try:
        return await work()
    except asyncio.CancelledError:
        if disconnected and not task.uncancel():  # else the drain cancelled it too
            raise ClientDisconnectedError from None
        raise
    finally:
        notes.on_disconnect = None


async def read_body(receive: Receive) -> bytes:
    """Return the body of a request. Raises `ClientDisconnectedError`."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


@dataclass(frozen=True)
class EdgeLimits:
    """`max_body_bytes`: of one request. `max_requests` and `max_bytes` (of bodies): of all requests in flight."""

    max_body_bytes: int = 4 * 1024 * 1024
    max_requests: int = 4096
    max_bytes: int = 64 * 1024 * 1024


class Edge:
    """The middleware around `app`.

    `sinks` receive the events. `page(path)` returns what to answer at `pages.PATHS`. `endpoints`: path -> name in
    events, for the paths of tasks. `error_body(path, error)` returns the body of an error response. `access`: who
    may use the server; None for everyone. `backend` admits and ends each POST; None if there is no engine for them.
    `check_metering()` raises `RejectedError` if the event of another request could not be recorded. `models`: path ->
    the number of the model that has it, None for several; 0 for other paths. `uploads`: path -> the most bytes of a
    body that `app` does not hold, so it counts in no limit. A path in `endpoints` that ends with a slash is for all
    below it.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        *,
        sinks: Sequence[Callable[[UsageEvent], None]],
        page: Callable[[str], Awaitable[Page]],
        endpoints: Mapping[str, str],
        error_body: Callable[[str, ApiError], bytes] = lambda _path, error: error.body(),
        limits: EdgeLimits | None = None,
        access: EdgeAccess | None = None,
        backend: EdgeBackend | None = None,
        check_metering: Callable[[], None] = lambda: None,
        models: Mapping[str, int | None] = {},
        uploads: Mapping[str, int] = {},
    ) -> None:
        self.in_flight = 0
        self.unfinished_responses = 0  # of complete requests that were still running when the drain ended
        self.turn = asyncio.Lock()  # one part of one large response at a time
        self.stopped = ApiError(503, "the server stopped", code="stopped")  # for requests that the drain cancels
        self._body_bytes = 0  # of all requests in flight
        self._app, self._lifecycle, self._sinks, self._limits = app, lifecycle, sinks, limits or EdgeLimits()
        # All requests with bodies of this size are within `max_bytes`, so these are not shared.
        self._small_body = self._limits.max_bytes // self._limits.max_requests
        self._requests, self._bodies = Shares(self._limits.max_requests), Shares(self._limits.max_bytes)
        self._page, self._endpoints, self._access, self.backend = page, endpoints, access, backend
        self._numbers = itertools.count()
        self.error_body = error_body
        self._check_metering, self.models, self.uploads = check_metering, models, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in pages.PATHS and not (scope["method"] == "POST" and scope["path"] in self._endpoints):
            await self._probe(scope, send)
        else:
            await self._request(scope, receive, send)

    def rejected(self, status: int, code: str) -> None:
        """Emit the event of a request that the connection rejected."""
        self._emit(UsageEvent("", "", status, code))

    def _emit(self, event: UsageEvent) -> None:
        for sink in self._sinks:
            try:
                sink(event)
            except Exception:
                log.exception("a usage event was not recorded")

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, names = scope["path"], self._endpoints
        name = names.get(path) or names.get("/".join(path.split("/", 3)[:3]) + "/", OTHER)
        context = RequestContext.of(scope, name, next(self._numbers))
        request = _EdgeRequest(self, context, scope, receive, send)
        error: ApiError | None = None
        self.in_flight += 1
        try:
            if self._access:
                self._access.authenticate(scope, context)
            self._check_load(scope, context)
            if (tenant := context.caller.tenant) is not None:
                if not self._requests.take(tenant):
                    raise key_share("requests in flight")
                request.counted = tenant
            if self.backend is not None and scope["method"] == "POST":
                context.admitted = True
                size, model = context.asked.content_length, self.models.get(path, 0)
                size = 0 if path in self.uploads else size
                context.full = await self.backend.admit(context.number, context.caller, size, model)
            await self._app(scope, request.receive, request.send)
        except asyncio.CancelledError:  # the drain took too long
            self.unfinished_responses += request.body_complete
            request.stopped, error = True, self.stopped
        except ClientDisconnectedError:
            context.status, context.code = CLIENT_DISCONNECTED, "client_disconnected"
        except ApiError as found:
            error = found
        except RejectedError as rejected:
            error = request.rejection(rejected)
        except Exception:  # a bug of the server must not leave a request without a response
            log.exception("request %s", context.asked.id.decode())
            error = ApiError(500, "internal error; see the server log", code=INTERNAL_ERROR)
        try:
            if error is not None:
                await request.fail(error)
        finally:
            if context.admitted and (late := await request.end(context.status)) is not None:
                context.status, context.code = late.status, late.code
            self.in_flight -= 1
            self._body_bytes -= context.body_bytes
            if (tenant := request.counted) is not None:
                self._requests.release(tenant)
                if context.shared_bytes:
                    self._bodies.release(tenant, context.shared_bytes)
            if rejection := request.notes.rejection:  # the client got this response instead
                context.status, context.code = rejection
            self._emit(context.event())

    def _check_load(self, scope: Scope, context: RequestContext) -> None:
        """Reject a request that is too large, or more than this process can take, before its body is read."""
        limits = self._limits
        # First, since rejections count as demand of this size.
        self.check_body(context.asked.content_length, scope["path"])
        if scope["method"] == "POST" and not self._lifecycle.accepts_requests:
            raise self._lifecycle.unavailable()
        self._check_metering()
        if self.in_flight > limits.max_requests:
            raise at_capacity(f"{limits.max_requests} requests are in flight", "too_many_requests", 1)

    def check_body(self, size: int, path: str) -> None:
        """Raise `ApiError` if a body is too large for its path."""
        if size > (limit := self.uploads.get(path, self._limits.max_body_bytes)):
            message = f"the body is larger than the limit of {limit} bytes"
            raise ApiError(413, message, code="body_too_large")

    def add_body(self, context: RequestContext, size: int) -> None:
        """Count a part of a body. Raises `ApiError` if all bodies in flight are too large."""
        # A single request is always accepted, otherwise it would be rejected forever.
        if self._body_bytes > context.body_bytes and self._body_bytes + size > self._limits.max_bytes:
            message = f"the bodies of requests in flight have {self._body_bytes} bytes"
            raise at_capacity(message, "too_many_bytes", 1)
        whole = context.body_bytes + size
        tenant = context.caller.tenant
        if whole > self._small_body and tenant is not None:
            if context.shared_bytes:
                self._bodies.release(tenant, context.shared_bytes)
                context.shared_bytes = 0
            if not self._bodies.take(tenant, whole):
                raise key_share("bytes of bodies")
            context.shared_bytes = whole
        context.body_bytes += size
        self._body_bytes += size

    async def _probe(self, scope: Scope, send: Send) -> None:
        path, headers = scope["path"], dict[str, str]()
        try:
            if scope["method"] not in ("GET", "HEAD"):
                raise wrong_method(scope["method"], "GET, HEAD, POST" if path in self._endpoints else "GET, HEAD")
            if self._access:
                self._access.check_page(scope)
            page = await self._page(path)
        except (ApiError, RejectedError) as found:
            error = errors.rejection(found) if isinstance(found, RejectedError) else found
            page, headers = (error.status, error.body(), "application/json"), error.headers
        await respond(send, *page, headers)


class _EdgeRequest:
    """One request between the connection and the application: counts its body, and adds the id to the response.

    `stopped`: the drain ended it. `counted`: the tenant in whose share it counts. `received`: bytes of its body.
    """

    __slots__ = (
        "_edge",
        "_receive",
        "_scope",
        "_send",
        "body_complete",
        "complete",
        "context",
        "counted",
        "notes",
        "received",
        "stopped",
    )

    def __init__(self, edge: Edge, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        self._edge, self.context, self._scope, self._receive, self._send = edge, context, scope, receive, send
        self.notes = ConnectionNotes.of(scope)
        self.body_complete = self.complete = self.stopped = False
        self.counted: str | None = None
        self.received = 0

    async def receive(self) -> Message:
        """Return the next message of the connection. Raises `ApiError` for a body too large, and `RejectedError`."""
        message, context = await self._receive(), self.context
        if message["type"] == "http.request" and not self.body_complete:
            size, path = len(message.get("body", b"")), self._scope["path"]
            self.received += size
            self._edge.check_body(self.received, path)
            if path not in self._edge.uploads:
                self._edge.add_body(context, size)
            if not message.get("more_body", False):
                self.body_complete = True
                context.started = time.monotonic()
                if context.admitted and not context.asked.content_length and context.body_bytes:
                    backend, model = self._edge.backend, self._edge.models.get(self._scope["path"], 0)
                    assert backend is not None
                    await backend.admit(context.number, context.caller, context.body_bytes, model)
        return message

    async def send(self, message: Message) -> None:
        """Pass a message of the application on. A limit that is exceeded after all makes the response in its place."""
        if self.complete:
            return
        context = self.context
        if message["type"] == "http.response.start":
            if not context.quotas_known and (error := await self.end(message["status"])) is not None:
                await self.fail(error)
                return
            context.status = message["status"]
            limits = ((name.encode(), value.encode()) for name, value in self._limit_headers().items())
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", context.asked.id), *limits]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)
        if not self.complete and len(message.get("body", b"")) > _LARGE_PART_BYTES:
            # The connection never waits for its client. Each iteration of the event loop computes at most one part.
            async with self._edge.turn:
                await asyncio.sleep(0)

    def _limit_headers(self) -> dict[str, str]:
        quotas, budget = self.context.quotas, self.context.budget
        headers = edge_access.limit_headers(quotas) if quotas else {}
        return headers | {"x-inferctl-budget": budget.header()} if budget else headers

    async def fail(self, error: ApiError) -> None:
        """Send an error response. If a response has started, only break it off."""
        if self.complete:
            return
        context = self.context
        if not context.status:
            error = await self.end(error.status) or error
        context.code = error.code
        if context.status:
            raise error  # the connection is closed, so the client sees that the response is incomplete
        context.status = error.status
        headers = {**error.headers, "x-request-id": context.asked.id.decode(), **self._limit_headers()}
        body = self._edge.error_body(self._scope["path"], error)
        await respond(self._send, error.status, body, "application/json", headers)
        self.complete = True

    async def end(self, status: int) -> ApiError | None:
        """Tell the backend that the request ends, unless it knows. Returns the error of a limit that it exceeds.

        What remains of the limits is in the headers of the response, so this comes before it, unless they are known.
        """
        context, backend = self.context, self._edge.backend
        if not context.admitted or backend is None:
            return None
        context.admitted = False
        if rejection := self.notes.rejection:
            status = rejection[0]
        give_back, wait = status == 429 or status >= 500, not self.stopped
        if context.quotas_known:
            backend.end(context.number, in_vain=context.in_vain, give_back=give_back)
            return None
        while True:
            try:
                report = backend.report(context.number, in_vain=context.in_vain, give_back=give_back, wait=wait)
                context.count(await report)
            except asyncio.CancelledError:  # by the drain
                wait = False
                continue
            except RejectedError as error:
                return self.rejection(error)
            return None

    def rejection(self, error: RejectedError) -> ApiError:
        """Return the response to a request that the backend rejected."""
        if error.reason == LIMIT_EXCEEDED:  # of a key, before or after the body says which model it is for
            self.context.model = None
        if error.used is not None:
            self.context.admitted = False
            self.context.count(error.used)
        return errors.rejection(error)


async def respond(send: Send, status: int, body: bytes, media: str, headers: Mapping[str, str] = {}) -> None:
    """Send a whole response."""
    fields = {"content-type": media, "content-length": str(len(body)), **headers}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
