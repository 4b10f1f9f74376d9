"""A server whose latencies are known exactly, for tests of the load generator.

    python known_server.py --announce FILE --truth FILE
                           [--median-ms 20 --sigma 0.5 --slow-share 0.03 --slow-ms 300 --seed 1]
                           [--bare]

It responds to `POST /v1/embeddings` after a random delay. The delay is log-normal, and a share of the responses has a
second, longer one in addition. The server logs the actual times, not the drawn ones. For each request it logs three
little-endian uint64: two numbers that the request carries (the prefix that the load generator adds to each text) and
the nanoseconds from reading the request to writing the response. It writes the log when it ends (SIGTERM).

`--bare`: the same bytes without a delay and without a log. It uses one thread and asyncio protocols, on uvloop if it is
installed.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
NUMBERS = re.compile(rb'"input": ?\[?"(\d+) (\d+) ')
BODY = json.dumps({"data": [{"index": 0, "embedding": "A" * 512}], "usage": {"prompt_tokens": 12}}).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
MODELS = b'{"data": [{"id": "known"}]}'
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"


class DelayLog:
    """Draw delays, and log the actual time of each response."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.random = options, random.Random(options.seed)
        self.log = array.array("Q")

    def delay(self, now: float) -> float:
        """Return the delay in seconds of a request that is read at `now` (monotonic)."""
        options, draw = self.options, self.random
        seconds = draw.lognormvariate(math.log(options.median_ms / 1e3), options.sigma)
        if draw.random() < options.slow_share:
            seconds += draw.lognormvariate(math.log(options.slow_ms / 1e3), options.sigma / 2)
        return seconds


class Connection(asyncio.Protocol):
    """A connection of one client, which sends one request at a time."""

    def __init__(self, known: DelayLog) -> None:
        self.known, self.bare = known, known.options.bare
        self.content, self.loop = b"", asyncio.get_running_loop()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        read_ns = time.monotonic_ns()
        self.content += data
        end = self.content.find(b"\r\n\r\n")
        if end < 0:
            return
        if self.content.startswith(b"GET"):
            is_models = self.content.startswith(b"GET /v1/models")
            self.content = b""
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(MODELS), MODELS)
            self.transport.write(head if is_models else NOT_FOUND)
            return
        length = LENGTH.search(self.content, 0, end)
        if len(self.content) < end + 4 + (int(length[1]) if length else 0):
            return
        request, self.content = self.content, b""
        self.handle(request, end, read_ns)

    def handle(self, request: bytes, end: int, read_ns: int) -> None:
        """Respond to a POST request, whose head ends at `end`."""
        if self.bare:
            self.transport.write(RESPONSE)
            return
        numbers = NUMBERS.search(request, end)
        serial, index = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        self.loop.call_later(self.known.delay(read_ns / 1e9), self.respond, serial, index, read_ns)

    def respond(self, serial: int, index: int, read_ns: int) -> None:
        self.known.log.extend((serial, index, time.monotonic_ns() - read_ns))
        self.transport.write(RESPONSE)


@dataclass
class KnownServer:
    """A server process. `log`: what it logged, after it has ended."""

    url: str
    pid: int
    log: bytes = b""

    def truth_ms(self, serial: int) -> dict[int, float]:
        """Return the actual times (ms) of the requests with one serial, by index."""
        rows: npt.NDArray[np.uint64] = np.frombuffer(self.log, "<u8").reshape(-1, 3)
        return {int(index): float(ns) / 1e6 for number, index, ns in rows.tolist() if number == serial}


@contextlib.contextmanager
def run_server(*options: str, script: str = __file__) -> Iterator[KnownServer]:
    """Start a server and yield it; it has ended when the context ends."""
    with tempfile.TemporaryDirectory(prefix="known-server-") as folder:
        announce, truth = Path(folder) / "announce.json", Path(folder) / "truth.bin"
        process = subprocess.Popen(
            [sys.executable, script, "--announce", str(announce), "--truth", str(truth), *options]
        )
        try:
            while not announce.is_file():
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended with exit code {process.returncode}")
                time.sleep(0.02)
            server = KnownServer(json.loads(announce.read_text())["url"], process.pid)
            yield server
        finally:
            process.terminate()
            process.wait()
        server.log = truth.read_bytes()


async def serve(options: argparse.Namespace, connection: Callable[[], asyncio.Protocol], log: array.array[int]) -> None:
    """Serve until SIGTERM, then write the log."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(connection, "127.0.0.1", 0, backlog=4096)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    part = options.announce.with_suffix(".part")
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    part.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    part.rename(options.announce)
    await ended.wait()
    options.truth.write_bytes(log.tobytes())


def run(options: argparse.Namespace, connection: Callable[[], asyncio.Protocol], log: array.array[int]) -> None:
    """Run `serve` on uvloop if it is installed."""
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(options, connection, log))


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that `run_server` passes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--announce", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    return parser


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--median-ms", type=float, default=20.0)
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--slow-share", type=float, default=0.0)
    parser.add_argument("--slow-ms", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bare", action="store_true")
    options = parser.parse_args()
    known = DelayLog(options)
    run(options, lambda: Connection(known), known.log)


if __name__ == "__main__":
    main()
