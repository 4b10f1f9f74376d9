"""A generation server that emits tokens at known times, for tests of the load generator.

    python token_server.py --announce FILE --truth FILE
                           [--first-ms 40 --gap-ms 10 --sigma 0.3 --seed 1]
                           [--tokens-per-event 1,3] [--pairs] [--split] [--reasoning 4]
                           [--usage continuous|final|finish|none] [--cached-tokens 0] [--eos-after N] [--strict]
                           [--no-tokenize]
                           [--fault error|silent|unfinished|reset --fault-share 1 --fault-after 3]

It responds to `POST /v1/chat/completions` and `POST /v1/completions` with a stream: a role chunk at once (chat), the
tokens at drawn times, a chunk with the finish reason, a usage chunk, `[DONE]`. Times are log-normal around `--first-ms`
and `--gap-ms`. The server logs the actual times, not the drawn ones. For each event with tokens it logs four
little-endian uint64: two numbers that the request carries (the prefix that the load generator adds to each prompt), the
nanoseconds from reading the request to writing the event, and its tokens. It writes the log when it ends (SIGTERM).

- `--tokens-per-event 1,3`: events have one and three tokens in turn. `--pairs`: two events in one write. `--split`:
  each event in two writes. `--reasoning 4`: the first four tokens are in the reasoning channel.
- `--usage`: usage in every chunk, in a last one of its own, in the one with the finish reason, or never.
  `--cached-tokens -1`: usage without cached tokens. `--eos-after`: end of text after N tokens, unless the
  request has `ignore_eos`. `--strict`: reject keys that the OpenAI API does not have.
- `--fault`: after some tokens, a share of the streams has an error event, ends silently, ends without a finish reason,
  or loses its connection.

`POST /tokenize` returns the tokens of a `prompt`, as vLLM does: the end of a line, a digit, or up to four other
characters. The usage counts the same tokens, and four more per message. `--no-tokenize`: without that endpoint.

Some tokens contain U+2028, which is legal in JSON and no line break of an event stream.
"""

from __future__ import annotations

import argparse
import array
import json
import math
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import known_server
import numpy as np
import numpy.typing as npt

NUMBERS = re.compile(rb"(\d{6}) (\d+)")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = re.compile(r"\n| ?\d| ?[^\s\d]{1,4}")
EXTENSIONS = ("ignore_eos", "min_tokens")
SPLIT_S = 0.002
Truth = dict[int, list[tuple[float, int]]]


def run_server(*options: str) -> Any:
    """Start a server; see `known_server.run_server`. `truth(server.log, serial)` reads its log after it has ended."""
    return known_server.run_server(*options, script=__file__)


def truth(log: bytes, serial: int) -> Truth:
    """Return (ms since the request was read, tokens) of each event with tokens, by the index of the request."""
    rows: npt.NDArray[np.uint64] = np.frombuffer(log, "<u8").reshape(-1, 4)
    found: Truth = {}
    for number, index, ns, tokens in rows.tolist():
        if number == serial:
            found.setdefault(index, []).append((ns / 1e6, tokens))
    return found


def tokens_of(text: str) -> list[str]:
    """Return the tokens of a text."""
    return TOKEN.findall(text)


