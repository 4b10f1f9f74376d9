"""Calls of Envoy's admin interface over its Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

_TIMEOUT_S = 5.0


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("envoy", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def call(path: Path, target: str, method: str = "GET") -> tuple[int, str]:
    """Return status and body. Raises `OSError` if Envoy does not respond."""
    connection = _Connection(path)
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise OSError(str(error)) from None
    finally:
        connection.close()


def port_of(path: Path, listener: str) -> int:
    """Return the port of a listener. Raises `OSError`."""
    statuses: list[dict[str, Any]] = json.loads(call(path, "/listeners?format=json")[1])["listener_statuses"]
    found = next(status for status in statuses if status["name"] == listener)
    return int(found["local_address"]["socket_address"]["port_value"])


def stat(path: Path, name: str) -> int:
    """Return the value of one of Envoy's statistics, 0 if it has none. Raises `OSError`."""
    stats: list[dict[str, Any]] = json.loads(call(path, f"/stats?format=json&filter=^{name}$")[1])["stats"]
    return int(stats[0].get("value", 0)) if stats else 0
