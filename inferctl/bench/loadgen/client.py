"""An HTTP/1.1 client for many concurrent requests at a low CPU cost.

It starts no greenlet per request, sends prepared bytes, and parses responses with llhttp.

        send ─► idle or new connection ─► bytes out
        event loop: bytes in ─► parser ─► on_complete(request)

Greenlets make connections. All other work happens in callbacks of the event loop, which must not block.
"""

from __future__ import annotations

import _socket
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.socket
import gevent.ssl
from geventhttpclient._parser import HTTPResponseParser

from inferctl.bench.loadgen.recorder import CONNECTION, HTTP_ERROR, OK, TIMEOUT
from inferctl.bench.loadgen.stream import TokenStream

USAGE = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
READ = 65_536
TAIL = 200


class PendingRequest:
    """A request in flight. `error` is one of the codes of a record.

    `name` is the number of the requested model or adapter. Times are nanoseconds on CLOCK_MONOTONIC, and 0 until they
    are known. `stream` parses the response of a generation
    server.
    """

    __slots__ = (
        "content",
        "end_ns",
        "error",
        "first_ns",
        "index",
        "intended_ns",
        "name",
        "phase",
        "retried",
        "sent_ns",
        "stream",
        "user",
    )

    def __init__(self, phase: int, index: int, content: bytes, intended_ns: int = 0, user: Any = None) -> None:
        self.phase, self.index, self.content, self.intended_ns, self.user = phase, index, content, intended_ns, user
        self.name = self.sent_ns = self.first_ns = self.end_ns = 0
        self.error = OK
        self.retried = False
        self.stream: TokenStream | None = None


class Response(HTTPResponseParser):
    """Parse a response and keep its status, its headers, the size of its body and the last bytes of the body."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: TokenStream | None = None
        self.read_ns = 0
        self.begin()

    def begin(self) -> None:
        self.headers: dict[str, str] = {}
        self.size, self.tail, self.done, self._name = 0, b"", False, ""

    @property
    def status(self) -> int:
        return int(self.get_code())

    @property
    def tokens(self) -> int:
        """Tokens that the server counted, from its header or from the end of the body; 0 if it does not report them."""
        header = self.headers.get("x-inferctl-tokens") or self.headers.get("x-compute-tokens") or ""
        if header.isdigit():
            return int(header)
        return int(found[1]) if (found := USAGE.search(self.tail)) else 0

    def _on_status(self, _: str) -> None:
        pass

    def _on_message_begin(self) -> None:
        self.begin()

    def _on_header_field(self, name: str) -> None:
        self._name = name.lower()

    def _on_header_value(self, value: str) -> None:
        self.headers[self._name] = value

    def _on_headers_complete(self) -> bool:
        return False

    def _on_body(self, part: bytearray) -> None:
        self.size += len(part)
        if self.stream is not None:
            self.stream.feed(part, self.read_ns)
            return
        self.tail = bytes(part[-TAIL:]) if len(part) >= TAIL else (self.tail + bytes(part))[-TAIL:]

    def _on_message_complete(self) -> None:
        # A 1xx response is a separate message before the final one.
        self.done = self.get_code() >= 200


class PlainStream:
    """A connected TCP socket, without blocking."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def receive(self) -> bytes | None:
        """Return the received bytes: None if there are none yet, empty at the end of the stream."""
        try:
            return self.raw.recv(READ)  # type: ignore[no-any-return]
        except (BlockingIOError, InterruptedError):
            return None


class TlsStream(PlainStream):
    """The same through TLS."""

    def receive(self) -> bytes | None:
        parts = []
        # Until there is nothing more: the event loop does not see what TLS holds.
        try:
            while part := self.raw.recv(READ):
                parts.append(part)
        except ssl.SSLWantReadError:
            return b"".join(parts) or None
        except ssl.SSLError:
            pass
        return b"".join(parts)


