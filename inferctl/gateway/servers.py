"""The servers behind a gateway."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

from inferctl.core.errors import UsageError, shown

_EXAMPLE = "write http://HOST:PORT, as in http://10.0.0.7:8080"


@dataclass(frozen=True)
class Server:
    """A server by host (a name or an IP address) and port. A name can have several addresses."""

    host: str
    port: int


def parse(url: str) -> Server:
    """Return the server of `http://HOST:PORT`. Raises `UsageError`, without a password of the URL."""
    name = "a URL with `@`" if "@" in url else shown(url)
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{name} is not the URL of a server: {error}", _EXAMPLE) from None
    if parts.scheme != "http" or not host or parts.path.strip("/") or parts.query or parts.username:
        raise UsageError(f"{name} is not the URL of a server", _EXAMPLE)
    return Server(host, port or 80)
