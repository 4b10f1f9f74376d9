"""uvicorn's connection with bounds on what a client may send and how long it may take; what it refuses itself comes in OpenAI's envelope.

Left alone, uvicorn waits for ever for the rest of a request, takes heads of any size, never finishes a request that asks for an upgrade, and
closes on a client that still sends, which then sees a reset instead of the 413.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from inferctl.serve.http import ApiError

# Above this many connections a new one is told so and closed, probes too: far more than the requests that may be in flight.
_MAX_CONNECTIONS = 8192
_TOO_MANY = (
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 115\r\n\r\n"
    b'{"error":{"message":"too many connections","type":"rate_limit_error","param":null,"code":"too_many_connections"}}\r\n'
)
_HEAD_BYTES = 64 * 1024
_HEADERS = 200
# A request has this long to arrive (seconds), and a second more for each of these many bytes that did.
_PATIENCE = 30.0
_SLOWEST = 16 * 1024
# How long a refused client may go on sending before the connection is cut (seconds).
_LINGER = 2.0
# Fields of one connection only: without them an upgrade is an ordinary request.
_HOP = frozenset({b"connection", b"upgrade", b"http2-settings"})


_EXCHANGE = "inferctl.exchange"


class Exchange:
    """One request and its answer, past ASGI: an answer in one piece instead of two, and a call instead of a task to hear of a client that leaves."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection, self._cycle = connection, cycle

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        # uvicorn tells the newest request of a connection only, not those before it in a pipeline.
        return self._cycle.disconnected or self._connection.lost

    def when_gone(self, call: Callable[[], object]) -> None:
        """Have `call` called when the client leaves, or now when it has left."""
        if self.gone:
            call()
        else:
            self._connection.waiting.add(call)
            # uvicorn stops reading in the middle of a large body; who does not read hears of no end.
            self._cycle.flow.resume_reading()

    def forget(self, call: Callable[[], object]) -> None:
        """The opposite of `when_gone`."""
        self._connection.waiting.discard(call)

    def answer(self, status: int, head: bytes, body: bytes, *, close: bool = False) -> None:
        """The whole answer, once `writable`. `head`: lines of header fields, each with its end, `content-length` among them. `close`: the connection, afterwards."""
        cycle = self._cycle
        if self.gone:
            return
        if close:
            cycle.keep_alive = False
        lines = [STATUS_LINE[status], self._connection.default_head(), head]
        lines += (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)
        cycle.response_started = cycle.response_complete = True
        cycle.transport.write(b"".join(lines))
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()

    async def writable(self) -> None:
        """Wait while the client reads nothing of what was written before."""
        if self._cycle.flow.write_paused and not self.gone:
            await self._cycle.flow.drain()


def exchange(scope: Scope) -> Exchange:
    """That of a request which came over a `Connection`."""
    found: Exchange = scope["extensions"][_EXCHANGE]
    return found


def connection(max_body_bytes: int, patience: float = _PATIENCE) -> type[Connection]:
    """The class to give to uvicorn as `http`."""
    return type("BoundedConnection", (Connection,), {"max_body_bytes": max_body_bytes, "patience": patience})