class Connection:
    """A connection that carries one request at a time."""

    __slots__ = ("_client", "_loop", "_response", "_rest", "_stream", "_watcher", "_writer", "open", "request", "used")

    def __init__(self, client: Client, stream: PlainStream) -> None:
        self._client, self._stream = client, stream
        self._response = Response()
        self.request: PendingRequest | None = None
        self.open, self.used = True, False
        self._rest = b""
        self._loop: Any = gevent.get_hub().loop
        self._writer: Any = None
        self._watcher = self._loop.io(stream.raw.fileno(), 1)
        self._watcher.start(self._readable)

    def send(self, request: PendingRequest) -> None:
        """Send `request`. The client is notified when it is complete."""
        self.request = request
        self._response.begin()
        self._response.stream = request.stream
        self._rest = request.content
        self._write()

    def _write(self) -> None:
        try:
            self._rest = self._rest[self._stream.raw.send(self._rest) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._connection_lost()
            return
        if self._rest and not self._writer:
            self._writer = self._loop.io(self._stream.raw.fileno(), 2)
            self._writer.start(self._write)
        elif not self._rest and self._writer:
            self._writer.stop()
            self._writer.close()
            self._writer = None

    def _readable(self) -> None:
        try:
            content = self._stream.receive()
        except OSError:
            content = b""
        if content is None:
            return
        now, request, response = time.monotonic_ns(), self.request, self._response
        if request is None:  # the server closes an idle connection
            self.close()
            return
        if content and not request.first_ns:
            request.first_ns = now
        response.read_ns = now
        try:
            response.feed(content)
        except Exception:  # noqa: BLE001 - any error in a response is a failed request, not a failed load generator
            self._fail(CONNECTION, now)
            return
        if response.done:
            self.request, self.used = None, True
            # Redirects are not followed, so the request has no embeddings.
            request.end_ns, request.error = now, OK if 200 <= response.status < 300 else HTTP_ERROR
            if not content or not response.should_keep_alive():
                self.close()
            self._client.completed(self, request, response)
        elif not content:
            self._connection_lost()

    def _connection_lost(self) -> None:
        """Handle a broken connection.

        A server may close an idle connection just when a request is sent. Such a request is sent once more, on another
        connection.
        """
        request = self.request
        if request and self.used and not request.retried and not request.first_ns:
            self.request = None
            self.close()
            self._client.retry(request)
        else:
            self._fail(CONNECTION, time.monotonic_ns())

    def _fail(self, error: int, now: int) -> None:
        request, self.request = self.request, None
        self.close()
        if request:
            request.end_ns, request.error = now, error
            self._client.completed(self, request, None)

    def expire(self) -> None:
        """Give up the request in flight: it failed by timeout."""
        self._fail(TIMEOUT, time.monotonic_ns())

    def close(self) -> None:
        if self.open:
            self.open = False
            for watcher in filter(None, (self._watcher, self._writer)):
                watcher.stop()
                watcher.close()
            self._stream.raw.close()


class Client:
    """Send requests to the URLs of one server, each on an idle connection or a new one.

    `on_complete(request, response)` is called at the end of each request. Without a response, `response` is None, and
    the request's `error` has the reason. `outstanding` counts requests in flight. `reconnects` counts requests that
    were sent twice because the server had closed an idle connection. `opened` counts the connections.
    """

    def __init__(
        self,
        urls: Sequence[str],
        timeout_s: float,
        on_complete: Callable[[PendingRequest, Response | None], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        parts = urlsplit(urls[0])
        self.host, tls = parts.hostname or "", parts.scheme == "https"
        self.port = parts.port or (443 if tls else 80)
        self._tls: Any = None
        if tls:
            self._tls = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificates
            self._tls.load_default_certs()
        self.timeout_s = timeout_s
        self.outstanding = self.reconnects = self.opened = 0
        self._on_complete = on_complete
        self._idle: list[Connection] = []
        self._in_flight: dict[PendingRequest, Connection | None] = {}
        fields = {"Host": parts.netloc.rpartition("@")[2], "User-Agent": "inferctl-bench", "Accept": "*/*"}
        fields |= {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        overridden = {name.lower() for name in headers or {}}
        fields = {name: value for name, value in fields.items() if name.lower() not in overridden} | dict(headers or {})
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        targets = [urlsplit(url)._replace(scheme="", netloc="").geturl() or "/" for url in urls]
        self._heads = [f"POST {target} HTTP/1.1\r\n{lines}Content-Length: ".encode() for target in targets]
        gevent.spawn(self._expire)

    def encode(self, body: bytes, name: int = 0) -> bytes:
        """Return the whole HTTP request with this body, to the URL with this number."""
        return b"%b%d\r\n\r\n%b" % (self._heads[name], len(body), body)

    def send(self, request: PendingRequest) -> None:
        """Send `request` now, without blocking. The time to connect, if necessary, is part of the request's latency."""
        request.sent_ns = time.monotonic_ns()
        request.intended_ns = request.intended_ns or request.sent_ns
        self.outstanding += 1
        self._dispatch(request)

    def _dispatch(self, request: PendingRequest) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                self._in_flight[request] = connection
                connection.send(request)
                return
        self._in_flight[request] = None
        gevent.spawn(self._connect, request)

    def retry(self, request: PendingRequest) -> None:
        request.retried = True
        self.reconnects += 1
        self._idle = [connection for connection in self._idle if connection.open]
        self._in_flight[request] = None
        gevent.spawn(self._connect, request)

    def completed(self, connection: Connection | None, request: PendingRequest, response: Response | None) -> None:
        if self._in_flight.pop(request, self) is self:
            return  # it has expired
        self.outstanding -= 1
        if connection and connection.open:
            self._idle.append(connection)
        self._on_complete(request, response)

    def give_up(self) -> None:
        """Close the connections of the requests in flight. `on_complete` is not called for them."""
        requests, self._in_flight = self._in_flight, {}
        for connection in filter(None, requests.values()):
            connection.close()

    def _connect(self, request: PendingRequest) -> None:
        try:
            connected = gevent.socket.create_connection((self.host, self.port), self.timeout_s)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                connected = self._tls.wrap_socket(connected, server_hostname=self.host)
        except (OSError, gevent.Timeout) as error:
            request.end_ns = time.monotonic_ns()
            request.error = TIMEOUT if isinstance(error, TimeoutError) else CONNECTION
            self.completed(None, request, None)
            return
        # From here on, callbacks of the event loop use the socket, which must not block. gevent's own one is slower.
        raw = connected if self._tls else _socket.socket(fileno=connected.detach())
        raw.setblocking(False)
        self.opened += 1
        connection = Connection(self, TlsStream(raw) if self._tls else PlainStream(raw))
        if request in self._in_flight:
            self._in_flight[request] = connection
            connection.send(request)
        else:
            self._idle.append(connection)

    def _expire(self) -> None:
        """Fail the requests that exceed the timeout.

        Requests in flight are in the order of their send times, so only the oldest ones are checked.
        """
        while True:
            gevent.sleep(min(0.05, self.timeout_s / 10))
            limit = time.monotonic_ns() - int(self.timeout_s * 1e9)
            for request, connection in list(self._overdue(limit)):
                if connection:
                    connection.expire()
                else:
                    request.end_ns, request.error = time.monotonic_ns(), TIMEOUT
                    self.completed(None, request, None)

    def _overdue(self, limit_ns: int) -> Iterator[tuple[PendingRequest, Connection | None]]:
        for request, connection in self._in_flight.items():
            if request.sent_ns > limit_ns:
                return
            yield request, connection
