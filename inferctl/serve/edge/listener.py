"""The listening socket, and uvicorn with the settings of this server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn

from inferctl.core.errors import NotReadyError
from inferctl.serve.edge.connection import Connection

_MAX_UNSENT_BYTES = 128 * 1024
# New connections that wait. While two clients connected and reset as fast as they could, one connection at a time,
# another client waited up to 4 s behind uvicorn's 2,048, and 60 ms behind 256. Bursts of 50 still delay it by seconds.
_BACKLOG = 256


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises `NotReadyError` if the port is in use or the address is not of this machine."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "`--host 127.0.0.1` listens on this machine, `--host 0.0.0.0` on all addresses"
        raise NotReadyError(f"cannot listen on {host}:{port}: {reason.lower()}", hint) from None
    family, kind, protocol, _, address = addresses[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Otherwise, the kernel holds up to 4 MiB for a client that does not read, and the server does not see them.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        not_local = error.errno == errno.EADDRNOTAVAIL
        hint = (
            "`--host 0.0.0.0` listens on all addresses"
            if not_local
            else "`--port 0` selects a free port, `--port N` another one"
        )
        raise NotReadyError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0).lower()}", hint) from None
    except OverflowError:
        listener.close()
        raise NotReadyError(f"invalid port {port}", "use a port from 1 to 65535, or 0 for a free one") from None
    listener.setblocking(False)
    return listener


def reached_at(listener: socket.socket, host: str, published: str | None) -> tuple[str, str]:
    """Return the URL of the listening socket for clients on this machine, and the host whose clients reach it.

    `published`: the HOST:PORT of the machine that forwards to a container.
    """
    port = listener.getsockname()[1]
    if published:
        host, _, port = published.rpartition(":")
    local = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return (f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"), host


def raise_file_limit() -> None:
    """Raise this process's limit of open files to the hard limit. Each connection needs one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class HttpServer(uvicorn.Server):
    """uvicorn with bounds on connections, and without its signal handling, which is in `serve.lifetime`.

    `drain_seconds`: after `close`, how long `serve` waits for requests in flight. `on_rejected`: see `Connection`.
    """

    def __init__(
        self,
        app: Any,
        drain_seconds: float,
        on_rejected: Callable[[int, str], None],
        connection: type[Connection] = Connection,
    ) -> None:
        self._connection = connection
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(Any, functools.partial(connection, on_rejected, set())),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                backlog=_BACKLOG,
                timeout_graceful_shutdown=cast(int, drain_seconds),  # a float works too
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `close` is called, then until the requests in flight are complete or `drain_seconds` passed."""
        checks = asyncio.create_task(self._check_connections())
        try:
            await super().serve(sockets)
        finally:
            checks.cancel()

    async def adopt(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere."""
        factory = cast(Any, self.config.http_protocol_class)
        protocol = functools.partial(factory, config=self.config, server_state=self.server_state, app_state={})
        await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)

    def close(self) -> None:
        """Accept no more connections. `serve` returns after the requests in flight are complete."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve.lifetime`."""
        yield

    async def _check_connections(self) -> None:
        while True:
            await asyncio.sleep(self._connection.interval_s)
            connections = cast(set[Connection], self.server_state.connections)
            now = asyncio.get_running_loop().time()
            for connection in tuple(connections):
                connection.check(now)
            self._connection.limit_unread_bytes(connections, now)
