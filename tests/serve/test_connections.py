"""Slow, silent, invalid, pipelining and not reading clients of `HttpServer` with a small application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import uvloop

from inferctl.serve.edge.connection import Connection
from inferctl.serve.edge.edge import ClientDisconnectedError, unless_disconnected
from inferctl.serve.edge.listener import HttpServer, listen
from inferctl.serve.edge.request_context import ConnectionNotes
from tests.processes import until

HEAD = b"POST /a HTTP/1.1\r\nhost: a\r\n"
OK = HEAD + b"content-length: 3\r\n\r\nabc"
SLOW = OK.replace(b"/a", b"/slow")
CLOSING = OK.replace(b"host", b"connection: close\r\nhost")
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
LARGE_BYTES = 20_000_000
LARGE = OK.replace(b"/a", b"/large")
MIB = 1 << 20


class QuickConnection(Connection):
    """Times of a test instead of those of users."""

    transfer_s, idle_s, linger_s, interval_s = 0.6, 0.6, 0.3, 0.05
    max_unread_bytes = 64 * MIB


class SmallConnection(QuickConnection):
    max_connections = 4


class PatientConnection(Connection):
    linger_s, interval_s = 0.3, 0.05


class App:
    """Responds with the path and the number of received bytes, and records what happened."""

    def __init__(self) -> None:
        self.disconnected: list[str] = []
        self.rejected: list[tuple[int, str]] = []
        self.large = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path, size, more = scope["path"], 0, scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.rejected += filter(None, [ConnectionNotes.of(scope).rejection])
                self.disconnected.append(path)
                return
            size, more = size + len(message["body"]), message["more_body"]
        if path == "/slow":
            await asyncio.sleep(0.3)
        if path == "/wait":
            await receive()
            self.disconnected.append(path)
            return
        if path == "/work":
            try:
                await unless_disconnected(asyncio.get_running_loop().create_future, scope)
            except ClientDisconnectedError:
                self.rejected += filter(None, [ConnectionNotes.of(scope).rejection])
                self.disconnected.append(path)
                return
        parts = 0
        if path == "/events":
            events = {"disconnected": self.disconnected, "rejected": self.rejected, "large": self.large}
            body = json.dumps(events).encode()
        elif path == "/large":
            body, parts = b"a" * LARGE_BYTES, 4
        else:
            answer = {"path": path, "bytes": size, "http": scope["http_version"]}
            answer["headers"] = [name.decode() for name, _ in scope["headers"]]
            body = json.dumps(answer).encode()
        status = 413 if path == "/early" else 200
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]}
        )
        for _ in range(parts):
            await send({"type": "http.response.body", "body": body[: LARGE_BYTES // 5], "more_body": True})
            body = body[LARGE_BYTES // 5 :]
        await send({"type": "http.response.body", "body": body})
        self.large += path == "/large"


def run(listener: socket.socket, connection: type[Connection], drain_seconds: float, close: Any) -> None:
    """Serve in this process until `close` is set."""
    app = App()
    server = HttpServer(app, drain_seconds, lambda status, code: app.rejected.append((status, code)), connection)
    threading.Thread(target=lambda: (close.wait(), server.close()), daemon=True).start()
    listener.setblocking(False)
    uvloop.run(server.serve([listener]))


@dataclass
class Served:
    """A server process."""

    port: int
    process: BaseProcess
    close: Any

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(sent)
        return connection

    def talk(self, *pieces: bytes, pause: float = 0.05) -> bytes:
        """Return all bytes until the server closes the connection. Raises an error if it does not."""
        with self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            return read_all(connection)

    def events(self) -> Any:
        return json.loads(self.talk(CLOSING.replace(b"/a", b"/events")).partition(b"\r\n\r\n")[2])

    def responds(self) -> bool:
        return b'"bytes": 3' in self.talk(CLOSING, pause=0)

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


def read_response(connection: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(1 << 16)
        assert part, f"the server closed the connection after {answer!r}"
        answer += part
    return answer


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server closed the connection, without reading from it."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


@contextlib.contextmanager
def serving(connection: type[Connection], drain_seconds: float = 20) -> Iterator[Served]:
    context = multiprocessing.get_context("spawn")
    close = context.Event()
    with listen("127.0.0.1", 0) as listener:
        listener.listen(512)
        process = context.Process(target=run, args=(listener, connection, drain_seconds, close), daemon=True)
        process.start()
        served = Served(listener.getsockname()[1], process, close)
        until(served.responds)
        yield served
    close.set()
    process.join(30)
    process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(QuickConnection) as served:
        yield served
        # After all tests, the server still responds.
        assert served.responds()


def rejection(answer: bytes) -> tuple[int, str]:
    """Return status and code. Fails unless there is exactly one response, in the envelope."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"connection: close" in head
    return int(head.split(b" ")[1]), error["code"]