class Connection(HttpToolsProtocol):
    """One client's connection."""

    max_body_bytes = 32 * 1024 * 1024
    patience = _PATIENCE
    _default_head: tuple[list[tuple[bytes, bytes]], bytes] = ([], b"")  # those of all connections

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._phase: Literal["idle", "head", "body", "refused"] = "idle"
        # Bytes of the request that arrives: those of its head, of what is around its last chunk, or of its trailers; of its body; and around all its chunks.
        self._head = self._body = self._around = 0
        self._began = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._problem: ApiError | None = None
        self._upgrade = b""
        self.lost = False
        self.waiting: set[Callable[[], object]] = set()  # for the end of this connection

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.write(_TOO_MANY)
            transport.close()
            return
        self._timer = self.loop.call_later(self.patience, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._stop_timer()
        self.lost = True
        super().connection_lost(exc)
        for call in tuple(self.waiting):
            call()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._phase == "refused":
            return
        self._unset_keepalive_if_required()
        self._head += len(data)
        self._around += len(data)
        self._problem = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(self._problem or ApiError(400, "this is not valid HTTP", code="invalid_http"))
            return
        if self._phase != "idle" and self._too_much_head():
            self._refuse(_head_too_large())
        elif self._phase == "idle":
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._check)

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._phase, self._began, self._body = "head", self.loop.time(), 0

    def on_headers_complete(self) -> None:
        """See httptools."""
        if len(self.headers) > _HEADERS or len(self.url) > _HEAD_BYTES:
            self._fail(_head_too_large())
        if self.parser.get_method() == b"CONNECT":
            self._fail(ApiError(405, "this is no proxy", code="method_not_allowed"))
        if self.parser.should_upgrade():
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)]
            lines += [b"%s: %s\r\n" % field for field in self.headers if field[0] not in _HOP]
            self._upgrade = b"".join([*lines, b"\r\n"])
            return
        size = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if int(size) > self.max_body_bytes:
            self._fail(_body_too_large(self.max_body_bytes))
        super().on_headers_complete()
        extensions: Any = {_EXCHANGE: Exchange(self, self.cycle)}
        self.scope["extensions"] = extensions
        self._phase, self._head, self._around = "body", 0, 0

    def on_chunk_header(self) -> None:
        """See httptools. Called before the fields that follow the last chunk, too."""
        self._head = 0

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._body += len(body)
        self._head -= len(body)
        self._around -= len(body)
        if self._body > self.max_body_bytes:
            self._fail(_body_too_large(self.max_body_bytes))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        if not self._upgrade:
            if len(self.headers) > _HEADERS:  # they came after the body
                self._fail(_head_too_large())
            self._phase, self._head = "idle", 0
            super().on_message_complete()

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        head, self._upgrade = self._upgrade, b""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._head = 0
        self.data_received(head + rest)

    def default_head(self) -> bytes:
        """Lines of the header fields that every answer has. uvicorn makes them anew each second, and so do we."""
        fields, lines = self._default_head
        if fields is not self.server_state.default_headers:
            fields = self.server_state.default_headers
            lines = b"".join([b"%s: %s\r\n" % field for field in fields])
            type(self)._default_head = (fields, lines)
        return lines

    def _too_much_head(self) -> bool:
        # Fields may also follow a body that comes in chunks, each of whose bytes may be a chunk with five more; and chunks may have extensions.
        around = self._around if self._phase == "body" else 0
        return self._head > _HEAD_BYTES or around > _HEAD_BYTES + 6 * self._body or len(self.headers) > _HEADERS

    def _fail(self, problem: ApiError) -> None:
        """Leave the parser; `data_received` answers."""
        self._problem = problem
        raise problem

    def _check(self) -> None:
        self._timer = None
        left = self._began + self.patience + self._body / _SLOWEST - self.loop.time()
        if self._phase in ("head", "body") and (left > 0 or self.flow.read_paused):
            self._timer = self.loop.call_later(max(left, 0.1), self._check)
        elif self._phase == "head" or (self._phase == "body" and not self.cycle.response_complete):
            self._refuse(ApiError(408, "the request did not arrive in time", code="request_timeout"))
        elif self._phase != "idle" or self.cycle is None:
            self.transport.close()

    def _refuse(self, problem: ApiError) -> None:
        """Answer, then read on for a while without keeping anything: a client that still sends would see a reset instead of the answer."""
        own, self._phase = self._phase == "body", "refused"
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not own or cycle.response_started or self.pipeline:
                # An answer is on its way and must not be mixed with this one.
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        body = problem.body()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(b"".join((STATUS_LINE[problem.status], self.default_head(), head, body)))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(_LINGER, self._check)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _head_too_large() -> ApiError:
    return ApiError(431, f"more than {_HEADERS} headers or {_HEAD_BYTES} bytes of them", code="headers_too_large")


def _body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
