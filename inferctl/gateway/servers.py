"""The servers behind a gateway: their URLs, from options or a file, and the addresses of their names."""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inferctl.core.errors import UsageError, shown

# A million servers took 5.8 GB, and Envoy checks the health of each one.
_MAX_SERVERS, _MAX_BYTES = 1000, 1024 * 1024
_TOO_MANY = "name a file with one URL per line, and run several gateways for more servers"
_EXAMPLE = "write http://HOST:PORT, as in http://10.0.0.7:8080"


@dataclass(frozen=True, order=True)
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


def read(file: Path) -> list[Server]:
    """Return the servers in a file: one URL per line, `#` starts a comment. Raises `UsageError`."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UsageError(f"{file} is larger than {_MAX_BYTES:,} bytes", _TOO_MANY)
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{file} cannot be read: {reason}", "name a file with one URL per line") from None
    found = []
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            try:
                found.append(parse(text))
            except UsageError as error:
                raise UsageError(f"{file}:{number}: {error.message}", error.hint) from None
    if len(found) > _MAX_SERVERS:
        raise UsageError(f"{file} has {len(found):,} servers; a gateway has at most {_MAX_SERVERS:,}", _TOO_MANY)
    return found


def addresses(servers: Iterable[Server]) -> tuple[list[tuple[str, int]], list[str]]:
    """Return all (IP address, port), sorted and without duplicates, and the names that have no address now."""
    found: set[tuple[str, int]] = set()
    unknown = []
    for server in servers:
        try:
            found.update((ip, server.port) for ip in _resolve(server.host))
        except OSError:
            unknown.append(server.host)
    return sorted(found), sorted(unknown)


def _resolve(host: str) -> Sequence[str]:
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
