"""The port, and uvicorn as this server wants it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from inferctl.errors import NotReadyError
from inferctl.serve import protocol

_IDLE_SECONDS = 75  # longer than the usual load balancer in front keeps a connection


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `NotReadyError` when the port is taken or the address is not ours."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "`--host 127.0.0.1` listens on this machine, `--host 0.0.0.0` on all addresses"
        raise NotReadyError(f"cannot listen on {host}:{port}: {said.lower()}", hint) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        foreign = error.errno == errno.EADDRNOTAVAIL
        hint = (
            "`--host 0.0.0.0` listens on all addresses"
            if foreign
            else "`--port 0` takes a free one, `--port N` another"
        )
        raise NotReadyError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0).lower()}", hint) from None
    except OverflowError:
        listener.close()
        raise NotReadyError(f"there is no port {port}", "ports go from 1 to 65535") from None
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, host: str) -> str:
    """How the listening socket is reached from this machine."""
    port = listener.getsockname()[1]
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"


def allow_connections() -> None:
    """Raise the number of files that this process may open to what it is allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Web(uvicorn.Server):
    """uvicorn without its signal handling: draining is ours. `close()` stops accepting and lets requests finish."""

    def __init__(self, app: Any, drain_seconds: float, max_body_bytes: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol.connection(max_body_bytes),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=max(1, round(drain_seconds)),
            )
        )

    def close(self) -> None:
        """See the class; `serve` returns when it is done."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """No signals."""
        yield
