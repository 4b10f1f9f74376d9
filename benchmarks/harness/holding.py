"""A proxy that makes a server slower by a known share: it holds each answer back for `--share` of the time that the server took for it.

    python benchmarks/harness/holding.py --to http://127.0.0.1:8080 --share 0.1 --announce FILE

Announces {"url": ...}. On SIGTERM it writes {"requests", "server_s", "held_s"} to FILE.held, so that whoever measures can say how much slower
the server really was. HTTP/1.1 with Content-Length only, one thread a connection. With a share of 0 it only passes on, which costs the same.
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

# time.sleep wakes up late by some 60 µs; the last stretch is waited for by looking at the clock.
_SPIN_S = 0.0002


class Holding:
    """Passes connections on to `address` and counts what it did."""

    def __init__(self, address: tuple[str, int], share: float) -> None:
        self._address, self._share = address, share
        self._lock = threading.Lock()
        self.requests, self.server_s, self.held_s = 0, 0.0, 0.0

    def serve(self, client: socket.socket) -> None:
        """Pass one connection's requests on until either side closes it."""
        with client, socket.create_connection(self._address) as server:
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asked, answered = client.makefile("rb"), server.makefile("rb")
            while request := message(asked):
                begun = time.perf_counter()
                server.sendall(request)
                answer = message(answered)
                if not answer:
                    return
                took = time.perf_counter() - begun
                wait_until(begun + took * (1 + self._share))
                held = time.perf_counter() - begun - took
                client.sendall(answer)
                if request.startswith(b"POST"):
                    with self._lock:
                        self.requests, self.server_s, self.held_s = (
                            self.requests + 1,
                            self.server_s + took,
                            self.held_s + held,
                        )


def message(stream: BinaryIO) -> bytes:
    """One HTTP message with its body; empty at the end of the connection."""
    lines, length = [], 0
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return b"".join(lines) + b"\r\n" + stream.read(length) if lines else b""


def wait_until(moment: float) -> None:
    """Return at `moment` of the performance counter, not before and hardly after."""
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
    holding = Holding((to.hostname or "127.0.0.1", to.port or 80), options.share)

    def stop(*_: object) -> None:
        said = {"requests": holding.requests, "server_s": holding.server_s, "held_s": holding.held_s}
        options.announce.with_suffix(".held").write_text(json.dumps(said))
        sys.stdout.flush()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    listener = socket.create_server(("127.0.0.1", 0))
    part = options.announce.with_suffix(".part")
    part.write_text(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "pid": os.getpid()}))
    part.rename(options.announce)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=holding.serve, args=(client,), daemon=True).start()


if __name__ == "__main__":
    main()
