"""Incomplete, large, pipelined and upgrade requests. uvicorn runs with the server's own protocol class."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from inferctl.serve.edge import connection as protocol

LIMIT = 1 << 20
OK = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"
SLOW = OK.replace(b"/a", b"/slow")
disconnected: list[str] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Respond with the path and the number of received bytes."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            disconnected.append(scope["path"])
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    body = json.dumps({"path": scope["path"], "bytes": size}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=protocol.connection(LIMIT, timeout_s=0.6), lifespan="off", log_config=None, ws="auto"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


def talk(port: int, *pieces: bytes, pause: float = 0.05) -> bytes:
    """Return all bytes until the server closes the connection. Raises an error if it does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def rejection(answer: bytes) -> tuple[int, str]:
    """Return status and code. Fails unless there is exactly one response, in the envelope."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"connection: close" in head
    return int(head.split(b" ")[1]), error["code"]


HEAD = b"POST /a HTTP/1.1\r\nhost: a\r\n"
CASES: dict[str, tuple[tuple[bytes, ...], int, str]] = {
    "no HTTP": ((b"garbage\r\n\r\n",), 400, "invalid_http"),
    "TLS": ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",), 400, "invalid_http"),
    "HTTP/2": ((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), 400, "invalid_http"),
    "unknown method": ((b"BREW /a HTTP/1.1\r\nhost: a\r\n\r\n",), 400, "invalid_http"),
    "bad length": ((HEAD + b"content-length: x\r\n\r\n",), 400, "invalid_http"),
    "two lengths": ((HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",), 400, "invalid_http"),
    "length and chunks": ((HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",), 400, "invalid_http"),
    "bad chunk": ((HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nabc",), 400, "invalid_http"),
    "raw bytes in the path": ((b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",), 400, "invalid_http"),
    "many headers": ((HEAD + b"".join(b"x-%d: y\r\n" % i for i in range(5000)) + b"\r\n",), 431, "headers_too_large"),
    "many headers, slowly": ((HEAD, *[b"x: y\r\n" * 60] * 5), 431, "headers_too_large"),
    "many trailers": (
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", *[b"x: y\r\n" * 60] * 5),
        431,
        "headers_too_large",
    ),
    "many trailers at once": (
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n" + b"x: y\r\n" * 300 + b"\r\n",),
        431,
        "headers_too_large",
    ),
    "long extensions of chunks": (
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + (b"1;e=" + b"x" * 60_000 + b"\r\na\r\n") * 50,),
        431,
        "headers_too_large",
    ),
    "long trailer": (
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: " + b"y" * 5_000_000,),
        431,
        "headers_too_large",
    ),
    "long trailer after a large body": (
        (HEAD + b"transfer-encoding: chunked\r\n\r\nfffff\r\n" + b"a" * 0xFFFFF + b"\r\n0\r\nx: " + b"y" * 2_000_000,),
        431,
        "headers_too_large",
    ),
    "long header": ((HEAD + b"x: ", *[b"y" * 40_000] * 3), 431, "headers_too_large"),
    "long header at once": ((HEAD + b"x: " + b"y" * 5_000_000,), 431, "headers_too_large"),
    "long path": ((b"GET /", *[b"y" * 30_000] * 3), 431, "headers_too_large"),
    "half a head": ((b"POST /a HT",), 408, "request_timeout"),
    "half a body": ((HEAD + b"content-length: 10\r\n\r\nabc",), 408, "request_timeout"),
    "half a chunk": ((HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nab",), 408, "request_timeout"),
    "trickle": ((HEAD + b"content-length: 100\r\n\r\n", *[b"a"] * 40), 408, "request_timeout"),
    "announced too large": ((HEAD + b"content-length: 99999999999\r\n\r\nabc",), 413, "body_too_large"),
    "too large": ((HEAD + b"content-length: %d\r\n\r\n" % (8 * LIMIT) + b"a" * 8 * LIMIT,), 413, "body_too_large"),
    "too many chunks": (
        (HEAD + b"transfer-encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"a" * 0x10000 + b"\r\n") * 40,),
        413,
        "body_too_large",
    ),
    "proxying": ((b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",), 405, "method_not_allowed"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_invalid_request_gets_an_error_in_the_envelope_and_is_closed(port: int, name: str) -> None:
    pieces, status, code = CASES[name]
    assert rejection(talk(port, *pieces)) == (status, code)


def test_a_body_in_many_small_chunks_is_accepted(port: int) -> None:
    head = HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = talk(port, head + b"1\r\na\r\n" * 200_000 + b"0\r\nx: y\r\n\r\n")
    assert b'{"path": "/a", "bytes": 200000}' in answer


def test_a_body_that_is_too_large_is_rejected_before_it_is_sent(port: int) -> None:
    head = HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % (LIMIT + 1)
    assert rejection(talk(port, head)) == (413, "body_too_large")


def test_a_silent_connection_is_closed(port: int) -> None:
    assert talk(port) == b""


def test_a_connection_above_the_limit_gets_429_and_is_closed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_MAX_CONNECTIONS", 0)
    assert rejection(talk(port)) == (429, "too_many_connections")


@pytest.mark.parametrize("token", [b"h2c", b"websocket"])
@pytest.mark.parametrize("cut", [0, 20, 110, 175])
def test_a_request_with_an_upgrade_is_processed_without_it(port: int, token: bytes, cut: int) -> None:
    fields = (
        b"connection: close, Upgrade, HTTP2-Settings\r\nupgrade: " + token + b"\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    )
    key = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
    whole = HEAD + fields + key + b"content-length: 3\r\n\r\nabc"
    answer = talk(port, whole[:cut], whole[cut:] + OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert answer.count(b'{"path": "/a", "bytes": 3}') == 2


def test_pipelined_requests_get_responses_in_order(port: int) -> None:
    last = OK.replace(b"/a", b"/z").replace(b"host", b"connection: close\r\nhost")
    answer = talk(port, SLOW + OK * 3 + last)
    assert [part.split(b'"')[0] for part in answer.split(b'"path": "')[1:]] == [b"/slow", b"/a", b"/a", b"/a", b"/z"]


@pytest.mark.parametrize("bad", [b"garbage\r\n\r\n", HEAD + b"content-length: 99999999999\r\n\r\n"])
@pytest.mark.parametrize("waiting", [0, 2])
def test_an_invalid_request_in_a_pipeline_does_not_affect_earlier_responses(
    port: int, bad: bytes, waiting: int
) -> None:
    answer = talk(port, SLOW + OK * waiting + bad)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body.startswith(b'{"path": "/slow", "bytes": 3}')


def test_the_application_learns_that_a_client_disconnected_during_its_body(port: int) -> None:
    before = len(disconnected)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(HEAD + b"content-length: 10\r\n\r\nabc")
    deadline = time.monotonic() + 20
    while len(disconnected) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slow_but_steady_body_is_accepted(port: int) -> None:
    size = 60 * 16 * 1024
    head = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % size
    answer = talk(port, head, *[b"a" * (size // 10)] * 10, pause=0.1)
    assert b'"bytes": %d}' % size in answer


def test_a_kept_connection_serves_requests_of_all_sizes(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for size in (0, 1, 100_000, LIMIT, 3):
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % size + b"a" * size)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
            assert b'"bytes": %d}' % size in answer
            time.sleep(0.3)
