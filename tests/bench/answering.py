"""A small server with the HTTP API of `inferctl serve` and latencies from a known distribution with a fixed seed.

    python answering.py --announce FILE [--median-ms 8 --sigma 0.5] [--stall-every 5 --stall-for 0.5]
                        [--fail-after N] [--die-after N] [--slots N [--queue N]] [--drift 0.01]
                        [--broken nan|shape|ragged|zeros|error] [--sha256 HEX]
                        [--model DIR --precision bf16 ...] [--task rerank|classify [--broken nan|missing|unsorted]]

Each request sleeps for the next drawn delay. It uses only the standard library, and one thread
per connection.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import http.server
import itertools
import json
import math
import os
import random
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

DIMENSIONS = 32
DEFAULTS: dict[str, Any] = {
    "model": "test", "precision": "auto", "task": "embed", "sha256": hashlib.sha256(b"test").hexdigest(),
    "median-ms": 8.0, "sigma": 0.5, "stall-every": 0.0, "stall-for": 0.0, "fail-after": 0, "die-after": 0,
    "slots": 0, "queue": 0, "drift": 0.0, "broken": "", "refuse": "",
}  # fmt: skip


@functools.cache
def direction_of(word: str) -> list[float]:
    draw = random.Random(word)
    return [draw.gauss(0, 1) for _ in range(DIMENSIONS)]


@functools.cache
def vector(text: str, drift: float) -> list[float]:
    """Return a unit vector that depends on the words of the text, moved by `drift` in a direction of its own."""
    total = [0.0] * DIMENSIONS
    for word in text.lower().split():
        total = [value + part for value, part in zip(total, direction_of(word), strict=True)]
    direction = random.Random(text + "#")
    total = [value + drift * direction.gauss(0, 1) * math.sqrt(len(text.split()) or 1) for value in total]
    norm = math.sqrt(sum(value * value for value in total)) or 1.0
    return [value / norm for value in total]


def score(query: str, document: str, drift: float) -> float:
    """Return the rerank score of a document: the cosine of both texts without `drift`, plus noise of that size."""
    similar = sum(a * b for a, b in zip(vector(query, 0), vector(document, 0), strict=True))
    return similar + drift * random.Random(query + document).gauss(0, 1)


def ranking(query: str, documents: list[str], drift: float, broken: str) -> list[dict[str, Any]]:
    """Return the results of a rerank request, or those of a server that is broken in the way `broken`."""
    scores = [score(query.partition(" ")[2] if query[:6].isdigit() else query, text, drift) for text in documents]
    rows = [{"index": index, "relevance_score": value} for index, value in enumerate(scores)]
    rows.sort(key=lambda row: -row["relevance_score"])
    if broken == "nan":
        rows[-1]["relevance_score"] = math.nan
    return {"missing": rows[:-1], "unsorted": rows[::-1]}.get(broken, rows)


def probabilities(text: str, drift: float, broken: str) -> list[float]:
    """Return the scores of three labels, which sum up to 1 without `drift`."""
    weights = [value**2 for value in vector(text, 0)[:3]]
    scores = [weight / sum(weights) for weight in weights]
    scores[0] += drift * random.Random(text).gauss(0, 1)
    return {"nan": [math.nan, *scores[1:]], "missing": scores[1:]}.get(broken, scores)


def corrupt(values: list[float], how: str, number: int) -> list[float]:
    """Return the vector, or the output of a server that is broken in the way `how`."""
    if how == "ragged":
        return values[: len(values) - number % 2]
    return {"nan": [math.nan, *values[1:]], "shape": values[1:], "zeros": [0.0] * len(values)}.get(how, values)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One packet per response: separate small writes wait 40 ms for each other (Nagle's algorithm and delayed ACKs).
    wbufsize = -1
    disable_nagle_algorithm = True
    options: argparse.Namespace
    delays: Any
    numbers = itertools.count()
    lock = threading.Lock()
    slots: threading.Semaphore | None = None
    waiting = [0]  # noqa: RUF012 - one count for all connections
    started = time.monotonic()

    def log_message(self, *_: object) -> None:
        pass

    def respond(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def sleep(self, delay: float) -> bool:
        """Sleep, in a free slot if `--slots` limits them. Return False if `--queue` requests already wait for one."""
        if self.slots is None:
            time.sleep(delay)
            return True
        with self.lock:
            if self.options.queue and self.waiting[0] >= self.options.queue:
                return False
            self.waiting[0] += 1
        with self.slots:
            with self.lock:
                self.waiting[0] -= 1
            time.sleep(delay)
        return True

    def do_GET(self) -> None:
        pages = {"/v1/models": {"data": [{"id": "test"}]}, "/info": info(self.options)}
        self.respond(200, pages[self.path]) if self.path in pages else self.respond(
            404, {"error": {"message": "not here"}}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = next(self.numbers)
        if self.options.die_after and number >= self.options.die_after:
            sys.stderr.write("error: out of memory\n")
            sys.stderr.flush()
            os._exit(9)
        if self.options.fail_after and number >= self.options.fail_after:
            self.respond(500, {"error": {"message": "broken"}})
            return
        with self.lock:
            delay = next(self.delays)
        if (
            self.options.stall_every
            and (now := time.monotonic() - self.started) % self.options.stall_every < self.options.stall_for
        ):
            delay += self.options.stall_for - now % self.options.stall_every
        if not self.sleep(delay):
            self.respond(429, {"error": {"message": "full"}}, {"Retry-After": "1"})
            return
        if self.path == "/v1/rerank":
            results = ranking(body["query"], body["documents"], self.options.drift, self.options.broken)
            usage = {"prompt_tokens": 9 * len(body["documents"])}
            self.respond(200, {"results": results, "usage": usage})
            return
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if self.options.broken == "error" and len(texts) > 1:  # only the quality check sends several texts
            self.respond(500, {"error": {"message": "broken"}})
            return
        if self.path == "/classify":
            rows = [probabilities(text, self.options.drift, self.options.broken) for text in texts]
            found = [{"index": index, "probs": row} for index, row in enumerate(rows)]
            self.respond(200, {"data": found, "usage": {"prompt_tokens": 9 * len(texts)}})
            return
        packed = [
            base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
            for values in (corrupt(vector(t, self.options.drift), self.options.broken, i) for i, t in enumerate(texts))
        ]
        tokens = sum(len(text.split()) + 2 for text in texts)
        data = {
            "data": [{"index": i, "embedding": e} for i, e in enumerate(packed)],
            "usage": {"prompt_tokens": tokens},
        }
        inference = f"{delay * 1e3:.3f}"
        self.respond(
            200,
            data,
            {"x-inferctl-tokens": str(tokens), "x-inferctl-queue-ms": "0.1", "x-inferctl-inference-ms": inference},
        )


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect during a request."""


