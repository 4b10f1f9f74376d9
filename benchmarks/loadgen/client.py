"""HTTP/1.1 for many requests at once, cheaply: no greenlet a request, prepared bytes out, the answer parsed by llhttp.

    send ─► an idle connection, or a new one ─► bytes out      event loop: bytes in ─► parser ─► answered(flight)

Connections are made in greenlets; everything else happens in callbacks of the event loop, which must not block.
"""

from __future__ import annotations

import _socket
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import gevent
from geventhttpclient._parser import HTTPResponseParser

from loadgen.recorder import CONNECTION, HTTP_ERROR, OK, TIMEOUT

USAGE = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
READ = 65_536
TAIL = 200


class Flight:
    """One request on its way. Times are nanoseconds on CLOCK_MONOTONIC, 0 until they are known; `error` is one of the record's codes."""

    __slots__ = ("again", "end_ns", "error", "first_ns", "index", "intended_ns", "phase", "request", "sent_ns", "user")

    def __init__(self, phase: int, index: int, request: bytes, intended_ns: int = 0, user: Any = None) -> None:
        self.phase, self.index, self.request, self.intended_ns, self.user = phase, index, request, intended_ns, user
        self.sent_ns = self.first_ns = self.end_ns = 0
        self.error = OK
        self.again = False


class Answer(HTTPResponseParser):
    """What is kept of an answer: status, headers, the size of its body and its last bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.headers: dict[str, str] = {}
        self.size, self.tail, self.done, self._name = 0, b"", False, ""

    @property
    def status(self) -> int:
        return int(self.get_code())

    @property
    def tokens(self) -> int:
        """Tokens that the server counted: from its header, else from the end of the body; 0 when it does not say."""
        told = self.headers.get("x-inferctl-tokens") or self.headers.get("x-compute-tokens") or ""
        if told.isdigit():
            return int(told)
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
        self.tail = bytes(part[-TAIL:]) if len(part) >= TAIL else (self.tail + bytes(part))[-TAIL:]

    def _on_message_complete(self) -> None:
        # 1xx is a message of its own, and the real one follows.
        self.done = self.get_code() >= 200


class Plain:
    """Bytes over a connected TCP socket."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def receive(self) -> bytes | None:
        """What has come; None when nothing has, empty at the end of the stream."""
        try:
            return self.raw.recv(READ)  # type: ignore[no-any-return]
        except (BlockingIOError, InterruptedError):
            return None

    def sealed(self, content: bytes) -> bytes:
        """The bytes that carry `content`."""
        return content


class Tls(Plain):
    """The same through TLS; certificates are verified."""

    _context: ssl.SSLContext | None = None

    def __init__(self, raw: Any, host: str) -> None:
        super().__init__(raw)
        Tls._context = Tls._context or ssl.create_default_context()
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = Tls._context.wrap_bio(self._in, self._out, server_hostname=host)

    def handshake(self, connected: Any) -> None:
        """Blocks this greenlet only. Raises `OSError`."""
        while True:
            try:
                self._tls.do_handshake()
                connected.sendall(self._out.read())
                return
            except ssl.SSLWantReadError:
                connected.sendall(self._out.read())
                self._fed(connected.recv(READ))

    def receive(self) -> bytes | None:
        if (content := super().receive()) is None:
            return None
        self._fed(content)
        parts = []
        try:
            while part := self._tls.read(READ):
                parts.append(part)
        except ssl.SSLWantReadError:
            return b"".join(parts) or None
        except ssl.SSLError:
            pass
        return b"".join(parts)

    def sealed(self, content: bytes) -> bytes:
        self._tls.write(content)
        return self._out.read()

    def _fed(self, content: bytes) -> None:
        if content:
            self._in.write(content)
        else:
            self._in.write_eof()