class Connection(known_server.Connection):
    """A connection of one client. It sends one stream at a time."""

    options: argparse.Namespace
    log: array.array[int]
    random: random.Random

    def __init__(self) -> None:
        self.bare, self.content, self.loop = False, b"", known_server.asyncio.get_running_loop()
        self.closed = False

    def connection_lost(self, _: Exception | None) -> None:
        self.closed = True

    def handle(self, request: bytes, end: int, read_ns: int) -> None:
        """Respond with a stream, or with 400 to keys that a strict server rejects."""
        if request.startswith(b"POST /tokenize ") and not self.options.no_tokenize:
            found = [0 if text == "\n" else len(text) for text in tokens_of(json.loads(request[end + 4 :])["prompt"])]
            content = json.dumps({"tokens": found, "count": len(found)}).encode()
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))
            return
        if b"completions " not in request[: request.index(b"\r\n")]:
            self.transport.write(known_server.NOT_FOUND)
            return
        body = json.loads(request[end + 4 :])
        streams = {key: True for key in body if key in EXTENSIONS}
        streams |= {key: True for key in body.get("stream_options", {}) if key != "include_usage"}
        if self.options.strict and streams:
            content = json.dumps({"error": {"message": f"unknown keys: {', '.join(streams)}"}}).encode()
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))
            return
        numbers = NUMBERS.search(request, end)
        self.serial, self.index = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        self.read_ns, self.chat = read_ns, request.startswith(b"POST /v1/chat/")
        self.transport.write(HEAD)
        self.steps = self.plan(body)
        self.advance()

    def delay(self, median_ms: float) -> float:
        return self.random.lognormvariate(math.log(median_ms / 1e3), self.options.sigma)

    def plan(self, body: dict[str, Any]) -> Iterator[tuple[float, bytes, tuple[int, ...]]]:
        """Yield (seconds to wait, bytes to write, tokens of each event in them)."""
        options = self.options
        limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        natural = options.eos_after if options.eos_after and not body.get("ignore_eos") else limit
        total = min(limit, natural)
        prompt = len(tokens_of(body.get("prompt") or ""))
        prompt += sum(len(tokens_of(message["content"])) + 4 for message in body.get("messages") or ())
        wanted = body.get("stream_options") or {}
        continuous = options.usage == "continuous" and wanted.get("continuous_usage_stats")

        def usage(done: int) -> dict[str, Any]:
            counts = {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}
            cached = {"cached_tokens": options.cached_tokens} if options.cached_tokens >= 0 else None
            return {**counts, "prompt_tokens_details": cached}

        def event(choices: list[Any], done: int, last: bool = False) -> bytes:
            chunk: dict[str, Any] = {"id": "1", "object": "chunk", "choices": choices}
            if continuous or last:
                chunk["usage"] = usage(done)
            return b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False).encode()

        def choice(text: str, done: int, finish: str | None = None) -> bytes:
            with_usage = bool(finish) and options.usage == "finish"
            if not self.chat:
                return event([{"index": 0, "text": text, "finish_reason": finish}], done, with_usage)
            channel = "reasoning_content" if done <= options.reasoning else "content"
            delta = {channel: text} if text else {}
            return event([{"index": 0, "delta": delta, "finish_reason": finish}], done, with_usage)

        if self.chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield 0.0, b": ping\n\n" + event([role], 0), ()
        sizes = [int(size) for size in options.tokens_per_event.split(",")]
        fails = options.fault and self.random.random() < options.fault_share
        done, number, waiting, waiting_tokens = 0, 0, b"", ()
        wait = self.delay(options.first_ms)
        while done < total:
            size = min(sizes[number % len(sizes)], total - done)
            done, number = done + size, number + 1
            text = "\u2028" if number % 5 == 0 else " word"
            waiting, waiting_tokens = waiting + choice(text * size, done), (*waiting_tokens, size)
            if options.pairs and number % 2 and done < total:
                continue
            yield wait, waiting, waiting_tokens
            waiting, waiting_tokens, wait = b"", (), self.delay(options.gap_ms)
            if fails and number >= options.fault_after:
                if options.fault == "error":
                    error = {"error": {"message": "engine lost", "type": "server_error", "code": 500}}
                    yield wait, b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(error).encode(), ()
                elif options.fault == "unfinished":
                    yield wait, b"data: [DONE]\n\n", ()
                elif options.fault == "reset":
                    self.transport.abort()
                return
        yield 0.0, choice("", done, "length" if total == limit else "stop"), ()
        if options.usage in ("continuous", "final") and wanted.get("include_usage"):
            yield 0.0, event([], done, last=True), ()
        yield 0.0, b"data: [DONE]\n\n", ()

    def advance(self) -> None:
        """Write all steps that are due, and set a timer for the next one."""
        for wait, content, tokens in self.steps:
            if wait:
                self.loop.call_later(wait, self.write, content, tokens)
                return
            self.send(content)
        if not self.closed:
            self.transport.write(b"0\r\n\r\n")

    def write(self, content: bytes, tokens: tuple[int, ...]) -> None:
        if self.closed:
            return
        if self.options.split and tokens:
            middle = len(content) // 2
            self.send(content[:middle])
            self.loop.call_later(SPLIT_S, self.finish, content[middle:], tokens)
        else:
            self.finish(content, tokens)

    def finish(self, content: bytes, tokens: tuple[int, ...]) -> None:
        """Write the last bytes of a step, log the time, and go on."""
        if self.closed:
            return
        now = time.monotonic_ns() - self.read_ns
        self.send(content)
        for count in tokens:
            self.log.extend((self.serial, self.index, now, count))
        self.advance()

    def send(self, content: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(content), content))


def main() -> None:
    parser = known_server.argument_parser(__doc__)
    parser.add_argument("--first-ms", type=float, default=40.0)
    parser.add_argument("--gap-ms", type=float, default=10.0)
    parser.add_argument("--sigma", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens-per-event", default="1")
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--reasoning", type=int, default=0)
    parser.add_argument("--usage", choices=("continuous", "final", "finish", "none"), default="continuous")
    parser.add_argument("--cached-tokens", type=int, default=0)
    parser.add_argument("--eos-after", type=int, default=0)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--no-tokenize", action="store_true")
    parser.add_argument("--fault", choices=("error", "silent", "unfinished", "reset"))
    parser.add_argument("--fault-share", type=float, default=1.0)
    parser.add_argument("--fault-after", type=int, default=3)
    Connection.options = options = parser.parse_args()
    Connection.log, Connection.random = array.array("Q"), random.Random(options.seed)
    known_server.run(options, Connection, Connection.log)


if __name__ == "__main__":
    main()
