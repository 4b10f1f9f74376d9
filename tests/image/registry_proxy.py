"""A proxy in front of the real registry that counts what is uploaded, and can lose, change or refuse requests."""

from __future__ import annotations

import http.client
import http.server
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.http_servers import Handler, serving

# Returns the status and the body of the response to (method, path), in place of the registry; None forwards it.
Fault = Callable[[str, str], tuple[int, bytes] | None]
_NOT_FORWARDED = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class RegistryProxy:
    """What passed the proxy. `blobs`: bytes of each upload of a blob that the registry accepted. `host`: its name."""

    def __init__(self) -> None:
        self.host = ""
        self.blobs: list[int] = []
        self.mounted: list[str] = []
        self.fault: Fault = lambda _method, _path: None
        self._pending: dict[str, int] = {}

    def uploads(self) -> list[int]:
        """Return the bytes of each uploaded blob since the last call."""
        found, self.blobs = self.blobs, []
        return found

    def count(self, method: str, path: str, bytes_: int, status: int) -> None:
        """Count one request."""
        found = re.search(r"/blobs/uploads/([^?]+)", path)
        if method == "POST" and "mount=" in path and status == 201:
            self.mounted.append(path)
        if found and status < 300:
            total = self._pending.pop(found[1], 0) + bytes_
            if method == "PUT":
                self.blobs.append(total)
            else:
                self._pending[found[1]] = total


@contextmanager
def proxied(registry: str = "localhost:5000") -> Iterator[RegistryProxy]:
    """Forward requests on a free port to the registry."""
    proxy = RegistryProxy()

    class Forward(Handler):
        protocol_version = "HTTP/1.1"
        # Builders try TLS first, and then need a response with a status to continue without it.
        default_request_version = "HTTP/1.1"

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding", "").lower() != "chunked":
                return self.body()
            parts = []
            while length := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _forward(self) -> None:
            body = self._body()
            names = {name.lower() for name in self.headers} - _NOT_FORWARDED
            headers = {name: ", ".join(self.headers.get_all(name) or ()) for name in names}
            if (fault := proxy.fault(self.command, self.path)) is not None:
                self._respond(fault[0], [("content-type", "application/json")], fault[1])
                return
            connection = http.client.HTTPConnection(registry, timeout=60)
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            proxy.count(self.command, self.path, len(body), response.status)
            length = response.getheader("content-length")
            self._respond(response.status, response.getheaders(), content, length)
            connection.close()

        def _respond(
            self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in _NOT_FORWARDED:
                    self.send_header(name, value)
            of_head = length if self.command == "HEAD" else None
            self.send_header("content-length", of_head or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

    with serving(Forward) as port:
        proxy.host = f"localhost:{port}"
        yield proxy