class Connection:
    """One connection, one request at a time."""

    __slots__ = ("_answer", "_client", "_loop", "_rest", "_stream", "_watcher", "_writer", "flight", "open", "used")

    def __init__(self, client: Client, stream: Plain) -> None:
        self._client, self._stream = client, stream
        self._answer = Answer()
        self.flight: Flight | None = None
        self.open, self.used = True, False
        self._rest = b""
        self._loop: Any = gevent.get_hub().loop
        self._writer: Any = None
        self._watcher = self._loop.io(stream.raw.fileno(), 1)
        self._watcher.start(self._readable)

    def send(self, flight: Flight) -> None:
        """Start `flight`; the client hears of its end."""
        self.flight = flight
        self._answer.begin()
        self._rest = self._stream.sealed(flight.request)
        self._write()

    def _write(self) -> None:
        try:
            self._rest = self._rest[self._stream.raw.send(self._rest) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._lost()
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
        now, flight, answer = time.monotonic_ns(), self.flight, self._answer
        if flight is None:  # the server closes what is idle
            self.close()
            return
        if content and not flight.first_ns:
            flight.first_ns = now
        try:
            answer.feed(content)
        except Exception:  # noqa: BLE001 - whatever is wrong with an answer, it is a failed request and not a failed load generator
            self._failed(CONNECTION, now)
            return
        if answer.done:
            self.flight, self.used = None, True
            # A redirect is not followed: whatever it leads to was not answered.
            flight.end_ns, flight.error = now, OK if 200 <= answer.status < 300 else HTTP_ERROR
            if not content or not answer.should_keep_alive():
                self.close()
            self._client.landed(self, flight, answer)
        elif not content:
            self._lost()

    def _lost(self) -> None:
        """The connection broke. A server may close an idle one just when we send: then it goes out once more, on another."""
        flight = self.flight
        if flight and self.used and not flight.again and not flight.first_ns:
            self.flight = None
            self.close()
            self._client.retry(flight)
        else:
            self._failed(CONNECTION, time.monotonic_ns())

    def _failed(self, error: int, now: int) -> None:
        flight, self.flight = self.flight, None
        self.close()
        if flight:
            flight.end_ns, flight.error = now, error
            self._client.landed(self, flight, None)

    def expire(self) -> None:
        """Give its request up."""
        self._failed(TIMEOUT, time.monotonic_ns())

    def close(self) -> None:
        if self.open:
            self.open = False
            for watcher in filter(None, (self._watcher, self._writer)):
                watcher.stop()
                watcher.close()
            self._stream.raw.close()


class Client:
    """Sends flights to one URL over as many connections as are in use at once; `landed(flight, answer)` hears of each end.

    `answer` is None when there is none: the flight's `error` then says why. `outstanding` counts flights that have not landed,
    `reconnects` those that went out twice because the server had closed an idle connection, `opened` the connections made.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        landed: Callable[[Flight, Answer | None], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        at = urlsplit(url)
        self.host, self.tls = at.hostname or "", at.scheme == "https"
        self.port = at.port or (443 if self.tls else 80)
        self.timeout_s = timeout_s
        self.outstanding = self.reconnects = self.opened = 0
        self._landed = landed
        self._idle: list[Connection] = []
        self._flying: dict[Flight, Connection | None] = {}
        path = (at.path or "/") + (f"?{at.query}" if at.query else "")
        fields = {"Host": at.netloc.rpartition("@")[2], "User-Agent": "inferctl-bench", "Accept": "*/*"}
        fields |= {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        given = {name.lower() for name in headers or {}}
        fields = {name: value for name, value in fields.items() if name.lower() not in given} | dict(headers or {})
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._head = f"POST {path} HTTP/1.1\r\n{lines}Content-Length: ".encode()
        gevent.spawn(self._expire)

    def request(self, body: bytes) -> bytes:
        """The whole HTTP request with this body."""
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    def send(self, flight: Flight) -> None:
        """Let it leave now. Never blocks: connecting, if that is needed, is part of the request's time."""
        flight.sent_ns = time.monotonic_ns()
        flight.intended_ns = flight.intended_ns or flight.sent_ns
        self.outstanding += 1
        self._dispatch(flight)

    def _dispatch(self, flight: Flight) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                self._flying[flight] = connection
                connection.send(flight)
                return
        self._flying[flight] = None
        gevent.spawn(self._connect, flight)

    def retry(self, flight: Flight) -> None:
        flight.again = True
        self.reconnects += 1
        self._idle = [connection for connection in self._idle if connection.open]
        self._flying[flight] = None
        gevent.spawn(self._connect, flight)

    def landed(self, connection: Connection | None, flight: Flight, answer: Answer | None) -> None:
        if self._flying.pop(flight, self) is self:
            return  # given up meanwhile
        self.outstanding -= 1
        if connection and connection.open:
            self._idle.append(connection)
        self._landed(flight, answer)

    def _connect(self, flight: Flight) -> None:
        try:
            connected = socket.create_connection((self.host, self.port), self.timeout_s)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Plain(connected)
            if self.tls:
                stream = Tls(connected, self.host)
                stream.handshake(connected)
        except (OSError, gevent.Timeout) as error:
            flight.end_ns = time.monotonic_ns()
            flight.error = TIMEOUT if isinstance(error, TimeoutError) else CONNECTION
            self.landed(None, flight, None)
            return
        # From here on the event loop calls us, and the cooperative socket would only be in the way.
        stream.raw = _socket.socket(fileno=connected.detach())
        stream.raw.setblocking(False)
        self.opened += 1
        connection = Connection(self, stream)
        if flight in self._flying:
            self._flying[flight] = connection
            connection.send(flight)
        else:
            self._idle.append(connection)

    def _expire(self) -> None:
        """Give up what has taken too long. Flights are in the order in which they left, so only the oldest ones are looked at."""
        while True:
            gevent.sleep(min(0.05, self.timeout_s / 10))
            limit = time.monotonic_ns() - int(self.timeout_s * 1e9)
            for flight, connection in list(self._late(limit)):
                if connection:
                    connection.expire()
                else:
                    flight.end_ns, flight.error = time.monotonic_ns(), TIMEOUT
                    self.landed(None, flight, None)

    def _late(self, limit_ns: int) -> Iterator[tuple[Flight, Connection | None]]:
        for flight, connection in self._flying.items():
            if flight.sent_ns > limit_ns:
                return
            yield flight, connection
