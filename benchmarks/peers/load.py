"""A load generator with a low CPU cost, for comparisons with other servers.

It sends prepared bytes, reads status and length of the response, and has one asyncio protocol per connection. It shares
the machine with the server. `recorder.py` has an open loop.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Outcome:
    """The result of a load: seconds of each response, responses by status, and seconds measured.

    `completed`: responses with the warm-up and the end, of a closed loop.
    """

    seconds: float = 0.0
    completed: int = 0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Responses with status 200 per second."""
        return self.statuses.get(200, 0) / self.seconds

    def quantile(self, q: float) -> float:
        """Return the q-quantile of the latencies, in ms."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def failures(self) -> int:
        return sum(count for status, count in self.statuses.items() if status != 200)


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time. `on_response(status)` is called for each complete response.

    Status 0: the connection broke. `head`: that of the last response, in lower case.
    """

    def __init__(self) -> None:
        self.on_response: Callable[[int], None] = lambda _: None
        self.head = b""
        self._buffer = bytearray()
        self._missing = -1
        self._chunked = self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._busy:
            self.on_response(0)

    def send(self, request: bytes) -> None:
        self._busy, self.head = True, b""
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._missing < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self.head = head = bytes(self._buffer[:end]).lower()
            self._status = int(head[9:12])
            at = head.find(b"content-length:")
            stop = head.find(b"\r\n", at)
            self._chunked = at < 0
            self._missing = end + 4 + (0 if self._chunked else int(head[at + 15 : stop if stop > 0 else end]))
        if len(self._buffer) >= self._missing and not (self._chunked and self._buffer[-7:] != b"\r\n0\r\n\r\n"):
            self._buffer.clear()
            self._missing = -1
            self._busy = False
            self.on_response(self._status)


def requests(url: str, path: str, bodies: Sequence[Any], headers: Mapping[str, str] | None = None) -> list[bytes]:
    """Return complete HTTP requests as bytes."""
    host = urlsplit(url).netloc
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\n{more}content-type: application/json\r\ncontent-length: "
    raw = [json.dumps(body).encode() for body in bodies]
    return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in raw]


def run_closed(url: str, ready: Sequence[bytes], clients: int, seconds: float, warm: float = 2.0) -> Outcome:
    """Run a closed loop: each client sends its next request after a response. The first `warm` seconds do not count."""
    return _run(_closed(url, ready, clients, seconds, warm))


async def _closed(url: str, ready: Sequence[bytes], clients: int, seconds: float, warm: float) -> Outcome:
    outcome, begin = Outcome(seconds), time.perf_counter() + warm
    end, at = begin + seconds, 0
    finished = [asyncio.get_running_loop().create_future() for _ in range(clients)]

    def drive(connection: Connection, done: asyncio.Future[None]) -> None:
        sent = 0.0

        def go() -> None:
            nonlocal sent, at
            at += 1
            sent = time.perf_counter()
            connection.send(ready[at % len(ready)])

        def on_response(status: int) -> None:
            now = time.perf_counter()
            outcome.completed += 1
            if begin <= now < end:
                outcome.latencies.append(now - sent)
                outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
            if now < end and status:
                go()
            elif not done.done():
                done.set_result(None)

        connection.on_response = on_response
        go()

    connections = [await _connect(url) for _ in range(clients)]
    for connection, done in zip(connections, finished, strict=True):
        drive(connection, done)
    await asyncio.wait(finished, timeout=warm + seconds + 30)
    for connection in connections:
        connection.on_response = lambda _: None
        connection.transport.close()
    return outcome


async def _connect(url: str) -> Connection:
    at = urlsplit(url)
    _, connection = await asyncio.get_running_loop().create_connection(Connection, at.hostname, at.port)
    return connection


def _run(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)
