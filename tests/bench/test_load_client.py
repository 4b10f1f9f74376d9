"""Tests of the load generator's HTTP client against servers with unusual but valid responses."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from test_load import measure

from inferctl.bench.load import records

MODELS = b'{"data": [{"id": "m"}]}'
BODY = b'{"data": [], "usage": {"prompt_tokens": 7}}'
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (BODY[:5], BODY[5:38], BODY[38:], b"")
)
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED
REDIRECT = SIZED.replace(b"200 OK", b"307 Temporary Redirect").replace(
    b"Content-Length", b"Location: /elsewhere\r\nContent-Length"
)
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BODY
Respond = Callable[[int], tuple[bytes, bool]]


@contextlib.contextmanager
def run_server(respond: Respond, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run a server. `respond(n)` returns the bytes of the n-th response, and whether to close the connection."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def handle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stream_socket = stack.enter_context(tls.wrap_socket(connection, server_side=True) if tls else connection)
            stream, number = stream_socket.makefile("rb"), 0
            while line := stream.readline():
                length = 0
                while (header := stream.readline()).strip():
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                stream.read(length)
                if line.startswith(b"GET"):
                    known = line.startswith(b"GET /v1/models")
                    status = b"200 OK" if known else b"404 Not Found"
                    stream_socket.sendall(
                        b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(MODELS), MODELS)
                    )
                    continue
                content, closes = respond(number)
                number += 1
                # In two parts, because a response may arrive in several.
                stream_socket.sendall(content[:20])
                stream_socket.sendall(content[20:])
                if closes:
                    return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://localhost:{listener.getsockname()[1]}"
    finally:
        listener.close()


def test_every_valid_form_of_a_response_is_read(tmp_path: Path) -> None:
    """Each connection gets a sized response, chunks, one after `100 Continue`, and one until the connection closes."""
    forms = (SIZED, CHUNKED, CONTINUED, UNTIL_CLOSED)
    with run_server(lambda number: (forms[number], forms[number] == UNTIL_CLOSED)) as url:
        result, part, _ = measure(url, tmp_path / "run", mode="open", rate=50, duration_s=1)
    rows = part.measured
    assert len(rows) > 20
    assert result.state["workers"][0]["connections"] <= len(rows) // 2, "connections are reused"
    assert set(rows["error"].tolist()) == {records.OK}
    assert set(rows["bytes"].tolist()) == {len(BODY)}
    assert set(rows["tokens"].tolist()) == {7}


def test_no_request_fails_if_the_server_closes_an_idle_connection(tmp_path: Path) -> None:
    with run_server(lambda number: (SIZED, number == 2)) as url:
        result, part, work = measure(url, tmp_path / "run", mode="open", rate=50, duration_s=1)
    assert set(part.measured["error"].tolist()) == {records.OK}
    assert len(part.measured) == len(work.schedule_ns)
    assert result.state["workers"][0]["connections"] >= len(part.measured) // 3


def test_a_redirect_and_an_incomplete_response_are_failed_requests(tmp_path: Path) -> None:
    contents = (SIZED, REDIRECT, SIZED, SIZED[:-5])
    with run_server(lambda number: (contents[number], number == 3)) as url:
        _, part, _ = measure(url, tmp_path / "run", users=1, duration_s=1)
    answers = zip(part.measured["status"].tolist(), part.measured["error"].tolist(), strict=True)
    assert {error if error == records.CONNECTION else (status, error) for status, error in answers} == {
        (200, records.OK),
        (307, records.HTTP_ERROR),
        records.CONNECTION,
    }


def test_a_server_that_has_ended_receives_few_connection_attempts(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    _, part, _ = measure(answering("--die-after", "5"), tmp_path / "run", users=2, duration_s=1)
    failed = part.measured[part.measured["error"] == records.CONNECTION]
    # Two users, which pause for 50 ms after each failure.
    assert 2 <= len(failed) <= 2 * 20 + 4


def test_users_wait_for_retry_after_when_a_server_rejects_them(answering: Callable[..., str], tmp_path: Path) -> None:
    url = answering("--slots", "1", "--queue", "1", "--median-ms", "20")
    _, part, _ = measure(url, tmp_path / "run", users=6, duration_s=2)
    statuses = part.measured["status"].tolist()
    # Six users, each with at most three rejections in 2 s: `Retry-After` is 1 s.
    assert 0 < statuses.count(429) <= 6 * 3
    assert statuses.count(200) > statuses.count(429)


def test_tls_is_supported_and_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with run_server(lambda _: (CHUNKED, False), context) as url:
        _, part, _ = measure(url, tmp_path / "run", mode="open", rate=50, duration_s=1)
        assert set(part.measured["error"].tolist()) == {records.OK}
        assert set(part.measured["bytes"].tolist()) == {len(BODY)}
        # The same server, with a load generator that does not trust its certificate authority.
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "other.pem"))
        rejected, *_ = measure(url, tmp_path / "rejected", users=1, duration_s=1)
    assert set(rejected.rows["error"].tolist()) == {records.CONNECTION}
