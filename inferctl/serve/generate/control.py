"""The channel between the supervisor and the edge in vLLM's process: lines of JSON over a Unix socket.

The edge sends `ready`, then `beat` each second. The supervisor answers `ready` with the listening socket, and sends
`drain` and `close`. For an adapter that a client adds, the edge sends `add`, gets `load` or `refused`, and sends
`added` when vLLM has it. It sends `removed` for one that gets no more requests. So the port is open from the start, and
also while vLLM is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENGINE_LOST = "the engine was lost and is restarting"  # the message of errors with the code `engine_lost`
OF_ADAPTERS = frozenset({"add", "added", "removed"})
_SETTINGS = "edge.json"
_MAX_MESSAGE = 65536


@dataclass(frozen=True)
class EdgeSettings:
    """What the supervisor tells the edge. `spec`: as JSON data. `info`: the document of `GET /info`.

    `log`, `traces`: as in `ServerOptions`. `started`: when the server started, or restarted vLLM (CLOCK_MONOTONIC).
    `batch_secret`: as of `EdgeAccess`.
    """

    spec: dict[str, Any]
    info: dict[str, Any]
    log: str
    traces: bool
    started: float
    batch_secret: str

    def write(self, folder: Path) -> None:
        """Write the settings to `folder`."""
        (folder / _SETTINGS).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> EdgeSettings:
        """Return what `write` wrote."""
        return cls(**json.loads((folder / _SETTINGS).read_text()))


class Channel:
    """One end of the channel. `receive` returns None when the other end is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._buffer = connection, b""

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message. It is dropped if the other end does not read."""
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps({"kind": kind, **fields}).encode() + b"\n", socket.MSG_DONTWAIT)

    async def receive(self) -> dict[str, Any] | None:
        """Return the next message; None at the end."""
        loop = asyncio.get_running_loop()
        while b"\n" not in self._buffer:
            try:
                data = await loop.sock_recv(self._socket, _MAX_MESSAGE)
            except OSError:
                return None
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def send_listener(self, listener: socket.socket) -> None:
        """Send the listening socket. Raises `OSError` if the other end is closed."""
        socket.send_fds(self._socket, [b"L"], [listener.fileno()])

    def receive_listener(self) -> socket.socket:
        """Wait for the listening socket. Raises `EOFError` if the other end is closed."""
        self._socket.setblocking(True)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        self._socket.setblocking(False)
        if not descriptors:
            raise EOFError("the supervisor ended")
        return socket.socket(fileno=descriptors[0])

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


def listen(folder: Path) -> socket.socket:
    """Return the socket on which the supervisor waits for the edge."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "control"))
    listener.listen(1)
    listener.setblocking(False)
    return listener


def connect(folder: Path) -> Channel:
    """Connect the edge to its supervisor. Raises `OSError` if that ended."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "control"))
    connection.setblocking(False)
    return Channel(connection)
