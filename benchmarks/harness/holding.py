"""A proxy that delays each response by a share (`--share`) of the time that the server took for it.

    python benchmarks/harness/holding.py --to http://127.0.0.1:8080 --share 0.1 --announce FILE

It writes {"url": ...} to FILE. On SIGTERM it writes {"requests", "server_s", "held_s"} to FILE.held, which show by how
much the server was slower. It supports HTTP/1.1 with Content-Length only, with one thread per connection. A share of 0
adds no delay, but has the same cost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

# time.sleep wakes up about 60 µs late, so the last part is a busy wait.
_SPIN_S = 0.0002


class DelayProxy:
    """Forward connections to `address`, delay the responses, and count requests and times."""

    def __init__(self, address: tuple[str, int], share: float) -> None:
        self._address, self._share = address, share
        self._lock = threading.Lock()
        self.requests, self.server_s, self.held_s = 0, 0.0, 0.0

    def serve(self, client: socket.socket) -> None:
        """Forward the requests of one connection until either side closes it."""
        with client, socket.create_connection(self._address) as server:
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            incoming, returned = client.makefile("rb"), server.makefile("rb")
            while request := read_message(incoming):
                start = time.perf_counter()
                server.sendall(request)
                response = read_message(returned)
                if not response:
                    return
                elapsed_s = time.perf_counter() - start
                wait_until(start + elapsed_s * (1 + self._share))
                held = time.perf_counter() - start - elapsed_s
                client.sendall(response)
                if request.startswith(b"POST"):
                    with self._lock:
                        self.requests, self.server_s, self.held_s = (
                            self.requests + 1,
                            self.server_s + elapsed_s,
                            self.held_s + held,
                        )


def read_message(stream: BinaryIO) -> bytes:
    """Return one HTTP message with its body; empty at the end of the connection."""
    lines, length = [], 0
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return b"".join(lines) + b"\r\n" + stream.read(length) if lines else b""


def wait_until(moment: float) -> None:
    """Return at the time `moment` of the performance counter: sleep, then busy wait."""
    if (left := moment - time.perf_counter()) > _SPIN_S:
        time.sleep(left - _SPIN_S)
    while time.perf_counter() < moment:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True)
    parser.add_argument("--share", type=float, required=True)
    parser.add_argument("--announce", type=Path, required=True)
    options = parser.parse_args()
    to = urlsplit(options.to)
    proxy = DelayProxy((to.hostname or "127.0.0.1", to.port or 80), options.share)

    def stop(*_: object) -> None:
        counts = {"requests": proxy.requests, "server_s": proxy.server_s, "held_s": proxy.held_s}
        options.announce.with_suffix(".held").write_text(json.dumps(counts))
        sys.stdout.flush()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    listener = socket.create_server(("127.0.0.1", 0))
    part = options.announce.with_suffix(".part")
    part.write_text(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "pid": os.getpid()}))
    part.rename(options.announce)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=proxy.serve, args=(client,), daemon=True).start()


if __name__ == "__main__":
    main()
