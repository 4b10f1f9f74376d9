"""The servers behind a gateway."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from inferctl.core.errors import UsageError, shown

_EXAMPLE = "write http://HOST:PORT, as in http://10.0.0.7:8080; in front of it, SPACE= for one space"
_OF_SPACE = re.compile(r"((?:dense|sparse|tokens)_[0-9a-f]{16})=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Server:
    """A server by host (a name or an IP address) and port. A name can have several addresses.

    `space`: it gets only the requests that name this vector space; None for all other requests.
    """

    host: str
    port: int
    space: str | None = None

    def __str__(self) -> str:
        return f"{self.space}={self.host}:{self.port}" if self.space else f"{self.host}:{self.port}"


def parse(url: str) -> Server:
    """Return the server of `[SPACE=]http://HOST:PORT`. Raises `UsageError`, without a password of the URL."""
    found = _OF_SPACE.fullmatch(url)
    space, url = found.groups() if found else (None, url)
    name = "a URL with `@`" if "@" in url else shown(url)
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{name} is not the URL of a server: {error}", _EXAMPLE) from None
    if parts.scheme != "http" or not host or "=" in host or parts.path.strip("/") or parts.query or parts.username:
        raise UsageError(f"{name} is not the URL of a server", _EXAMPLE)
    return Server(host, port or 80, space)
