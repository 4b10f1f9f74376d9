"""The edge: an ASGI middleware in front of every task. It knows neither the model nor the engine.

It gives each request an id, checks its key and the limits of the key, limits what one and all of them can hold, answers
the probes, turns errors into responses, rejects requests while the server starts or shuts down, and emits one
`UsageEvent` per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferctl.batching.fairness import Shares
from inferctl.serve.edge import access as edge_access
from inferctl.serve.edge import pages
from inferctl.serve.edge.access import EdgeAccess
from inferctl.serve.edge.errors import ApiError, at_capacity, key_share, wrong_method
from inferctl.serve.edge.lifecycle import Lifecycle
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge.request_context import (
    CLIENT_DISCONNECTED,
    DISCONNECTED,
    HEADER_LINES,
    ON_DISCONNECT,
    OTHER,
    REJECTION,
    RequestContext,
    UsageEvent,
)
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.access.limits import LimitError

log = logging.getLogger("inferctl.edge")

T = TypeVar("T")
_LARGE_PART_BYTES = 16 * 1024


class ClientDisconnectedError(Exception):
    """The client disconnected, so no response is needed. `estimated`: the tokens of its event are not exact."""

    def __init__(self, estimated: bool = False) -> None:
        super().__init__()
        self.code = "usage_estimated" if estimated else "client_disconnected"


async def unless_disconnected(work: Callable[[], Awaitable[T]], scope: Scope) -> T:
    """Return the result of `work()`. If the client disconnects first, cancel it and raise `ClientDisconnectedError`.

    It runs in the task of the request: a task for it and one that waits for the disconnect would take 7 us.
    """
    state, task, disconnected = scope["state"], asyncio.current_task(), False
    assert task is not None
    if DISCONNECTED in state:
        raise ClientDisconnectedError

    def cancel() -> None:
        nonlocal disconnected
        if not disconnected:  # the connection can notice it twice
            disconnected = True
            task.cancel()

    state[ON_DISCONNECT] = cancel
    try:
        return await work()
    except asyncio.CancelledError:
        if disconnected and not task.uncancel():  # else the drain cancelled it too
            raise ClientDisconnectedError from None
        raise
    finally:
        del state[ON_DISCONNECT]


async def read_body(context: RequestContext, receive: Receive) -> bytes:
    """Return the body of a request.

    Raises `ClientDisconnectedError`, and `LimitError` if the body exceeds a limit of its key. A size that the client
    declared is charged before.
    """
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    raw = b"".join(parts)
    if context.charge is not None and not context.content_length:
        await context.charge.body(len(raw), time.time())
    return raw


@dataclass(frozen=True)
class EdgeLimits:
    """`max_body_bytes`: of one request. `max_requests` and `max_bytes` (of bodies): of all requests in flight."""

    max_body_bytes: int = 4 * 1024 * 1024
    max_requests: int = 4096
    max_bytes: int = 64 * 1024 * 1024


class Edge:
    """The middleware around `app`.

    `emit` receives the events. `page(path)` returns what to answer at `pages.PATHS`. `endpoints`: path -> name in
    events, for the paths of tasks. `error_body(path, error)` returns the body of an error response. `access`: who
    may use the server; None for everyone. `charge` charges a request to its key, and raises `LimitError`.
    `check_metering()` raises `ApiError` if the event of another request could not be recorded.
    """

    def __init__(
        self,
        app: ASGIApp,
        lifecycle: Lifecycle,
        *,
        emit: Callable[[UsageEvent], None],
        page: Callable[[str], Awaitable[Page]],
        endpoints: Mapping[str, str],
        error_body: Callable[[str, ApiError], bytes] = lambda _path, error: error.body(),
        limits: EdgeLimits | None = None,
        access: EdgeAccess | None = None,
        charge: Callable[[ApiKey, RequestContext], None] = lambda _key, _context: None,
        check_metering: Callable[[], None] = lambda: None,
    ) -> None:
        self.in_flight = 0
        self.unfinished_responses = 0  # of complete requests that were still running when the drain ended
        self.turn = asyncio.Lock()  # one part of one large response at a time
        self.stopped = ApiError(503, "the server stopped", code="stopped")  # for requests that the drain cancels
        self._body_bytes = 0  # of all requests in flight
        self._app, self._lifecycle, self._emit, self._limits = app, lifecycle, emit, limits or EdgeLimits()
        # All requests with bodies of this size are within `max_bytes`, so these are not shared.
        self._small_body = self._limits.max_bytes // self._limits.max_requests
        self._requests, self._bodies = Shares(self._limits.max_requests), Shares(self._limits.max_bytes)
        self._page, self._endpoints, self._access, self._charge = page, endpoints, access, charge
        self.error_body = error_body
        self._check_metering = check_metering

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

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = RequestContext.of(scope, self._endpoints.get(scope["path"], OTHER))
        request = _EdgeRequest(self, context, scope, receive, send)
        self.in_flight += 1
        counted = None  # the tenant, if the request counts in its share
        stopped = False
        try:
            key = self._access.authenticate(scope, context) if self._access else None
            self._admit(scope, context)
            if context.tenant is not None:
                if not self._requests.take(context.tenant):
                    raise key_share("requests in flight")
                counted = context.tenant
            if key and scope["method"] == "POST":
                self._charge(key, context)
                if context.charge is not None:
                    await context.charge.body(context.content_length, time.time())
            await self._app(scope, request.receive, request.send)
        except asyncio.CancelledError:  # the drain took too long
            stopped = True
            self.unfinished_responses += request.body_complete
            await request.fail(self.stopped)
        except ClientDisconnectedError as error:
            context.status, context.code = CLIENT_DISCONNECTED, error.code
        except ApiError as error:
            await request.fail(error)
        except LimitError as error:
            await request.fail(edge_access.limit_exceeded(error))
        except Exception:  # a bug of the server must not leave a request without a response
            log.exception("request %s", context.id.decode())
            await request.fail(ApiError(500, "internal error; see the server log", code="internal_error"))
        finally:
            if (use := context.use) is not None:
                if not stopped:
                    with contextlib.suppress(asyncio.CancelledError):
                        await use.settled()
                context.input_tokens, context.engine_seconds = use.tokens, use.seconds
            self.in_flight -= 1
            self._body_bytes -= context.body_bytes
            if counted is not None:
                self._requests.release(counted)
                if context.shared_bytes:
                    self._bodies.release(counted, context.shared_bytes)
            if rejection := scope.get("state", {}).get(REJECTION):  # the client got this response instead
                context.status, context.code = rejection
            if context.charge is not None:
                computed = context.input_tokens - context.cached_tokens + context.output_tokens
                context.charge.close(give_back=context.status == 429 or context.status >= 500, computed=computed)
            self._emit(context.event())

    def _admit(self, scope: Scope, context: RequestContext) -> None:
        """Reject a request before its body is read."""
        limits = self._limits
        self._check_body(context.content_length)  # first, since rejections count as demand of this size
        if scope["method"] == "POST" and not self._lifecycle.accepts_requests:
            raise self._lifecycle.unavailable()
        self._check_metering()
        if self.in_flight > limits.max_requests:
            raise at_capacity(f"{limits.max_requests} requests are in flight", "too_many_requests", 1)

    def _check_body(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            message = f"the body is larger than the limit of {self._limits.max_body_bytes} bytes"
            raise ApiError(413, message, code="body_too_large")

    def add_body(self, context: RequestContext, size: int) -> None:
        """Count a part of a body. Raises `ApiError` if this body, or all in flight, are too large."""
        self._check_body(context.body_bytes + size)
        # A single request is always accepted, otherwise it would be rejected forever.
        if self._body_bytes > context.body_bytes and self._body_bytes + size > self._limits.max_bytes:
            message = f"the bodies of requests in flight have {self._body_bytes} bytes"
            raise at_capacity(message, "too_many_bytes", 1)
        whole = context.body_bytes + size
        if whole > self._small_body and context.tenant is not None:
            if context.shared_bytes:
                self._bodies.release(context.tenant, context.shared_bytes)
                context.shared_bytes = 0
            if not self._bodies.take(context.tenant, whole):
                raise key_share("bytes of bodies")
            context.shared_bytes = whole
        context.body_bytes += size
        self._body_bytes += size

    async def _probe(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            allowed = "GET, HEAD, POST" if scope["path"] in self._endpoints else "GET, HEAD"
            error = wrong_method(scope["method"], allowed)
            await _respond(send, error.status, error.body(), "application/json", error.headers)
            return
        try:
            if self._access:
                self._access.check_page(scope)
        except ApiError as error:
            await _respond(send, error.status, error.body(), "application/json", error.headers)
            return
        await _respond(send, *await self._page(scope["path"]))


class _EdgeRequest:
    """One request between the connection and the application: counts its body, and adds the id to the response."""

    __slots__ = ("_context", "_edge", "_receive", "_scope", "_send", "body_complete", "complete")

    def __init__(self, edge: Edge, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        self._edge, self._context, self._scope, self._receive, self._send = edge, context, scope, receive, send
        self.body_complete = self.complete = False

    async def receive(self) -> Message:
        """Return the next message of the connection. Raises `ApiError` if the body is too large."""
        message = await self._receive()
        if message["type"] == "http.request" and not self.body_complete:
            self._edge.add_body(self._context, len(message.get("body", b"")))
            if not message.get("more_body", False):
                self.body_complete = True
                self._context.started = time.monotonic()
        return message

    async def send(self, message: Message) -> None:
        """Pass a message of the application on."""
        if message["type"] == "http.response.start":
            self._context.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._context.id)]
            self._add_lines()
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)
        if not self.complete and len(message.get("body", b"")) > _LARGE_PART_BYTES:
            # The connection never waits for its client. Each iteration of the event loop computes at most one part.
            async with self._edge.turn:
                await asyncio.sleep(0)

    def _add_lines(self) -> None:
        if (usage := self._context.usage) is not None:
            self._scope["state"][HEADER_LINES] = edge_access.limit_lines(usage)

    async def fail(self, error: ApiError) -> None:
        """Send an error response. If a response has started, only break it off."""
        if self.complete:
            return
        self._context.code = error.code
        if self._context.status:
            raise error  # the connection is closed, so the client sees that the response is incomplete
        self._context.status = error.status
        headers = {**error.headers, "x-request-id": self._context.id.decode()}
        self._add_lines()
        body = self._edge.error_body(self._scope["path"], error)
        await _respond(self._send, error.status, body, "application/json", headers)


async def _respond(send: Send, status: int, body: bytes, media: str, headers: Mapping[str, str] | None = None) -> None:
    fields = {"content-type": media, "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