CASES: dict[str, tuple[tuple[bytes, ...], int, str]] = {
    "no HTTP": ((b"garbage\r\n\r\n",), 400, "invalid_http"),
    "TLS": ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",), 400, "invalid_http"),
    "HTTP/2": ((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), 400, "invalid_http"),
    "unknown method": ((b"BREW /a HTTP/1.1\r\nhost: a\r\n\r\n",), 400, "invalid_http"),
    "bad length": ((HEAD + b"content-length: x\r\n\r\n",), 400, "invalid_http"),
    "two lengths": ((HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",), 400, "invalid_http"),
    "length and chunks": ((HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",), 400, "invalid_http"),
    "bad chunk": ((CHUNKED + b"zz\r\nabc",), 400, "invalid_http"),
    "raw bytes in the path": ((b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",), 400, "invalid_http"),
    "many headers": ((HEAD + b"".join(b"x-%d: y\r\n" % i for i in range(5000)) + b"\r\n",), 431, "headers_too_large"),
    "many headers, slowly": ((HEAD, *[b"x: y\r\n" * 60] * 5), 431, "headers_too_large"),
    "many trailers": ((CHUNKED + b"1\r\na\r\n0\r\n", *[b"x: y\r\n" * 60] * 5), 431, "headers_too_large"),
    "many trailers at once": (
        (CHUNKED + b"1\r\na\r\n0\r\n" + b"x: y\r\n" * 300 + b"\r\n",),
        431,
        "headers_too_large",
    ),
    "long extensions of chunks": (
        (CHUNKED + (b"1;e=" + b"x" * 60_000 + b"\r\na\r\n") * 50,),
        431,
        "headers_too_large",
    ),
    "many small chunks": ((CHUNKED + b"1\r\na\r\n" * 50_000,), 431, "headers_too_large"),
    "long trailer": ((CHUNKED + b"1\r\na\r\n0\r\nx: " + b"y" * 5_000_000,), 431, "headers_too_large"),
    "long header": ((HEAD + b"x: ", *[b"y" * 40_000] * 3), 431, "headers_too_large"),
    "long header at once": ((HEAD + b"x: " + b"y" * 5_000_000,), 431, "headers_too_large"),
    "a very long path at once": (
        (b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",),
        431,
        "headers_too_large",
    ),
    "long path": ((b"GET /", *[b"y" * 30_000] * 3), 431, "headers_too_large"),
    "empty lines": ((b"\r\n" * 40_000,), 431, "headers_too_large"),
    "half a head": ((b"POST /a HT",), 408, "request_timeout"),
    "a head, slowly": ((HEAD, *[b"x: y\r\n"] * 15), 408, "request_timeout"),
    "half a body": ((HEAD + b"content-length: 10\r\n\r\nabc",), 408, "request_timeout"),
    "half a chunk": ((CHUNKED + b"5\r\nab",), 408, "request_timeout"),
    "a body, slowly": ((HEAD + b"content-length: 100\r\n\r\n", *[b"a"] * 15), 408, "request_timeout"),
    "half a body after 100": ((HEAD + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n",), 408, "request_timeout"),
    "proxying": ((b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",), 405, "method_not_allowed"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_invalid_request_gets_an_error_in_the_envelope_is_counted_once_and_closed(server: Served, name: str) -> None:
    pieces, status, code = CASES[name]
    before = server.events()["rejected"]
    answer = server.talk(*pieces)
    assert rejection(answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")) == (status, code)
    assert server.events()["rejected"] == [*before, [status, code]]


NAMES = [b"x-inferctl-key-id", b"X-INFERCTL-KEY-ID", b"authorization", b"x-api-key", b"x-priority", b"host", b"expect"]
NAMES += [b"x-request-id", b"cache-control", b"traceparent", b"x-forwarded-for", b"content-type"]
TRAILERS = b"".join(name + b": 100-continue\r\n" for name in NAMES)


@pytest.mark.parametrize("pause", [0, 0.05], ids=["at once", "later"])
@pytest.mark.parametrize("more", [b"", b"connection: upgrade\r\nupgrade: h2c\r\n"], ids=["plain", "upgrade"])
def test_a_trailer_is_no_header(server: Served, more: bytes, pause: float) -> None:
    with server.connect(CHUNKED.replace(b"host", more + b"host") + b"3\r\nabc\r\n") as connection:
        time.sleep(pause)
        connection.sendall(b"0\r\n" + TRAILERS + b"\r\n")
        answer = read_response(connection)
        assert answer.count(b"HTTP/1.1") == 1
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert (found["bytes"], sorted(found["headers"])) == (
            3,
            ["connection"] * bool(more) + ["host", "transfer-encoding"],
        )
        # The next request has headers again.
        connection.sendall(CLOSING.replace(b"host", b"x-more: 1\r\nhost"))
        assert b'"x-more"' in read_all(connection)


@pytest.mark.parametrize("name", [b"content-length", b"transfer-encoding"])
def test_a_trailer_does_not_change_the_length(server: Served, name: bytes) -> None:
    for value in (b"2", b"x", b"chunked"):
        answer = server.talk(CHUNKED + b"3\r\nabc\r\n0\r\n" + name + b": " + value + b"\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1
        assert answer.startswith(b"HTTP/1.1 400") or b'"bytes": 3' in answer


@pytest.mark.parametrize("ending", [b"", b"\r\n", b"\r\n\r\n"])
@pytest.mark.parametrize("first", [b"", OK], ids=["new", "kept"])
def test_a_connection_without_a_request_is_closed(server: Served, first: bytes, ending: bytes) -> None:
    answer = server.talk(first, *[ending] * 5)
    assert answer.count(b"HTTP/1.1") == answer.count(b"200 OK") == bool(first)


def test_a_client_that_still_sends_gets_an_early_response_and_is_closed(server: Served) -> None:
    size = 8 * MIB
    head = b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size
    answer = server.talk(head, b"a" * size)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("size", [15, 10_000], ids=["complete", "incomplete"])
def test_a_body_that_goes_on_after_an_early_response_does_not_keep_the_connection(server: Served, size: int) -> None:
    head = b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size
    assert server.talk(head, *[b"abc"] * 5).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("pause", [0, 0.1])
def test_a_pipelining_client_gets_the_first_response_and_is_closed(server: Served, pause: float) -> None:
    answer = server.talk(SLOW, OK * 3, pause=pause) if pause else server.talk(SLOW + OK * 3)
    assert answer.count(b"HTTP/1.1") == 1
    assert b'{"path": "/slow", "bytes": 3' in answer
    assert b"connection: close" in answer


@pytest.mark.parametrize("bad", [b"garbage\r\n\r\n", HEAD + b"content-length: x\r\n\r\n"])
def test_an_invalid_pipelined_request_does_not_affect_the_first_response(server: Served, bad: bytes) -> None:
    answer = server.talk(SLOW + bad)
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("pipelined", [OK, SLOW, LARGE], ids=["fast", "slow", "large"])
def test_pipelining_without_reading_costs_no_memory_and_no_other_client(server: Served, pipelined: bytes) -> None:
    before, peak = server.memory(), 0
    with server.connect() as attacker:
        attacker.settimeout(0.5)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 64 * MIB:
                sent += attacker.send(pipelined * 10_000)
                peak = max(peak, server.memory())
                assert server.responds()
        until(lambda: is_closed(attacker), 20)
    assert peak - before < LARGE_BYTES + 32 * MIB


def test_clients_that_do_not_read_are_closed_and_cost_a_limited_amount_of_memory(server: Served) -> None:
    memory = [server.memory()]

    def all_closed() -> bool:
        kept.sendall(OK)
        assert b'"bytes": 3' in read_response(kept)
        memory.append(server.memory())
        return all(map(is_closed, attackers))

    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(server.connect())
        attackers = [stack.enter_context(server.connect(LARGE)) for _ in range(50)]
        until(all_closed, 20)
    # All responses are 1 GB.
    assert max(memory) - memory[0] < QuickConnection.max_unread_bytes + 6 * LARGE_BYTES
    until(lambda: server.memory() - memory[0] < 2 * LARGE_BYTES, 20)


def test_a_client_that_stops_reading_is_closed_however_much_it_has_read(server: Served) -> None:
    with server.connect(LARGE) as connection:
        size = 0
        while size < LARGE_BYTES // 2:
            size += len(connection.recv(1 << 16))
        until(lambda: is_closed(connection), 10)


def test_the_idle_time_begins_when_the_response_is_read(server: Served) -> None:
    with server.connect(LARGE) as connection:
        size, started = 0, time.monotonic()
        while size < LARGE_BYTES:
            size += len(connection.recv(1 << 18))
            time.sleep(0.02)
        assert time.monotonic() - started > 2 * QuickConnection.idle_s
        connection.sendall(OK)
        assert b'"bytes": 3' in read_response(connection)


def test_a_client_that_ends_its_side_gets_the_response_that_is_written(server: Served) -> None:
    with server.connect(HEAD + b"content-length: x\r\n\r\n") as connection:
        connection.shutdown(socket.SHUT_WR)
        assert rejection(read_all(connection)) == (400, "invalid_http")


@pytest.mark.parametrize("kind", ["half", "wait", "work", "large"])
@pytest.mark.parametrize("ends", ["close", "reset", "half"])
def test_the_application_learns_that_a_client_disconnected(server: Served, kind: str, ends: str) -> None:
    sent = HEAD + b"content-length: 10\r\n\r\nabc"
    if kind == "large":  # reading was paused
        sent = HEAD.replace(b"/a", b"/work") + b"content-length: 4000000\r\n\r\n" + b"a" * 4_000_000
    elif kind != "half":
        sent = OK.replace(b"/a", b"/" + kind.encode())
    before = len(server.events()["disconnected"])
    with server.connect(sent) as connection:
        time.sleep(0.05)
        if ends == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif ends == "half":  # the same packet as of a client that left
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b""
    until(lambda: len(server.events()["disconnected"]) == before + 1, 20)


@pytest.mark.parametrize("token", [b"h2c", b"websocket"])
@pytest.mark.parametrize("cut", [0, 20, 110, 175])
def test_a_request_with_an_upgrade_is_processed_without_it(server: Served, token: bytes, cut: int) -> None:
    fields = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: " + token + b"\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    whole = HEAD + fields + b"content-length: 3\r\n\r\nabc"
    with server.connect(whole[:cut]) as connection:
        time.sleep(0.05)
        connection.sendall(whole[cut:])
        assert b'{"path": "/a", "bytes": 3' in read_response(connection)
        connection.sendall(CLOSING)
        assert b'{"path": "/a", "bytes": 3' in read_all(connection)


def test_an_http_1_0_client_gets_one_response(server: Served) -> None:
    answer = server.talk(OK.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b'"bytes": 3, "http": "1.0"' in answer


def test_head_and_body_of_a_short_response_are_sent_together(server: Served) -> None:
    with server.connect() as connection:
        for _ in range(50):
            connection.sendall(HEAD + b"content-length: 3\r\n\r\nabc")
            assert b'"bytes": 3' in connection.recv(1 << 16)


def test_a_client_that_expects_100_continue_gets_it(server: Served) -> None:
    with server.connect(HEAD + b"connection: close\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n") as connection:
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert b'"bytes": 3' in read_all(connection)


def test_a_body_in_small_chunks_is_accepted(server: Served) -> None:
    head = CHUNKED.replace(b"host", b"connection: close\r\nhost")
    answer = server.talk(head + b"1\r\na\r\n" * 10_000 + (b"40\r\n" + b"a" * 64 + b"\r\n") * 10_000 + b"0\r\n\r\n")
    assert b'"bytes": 650000' in answer


def test_a_slow_but_steady_body_is_accepted(server: Served) -> None:
    size = 60 * 16 * 1024
    head = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % size
    answer = server.talk(head, *[b"a" * (size // 10)] * 10, pause=0.1)
    assert b'"bytes": %d' % size in answer


def test_a_kept_connection_serves_requests_of_all_sizes(server: Served) -> None:
    with server.connect() as connection:
        for size in (0, 1, 100_000, MIB, 3):
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % size + b"a" * size + b"\r\n")
            assert b'"bytes": %d' % size in read_response(connection)
            time.sleep(0.3)


def test_a_connection_above_the_limit_gets_429_and_silent_ones_make_room() -> None:
    with serving(SmallConnection) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.connect()) for _ in range(SmallConnection.max_connections)]
        assert rejection(server.talk()) == (429, "too_many_connections")
        until(lambda: all(map(is_closed, silent)), 20)
        assert server.events()["rejected"] == [[429, "too_many_connections"]]


def test_clients_that_do_not_read_or_send_hold_no_request_and_not_the_shutdown() -> None:
    drain_seconds = 20
    with serving(PatientConnection, drain_seconds) as server, contextlib.ExitStack() as stack:
        with server.connect(LARGE.replace(b"host", b"connection: close\r\nhost")) as late:
            until(lambda: server.events()["large"] == 1, PatientConnection.transfer_s / 2)
            assert len(read_all(late)) > LARGE_BYTES
        attackers = [stack.enter_context(server.connect(sent)) for sent in (LARGE, LARGE + OK, b"", HEAD, OK)]
        waiting = stack.enter_context(server.connect(SLOW))
        until(server.responds)  # it accepts connections in their order
        started = time.monotonic()
        server.close.set()
        assert b"200 OK" in read_all(waiting)
        server.process.join(2 * drain_seconds)
        assert server.process.exitcode == 0
        assert time.monotonic() - started < drain_seconds
        assert all(map(is_closed, attackers[:2]))
