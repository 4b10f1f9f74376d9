"""uvicorn's connection with limits on the size and the receive time of a request. Its errors use OpenAI's envelope.

uvicorn has no limit on the receive time and on the size of headers. It never finishes a request that asks for an
upgrade. It closes the connection of a client that still sends, which then sees a reset instead of the 413.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from inferctl.serve.edge.errors import ApiError

# Above this many connections a new one gets a 429 and is closed, also for probes. The limit on requests in flight is
# far lower.
_MAX_CONNECTIONS = 8192
_TOO_MANY_CONNECTIONS = (
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 115\r\n\r\n"
    b'{"error":{"message":"too many connections","type":"rate_limit_error",'
    b'"param":null,"code":"too_many_connections"}}\r\n'
)
_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEADERS = 200
# The time limit for receiving a request (s). It grows by one second per this many received bytes of the body.
_RECEIVE_TIMEOUT_S = 30.0
_MIN_BYTES_PER_S = 16 * 1024
# How long a rejected client can continue to send before the connection is closed (s).
_LINGER_S = 2.0
# Hop-by-hop header fields of an upgrade. Without them the request is an ordinary one.
_UPGRADE_HEADERS = frozenset({b"connection", b"upgrade", b"http2-settings"})


def connection(max_body_bytes: int, timeout_s: float = _RECEIVE_TIMEOUT_S) -> type[Connection]:
    """Return the class for uvicorn's `http` setting."""
    return type("BoundedConnection", (Connection,), {"max_body_bytes": max_body_bytes, "timeout_s": timeout_s})


class Connection(HttpToolsProtocol):
    """One client's connection."""

    max_body_bytes = 32 * 1024 * 1024
    timeout_s = _RECEIVE_TIMEOUT_S
    _default_head: tuple[list[tuple[bytes, bytes]], bytes] = ([], b"")  # shared by all connections

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._phase: Literal["idle", "head", "body", "rejected"] = "idle"
        # Bytes of the current request: `_head` of its headers, of the framing of its last chunk, or of its trailers;
        # `_body` of its body; `_framing` around all its chunks.
        self._head = self._body = self._framing = 0
        self._started = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._error: ApiError | None = None
        self._upgrade = b""

    def connection_made(self, transport: Any) -> None:
        """Reject the connection if there are too many, else start the receive timeout."""
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.write(_TOO_MANY_CONNECTIONS)
            transport.close()
            return
        self._timer = self.loop.call_later(self.timeout_s, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and reject the request if it is invalid or its headers are too large."""
        if self._phase == "rejected":
            return
        self._unset_keepalive_if_required()
        self._head += len(data)
        self._framing += len(data)
        self._error = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._continue_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._reject(self._error or ApiError(400, "the request is not valid HTTP", code="invalid_http"))
            return
        if self._phase != "idle" and self._head_exceeds_limit():
            self._reject(_headers_too_large())
        elif self._phase == "idle":
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.timeout_s, self._check)

    def on_message_begin(self) -> None:
        """Start to count a request. Called by httptools."""
        super().on_message_begin()
        self._phase, self._started, self._body = "head", self.loop.time(), 0

    def on_headers_complete(self) -> None:
        """Check the headers, and remove those of an upgrade. Called by httptools."""
        if len(self.headers) > _MAX_HEADERS or len(self.url) > _MAX_HEAD_BYTES:
            self._fail(_headers_too_large())
        if self.parser.get_method() == b"CONNECT":
            self._fail(ApiError(405, "method CONNECT is not supported", code="method_not_allowed"))
        if self.parser.should_upgrade():
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)]
            lines += [b"%s: %s\r\n" % field for field in self.headers if field[0] not in _UPGRADE_HEADERS]
            self._upgrade = b"".join([*lines, b"\r\n"])
            return
        size = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if int(size) > self.max_body_bytes:
            self._fail(_body_too_large(self.max_body_bytes))
        super().on_headers_complete()
        self._phase, self._head, self._framing = "body", 0, 0

    def on_chunk_header(self) -> None:
        """Start to count a chunk header, or the trailers after the last chunk. Called by httptools."""
        self._head = 0

    def on_body(self, body: bytes) -> None:
        """Count and check the bytes of the body. Called by httptools."""
        self._body += len(body)
        self._head -= len(body)
        self._framing -= len(body)
        if self._body > self.max_body_bytes:
            self._fail(_body_too_large(self.max_body_bytes))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Finish a request. Called by httptools."""
        if not self._upgrade:
            if len(self.headers) > _MAX_HEADERS:  # trailers are added to the headers
                self._fail(_headers_too_large())
            self._phase, self._head = "idle", 0
            super().on_message_complete()

    def _continue_without_upgrade(self, rest: bytes) -> None:
        """Parse the request again without the headers of the upgrade."""
        head, self._upgrade = self._upgrade, b""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._head = 0
        self.data_received(head + rest)

    def default_head(self) -> bytes:
        """Return the header lines that every response has. uvicorn renews them each second, so the cache follows."""
        fields, lines = self._default_head
        if fields is not self.server_state.default_headers:
            fields = self.server_state.default_headers
            lines = b"".join([b"%s: %s\r\n" % field for field in fields])
            type(self)._default_head = (fields, lines)
        return lines

    def _head_exceeds_limit(self) -> bool:
        # Trailers can follow a chunked body. Each byte of such a body can be a chunk with five bytes of framing, and
        # chunks can have extensions.
        framing = self._framing if self._phase == "body" else 0
        too_large = self._head > _MAX_HEAD_BYTES or framing > _MAX_HEAD_BYTES + 6 * self._body
        return too_large or len(self.headers) > _MAX_HEADERS

    def _fail(self, error: ApiError) -> None:
        """Leave the parser with an error. `data_received` responds with it."""
        self._error = error
        raise error

    def _check(self) -> None:
        """Reject the request if it did not arrive in time, and close an idle or rejected connection."""
        self._timer = None
        remaining = self._started + self.timeout_s + self._body / _MIN_BYTES_PER_S - self.loop.time()
        if self._phase in ("head", "body") and (remaining > 0 or self.flow.read_paused):
            self._timer = self.loop.call_later(max(remaining, 0.1), self._check)
        elif self._phase == "head" or (self._phase == "body" and not self.cycle.response_complete):
            self._reject(ApiError(408, "the request did not arrive in time", code="request_timeout"))
        elif self._phase != "idle" or self.cycle is None:
            self.transport.close()

    def _reject(self, error: ApiError) -> None:
        """Send an error, then read and drop what still arrives for `_LINGER_S`.

        A client that still sends would otherwise see a reset instead of the error.
        """
        in_body, self._phase = self._phase == "body", "rejected"
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not in_body or cycle.response_started or self.pipeline:
                # Another response is in progress. This one must not be mixed into it.
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        body = error.body()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(b"".join((STATUS_LINE[error.status], self.default_head(), head, body)))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(_LINGER_S, self._check)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _headers_too_large() -> ApiError:
    message = f"the request has more than {_MAX_HEADERS} headers or {_MAX_HEAD_BYTES} bytes of headers"
    return ApiError(431, message, code="headers_too_large")


def _body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the limit of {limit} bytes", code="body_too_large")
