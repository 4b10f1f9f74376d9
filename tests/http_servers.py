"""HTTP servers in the process of the tests."""

from __future__ import annotations

import http.server
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Logs nothing, reads bodies and replies."""

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def reply(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        """Send a response. A `_` in the name of a header is a `-`."""
        self.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    """Run a server on a thread."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(
    handler: Callable[..., http.server.BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """Serve requests with `handler` on a free port of 127.0.0.1. Yields the port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    with running(server):
        yield server.server_port


@contextmanager
def serving_socket(handler: type[http.server.BaseHTTPRequestHandler], socket: Path) -> Iterator[str]:
    """Serve requests on a Unix socket, as a Docker Engine does. Yields its URL."""
    server = socketserver.ThreadingUnixStreamServer(str(socket), handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.handle_error = lambda *_: None  # clients may disconnect
    with running(server):
        yield f"http+unix://{socket}"


@contextmanager
def answering(status: int, body: bytes = b"", **headers: str) -> Iterator[str]:
    """Serve the same response to all requests. Yields host and port. A `_` in the name of a header is a `-`."""

    class Answer(Handler):
        def do_GET(self) -> None:
            self.reply(status, body, **{"content_type": "application/json", **headers})

        do_HEAD = do_POST = do_PUT = do_GET

    with serving(Answer) as port:
        yield f"localhost:{port}"