def info(options: argparse.Namespace) -> dict[str, Any]:
    effective = options.precision if options.precision != "auto" else "fp32"
    return {
        "name": "test",
        "task": options.task,
        "model": {"source": options.model, "sha256": options.sha256, "architecture": "Test", "dimensions": DIMENSIONS},
        "precision": {
            "requested": options.precision,
            "effective": effective,
            "level": "emulated" if effective == "fp16" else "native",
            "reason": "the CPU has no fp16 arithmetic" if effective == "fp16" else "it just sleeps",
            "method": "sleep",
        },
        "device": {"kind": "cpu", "name": "cpu", "hardware": "cpu"},
        "ready_seconds": 0.1,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--announce", type=Path, required=True)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options, _ = parser.parse_known_args()
    if options.refuse and options.precision == options.refuse:
        sys.exit(f"error: {options.precision} cannot run on this device\n\nhint: use another")
    draw = random.Random(1)
    Handler.options = options
    if options.slots:
        Handler.slots = threading.Semaphore(options.slots)
    Handler.delays = (draw.lognormvariate(math.log(options.median_ms / 1e3), options.sigma) for _ in itertools.count())
    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    part = options.announce.with_suffix(".part")
    part.write_text(json.dumps({"url": f"http://127.0.0.1:{server.server_port}", "pid": os.getpid()}))
    part.rename(options.announce)
    server.serve_forever()


if __name__ == "__main__":
    main()
