"""uvicorn's connection with limits on time, size and number. Its errors use OpenAI's envelope.

uvicorn waits forever for the rest of a request and for a client that does not read, has no limit on headers, queues
pipelined requests, does not respond to a request that asks for an upgrade, and resets a client that still sends.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from inferctl.serve.edge.errors import ApiError, at_capacity
from inferctl.serve.edge.request_context import ConnectionNotes

# With less to read, a connection does not check the limit of all. `HttpServer` checks it every `interval_s` anyway.
_FEW_BYTES = 64 * 1024


class Connection(HttpToolsProtocol):
    """One client's connection. It accepts a request only after the response to the previous one is complete.

    `on_rejected(status, code)` is called for a rejected request that the application did not get. If the application
    has the request, it sees a disconnect, and the `rejection` of its `ConnectionNotes`.
    """

    max_connections = 8192  # above it, a new one gets a 429 and is closed, also one of a probe
    max_headers = 200
    max_header_bytes = 64 * 1024  # with trailers and what is around the chunks of a body
    max_unread_bytes = 256 * 1024 * 1024  # responses that clients have not read, of all connections
    transfer_s = 30.0  # to receive a request, and 1 s more per `bytes_per_s` bytes
    bytes_per_s = 16 * 1024  # a client that reads a response may be behind this by `transfer_s`
    idle_s = 75.0  # between requests; longer than common load balancers keep an idle connection
    linger_s = 2.0  # to drop what a client still sends after its response
    interval_s = 1.0  # between two checks of the deadlines

    def __init__(self, on_rejected: Callable[[int, str], None], readers: set[Connection], **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._on_rejected = on_rejected
        self._readers = readers  # the connections of a server with large unread responses
        self._socket: asyncio.Transport
        self._deadline = math.inf  # only the events of a request set it, so other bytes cannot extend it
        self._receiving = False  # a request has begun and is not complete
        self._dropping = False  # drop what arrives, and close after the response
        self._keep_alive = True
        self._upgrade = b""
        self._unsent = b""  # a part of a response that is sent with the next one, or in the next turn of the event loop
        self._received = self._body = 0  # bytes of the request, and of its body
        self._fields = 0  # headers and trailers of the request
        self._headers_complete = False
        self._written = self._read = 0  # bytes of responses; those that were read at the last look
        self._read_deadline = math.inf  # until which the client must read more

    def connection_made(self, transport: Any) -> None:
        """Start the deadline of the first request. Reject the connection if there are too many."""
        super().connection_made(transport)
        self._socket, self.transport = transport, self  # type: ignore[assignment]  # uvicorn writes to and closes it
        self._deadline = self.loop.time() + self.transfer_s
        if len(self.connections) > self.max_connections:
            self._reject(at_capacity(f"{self.max_connections} connections are open", "too_many_connections", 1))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection. Called by the transport."""
        self._readers.discard(self)
        super().connection_lost(exc)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disconnect()

    def data_received(self, data: bytes) -> None:
        """Parse what arrives, and reject a request that is invalid or has too many or too large headers."""
        if self._dropping:
            return
        self._received += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser stops after the headers. Parse the request again without the one that asks for the upgrade.
            self.parser, self._received = httptools.HttpRequestParser(self), 0
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.data_received(self._upgrade + data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            cause = error.__context__
            if not self._dropping:
                invalid = ApiError(400, "the request is not valid HTTP", code="invalid_http")
                self._reject(cause if isinstance(cause, ApiError) else invalid)
        else:
            # Headers, trailers, and what is around the chunks of a body. Each chunk costs as much as a call, so a body
            # cannot have many small ones.
            too_large = self._received - self._body > self.max_header_bytes + self._body / 8
            if too_large or self._fields > self.max_headers:
                self._reject(self._headers_too_large())

    def on_message_begin(self) -> None:
        """Start the deadline of a request. Called by httptools."""
        if self.cycle is not None and not (self.cycle.response_complete and self.unread_bytes() == 0):
            self._dropping, self.cycle.keep_alive = True, False
            if self.cycle.response_complete:
                self.close()
            raise RuntimeError("a pipelined request")
        super().on_message_begin()
        self._fields, self._headers_complete = 0, False
        self._receiving, self._deadline = True, self.loop.time() + self.transfer_s

    def on_url(self, url: bytes) -> None:
        """Reject a URL that is too long, before its parser finds it invalid. Called by httptools."""
        super().on_url(url)
        if len(self.url) >= self.max_header_bytes:
            raise self._headers_too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header, and drop a trailer. Called by httptools.

        uvicorn would append it to the headers. A proxy that removes `x-inferctl-key-id` from those passes trailers on,
        and no part of a body may change who sent it, its priority or its length.
        """
        self._fields += 1
        if not self._headers_complete:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Pass the request to the application. Called by httptools."""
        self._headers_complete = True
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise ApiError(405, "method CONNECT is not supported", code="method_not_allowed")
        if self.parser.should_upgrade():
            lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
            lines += [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
            self._upgrade = b"\r\n".join([*lines, b"\r\n"])
        else:
            super().on_headers_complete()
            # A response to an incomplete request closes the connection.
            self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        """Extend the deadline. Called by httptools."""
        self._body += len(body)
        self._deadline += len(body) / self.bytes_per_s
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the deadline of a request. Called by httptools."""
        if not self.parser.should_upgrade():
            self._receiving, self._deadline = False, math.inf
            self.cycle.keep_alive = self._keep_alive and not self.cycle.response_started
            super().on_message_complete()
            self.flow.resume_reading()  # a large body paused it, and only reading detects that the client disconnects

    def on_response_complete(self) -> None:
        """Start the deadline of the next request. Called by uvicorn."""
        if not self._dropping:
            self._received = self._body = 0
            self._deadline = self.loop.time() + self.idle_s
            self.flow.resume_reading()

    def shutdown(self) -> None:
        """Close the connection after the response. Called by uvicorn."""
        self._keep_alive, self.transfer_s = False, self.linger_s
        super().shutdown()

    def write(self, data: bytes) -> None:
        """Write a part of a response. Called by uvicorn, which writes head and body of a short response separately.

        They are sent together: a packet costs the server and the client more than the rest of the HTTP protocol.
        """
        self._written += len(data)
        if self._unsent:
            parts, self._unsent = (self._unsent, data), b""
            self._socket.writelines(parts)
        else:
            self._unsent = data
            self.loop.call_soon(self._send)
        if self.unread_bytes() > _FEW_BYTES:
            self._readers.add(self)
            self.limit_unread_bytes(self._readers, self.loop.time())

    def _send(self) -> None:
        if self._unsent and not self._socket.is_closing():
            self._socket.write(self._unsent)
        self._unsent = b""

    def is_closing(self) -> bool:
        """Return whether nothing can be written. Called by uvicorn."""
        return self._dropping or self._socket.is_closing()

    def close(self) -> None:
        """Close the connection after the written response. Called by uvicorn.

        A client that still sends would see a reset instead of the response, so drop for `linger_s` what it sends.
        """
        self._send()
        if not (self._receiving or self._dropping):
            self._socket.close()
        elif not self._socket.is_closing():
            self._receiving, self._dropping = False, True
            self._deadline = self.loop.time() + self.linger_s
            self._socket.write_eof()
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        """Let the response go on, so that a client that does not read holds no request. Called by the transport.

        A file is read only as fast as its client reads it.
        """
        if self.cycle is not None and ConnectionNotes.of(self.cycle.scope).paced:
            super().pause_writing()

    @classmethod
    def limit_unread_bytes(cls, connections: set[Any], now: float) -> None:
        """Reset the clients that read most slowly, if the unread responses of all are larger than the limit."""
        excess = sum(each.unread_bytes() for each in connections) - cls.max_unread_bytes
        if excess > 0:
            for each in sorted(connections, key=lambda each: each.update_read_deadline(now)):
                excess -= each.unread_bytes()
                each.abort()
                if excess <= 0:
                    return

    def unread_bytes(self) -> int:
        """Return how many bytes of responses wait until the client reads."""
        return self._socket.get_write_buffer_size() + len(self._unsent)

    def update_read_deadline(self, now: float) -> float:
        """Extend the deadline by what the client read since the last call, up to `transfer_s` from now, and return it.

        Until then, the client must read more. It is infinite if nothing is unread.
        """
        unread = self.unread_bytes()
        read, self._read = self._written - unread - self._read, self._written - unread
        if not unread:
            self._read_deadline = math.inf
            self._readers.discard(self)
        else:
            self._read_deadline = min(now + self.transfer_s, self._read_deadline + read / self.bytes_per_s)
        return self._read_deadline

    def check(self, now: float) -> None:
        """Apply the deadlines."""
        if now > self.update_read_deadline(now):
            self.abort()
        elif max(self._read_deadline, self._deadline) < math.inf and not (self._receiving or self._dropping):
            self._deadline = now + self.idle_s  # the client is idle once it has read the response
        elif now > self._deadline and self._receiving:
            self._reject(ApiError(408, "the request did not arrive in time", code="request_timeout"))
        elif now > self._deadline:
            self._socket.close()

    def abort(self) -> None:
        """Reset the connection. Otherwise, the kernel would still wait for the client to read."""
        self.connections.discard(self)
        self._readers.discard(self)
        reset = struct.pack("ii", 1, 0)
        self._socket.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        self._socket.abort()

    def _disconnect(self) -> None:
        """Tell the application that has the request that its client gets no response."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        notes = ConnectionNotes.of(self.cycle.scope)
        notes.disconnected = True
        if notes.on_disconnect is not None:
            notes.on_disconnect()

    def _headers_too_large(self) -> ApiError:
        limits = f"{self.max_headers} headers or {self.max_header_bytes} bytes of headers"
        return ApiError(431, f"the request has more than {limits}", code="headers_too_large")

    def _reject(self, error: ApiError) -> None:
        cycle = self.cycle
        new = cycle is None or cycle.response_complete
        if new:
            self._on_rejected(error.status, error.code or "")
        else:
            ConnectionNotes.of(cycle.scope).rejection = error.status, error.code
            self._disconnect()
        if new or not cycle.response_started:
            body = error.body()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            fields = [(name.encode(), value.encode()) for name, value in (headers | error.headers).items()]
            lines = [b"%s: %s\r\n" % field for field in [*self.server_state.default_headers, *fields]]
            self.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self._dropping = True
        self.close()
