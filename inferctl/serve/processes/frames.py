"""The frames between an API process and the backend, over a stream socket. They do not use pickle.

    u32 length of the rest | u8 kind | body

Rare frames have JSON bodies. Those of each request have fixed fields, then arrays; all numbers are little-endian. The
ids of requests count per API process. Both ends are processes of one server, so they always have the same version.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from inferctl.reading.rows import Tokens, row_buffers, unpack_rows
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.scheduling.dispatcher import RequestResult
from inferctl.tenancy.access.limits import Quota

_HEAD = struct.Struct("<IB")
_SUBMIT = struct.Struct("<IBIII")  # id, flags, bytes of the key id and of the cache directives, sequences
_RESULT = struct.Struct(
    "<IBIiIddd"
)  # id, flags, rows, width (see `pack_rows`), cached tokens, seconds: engine, queue, inference
_QUOTAS = struct.Struct("<6q")
_MOST = (1 << 63) - 1  # a limit can be any number
_BULK, _TENANT, _MARKS = 1, 2, 4
_REQUESTS, _TOKENS = 1, 2  # which quotas a result has
_MAX_FRAME = 1 << 30
# A large frame is sent in parts of this size. Between them, others have their turn.
PART_BYTES = 1 << 18
_MOST_ID = (1 << 32) - 1


class Kind(IntEnum):
    """The kind of a frame, which determines its body: numbers are u32, what is in brackets is JSON."""

    # To the backend.
    HELLO = 1  # the API process can take connections: empty
    SUBMIT = 3  # a request
    ADMIT = 4  # [id, key id, bulk, shared]: may a large body be read?
    CANCEL = 5  # id: the client left
    CLOSE = 6  # id, give_back, computed, tokens in vain: the end of a charged request
    CHARGE = 7  # [id, [key id, its limits], size]: charge a request, once, and the bytes of its body
    PAGE = 8  # [id, path]: what to answer
    STATS = 9  # the samples of the metrics, as JSON: each second, and after SCRAPE
    TAKEN = 10  # id: a connection was taken over
    GONE = 11  # count: connections that ended
    ALIVE = 12  # the event loop runs: empty
    REFUSED = 13  # id: a connection could not be taken over
    FATAL = 15  # [message, hint]: why the process cannot start, as JSON
    # To the API process.
    WELCOME = 32  # what it needs to start, as JSON
    RESULT = 33
    REJECT = 34  # the error of a request as JSON, see `pack_reject`
    ADMITTED = 35  # [id, what is left of the limits]
    ENDED = 36  # [id, tokens, seconds]: what engines computed for a cancelled request
    STATE = 37  # the state of the server, as JSON
    REVOKED = 38  # ids of revoked keys, as JSON
    DRAIN = 39  # take no more connections, and end after the responses in flight: empty
    SCRAPE = 40  # send STATS now: empty
    ANSWER = 41  # [id, status, body, media type]
    PART = 42  # the next bytes of a large frame


Quotas = tuple[Quota | None, Quota | None]
Buffer: TypeAlias = bytes | memoryview


class Submission(NamedTuple):
    """The body of a SUBMIT frame: one request whose inputs are tokenized. `key_id`: empty for none."""

    id: int
    key_id: str
    bulk: bool
    shared: bool  # whether the key is a tenant, among whom the queue is shared
    directives: bytes
    sequences: list[Tokens]
    marks: list[int] | None


class Reply(NamedTuple):
    """The body of a RESULT frame."""

    id: int
    result: RequestResult
    cached_tokens: int
    engine_seconds: float
    quotas: Quotas | None


def ids() -> Iterator[int]:
    """Yield the ids of requests or connections: 1, 2, ..., and 1 again before one needs more than a u32.

    At 10,000 requests/s, that is after five days. No request takes as long.
    """
    while True:
        yield from range(1, _MOST_ID + 1)


def pack(kind: Kind, body: bytes = b"") -> bytes:
    """Return a frame."""
    return _HEAD.pack(len(body) + 1, kind) + body


def pack_json(kind: Kind, value: Any) -> bytes:
    """Return a frame with a JSON body."""
    return pack(kind, json.dumps(value).encode())


def pack_numbers(kind: Kind, *values: int) -> bytes:
    """Return a frame whose body is numbers (u32)."""
    return pack(kind, struct.pack(f"<{len(values)}I", *values))


def unpack_numbers(body: bytes) -> tuple[int, ...]:
    """Return the numbers in the body of a frame."""
    return struct.unpack(f"<{len(body) // 4}I", body)


def pack_submit(submission: Submission) -> bytes:
    """Return a SUBMIT frame."""
    each, marks, key_id = submission, submission.marks, submission.key_id.encode()
    flags = _BULK * each.bulk | _TENANT * each.shared | _MARKS * (marks is not None)
    head = _SUBMIT.pack(each.id, flags, len(key_id), len(each.directives), len(each.sequences))
    lengths = np.array([len(sequence) for sequence in each.sequences], dtype="<i4")
    arrays = [lengths, *([] if marks is None else [np.array(marks, dtype="<i4")]), *each.sequences]
    return pack(Kind.SUBMIT, b"".join([head, key_id, each.directives, *(array.tobytes() for array in arrays)]))


def unpack_submit(body: bytes) -> Submission:
    """Return what `pack_submit` packed."""
    number, flags, key_size, size, count = _SUBMIT.unpack_from(body)
    directives = _SUBMIT.size + key_size
    start = directives + size
    values = np.frombuffer(body[start:], dtype="<i4")
    lengths, rest = values[:count], values[count:]
    marks = None
    if flags & _MARKS:
        marks, rest = rest[:count].tolist(), rest[count:]
    sequences = [rest] if count == 1 else np.split(rest, np.cumsum(lengths)[:-1])
    key_id = body[_SUBMIT.size : directives].decode()
    shared = bool(flags & _TENANT)
    return Submission(number, key_id, bool(flags & _BULK), shared, body[directives:start], sequences, marks)


def pack_result(reply: Reply) -> list[Buffer]:
    """Return the parts of a RESULT frame, of which the rows are not copied."""
    count, width, rows = row_buffers(reply.result.rows)
    flags, quotas = _pack_quotas(reply.quotas)
    times = reply.engine_seconds, reply.result.queue_seconds, reply.result.inference_seconds
    head = _RESULT.pack(reply.id, flags, count, width, reply.cached_tokens, *times)
    size = 1 + len(head) + len(quotas) + sum(map(len, rows))
    return [_HEAD.pack(size, Kind.RESULT) + head + quotas, *rows]


def unpack_result(body: bytes) -> Reply:
    """Return what `pack_result` packed."""
    number, flags, count, width, cached, engine_s, queue_s, inference_s = _RESULT.unpack_from(body)
    quotas = _unpack_quotas(flags, body, _RESULT.size)
    rows, _ = unpack_rows(count, width, body, _RESULT.size + _QUOTAS.size * (flags > 0))
    return Reply(number, RequestResult(rows, (), queue_s, inference_s), cached, engine_s, quotas)


def pack_reject(
    number: int, error: ApiError, quotas: Quotas | None, computed: tuple[int, int, float] = (0, 0, 0.0)
) -> bytes:
    """Return a REJECT frame. `computed`: input tokens, cached tokens, and seconds of engines."""
    fields = {"status": error.status, "message": error.message, "code": error.code, "param": error.param}
    more = {"headers": error.headers, "quotas": quotas, "computed": computed}
    return pack_json(Kind.REJECT, {"id": number, **fields, **more})


def unpack_reject(body: bytes) -> tuple[int, ApiError, Quotas | None, tuple[int, int, float]]:
    """Return the id of a REJECT frame, and what `pack_reject` packed."""
    found = json.loads(body)
    number, quotas, computed = found.pop("id"), found.pop("quotas"), found.pop("computed")
    error = ApiError(found.pop("status"), found.pop("message"), **found)
    return number, error, quotas and tuple(quota and tuple(quota) for quota in quotas), tuple(computed)


class Link(asyncio.Protocol):
    """One end of the socket. Frames of one turn of the event loop are sent together.

    `on_frame(kind, body)` gets each frame, and `on_lost` is called when the other process ended.
    """

    def __init__(self, on_frame: Callable[[Kind, bytes], None], on_lost: Callable[[], None]) -> None:
        self._on_frame, self._on_lost = on_frame, on_lost
        self._transport: asyncio.Transport | None = None
        self._received, self._parts = bytearray(), bytearray()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._large: deque[Sequence[Buffer]] = deque()  # frames that are sent in parts, one after the other
        self.large_bytes = 0  # of them
        self._sending: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def send(self, frame: bytes) -> None:
        """Send a frame at the end of this turn of the event loop. After the end of the link, it is dropped."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        self._unsent.append(frame)
        self._unsent_bytes += len(frame)

    @property
    def buffered(self) -> int:
        """Bytes that the other process has not read."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return waiting + self._unsent_bytes

    def send_large(self, frame: Sequence[Buffer]) -> None:
        """Send a frame in parts, as fast as the other process reads them. What is sent meanwhile does not wait."""
        self._large.append(frame)
        self.large_bytes += sum(map(len, frame))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send_parts())

    async def _send_parts(self) -> None:
        while self._large:
            for part in _parts(self._large[0]):
                await self._writable.wait()
                self.send(pack(Kind.PART, part))
                await asyncio.sleep(0)
            self.large_bytes -= sum(map(len, self._large.popleft()))

    def flush(self) -> None:
        """Send what waits."""
        if self._unsent and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent, self._unsent_bytes = [], 0

    def close(self) -> None:
        """End the link after what was sent."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)  # that of uvloop has no base class

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        received = self._received
        received += data
        start = 0
        while len(received) - start >= _HEAD.size:
            size, kind = _HEAD.unpack_from(received, start)
            if size > _MAX_FRAME:
                raise ValueError(f"invalid frame of {size} bytes")
            end = start + 4 + size
            if len(received) < end:
                break
            body = bytes(received[start + _HEAD.size : end])
            if kind == Kind.PART:
                self._part_received(body)
            else:
                self._on_frame(Kind(kind), body)
            start = end
        del received[:start]

    def _part_received(self, body: bytes) -> None:
        self._parts += body
        size, kind = _HEAD.unpack_from(self._parts)
        if len(self._parts) == 4 + size:
            frame, self._parts = self._parts, bytearray()
            self._on_frame(Kind(kind), bytes(memoryview(frame)[_HEAD.size :]))

    def pause_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Part of `asyncio.Protocol`."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Part of `asyncio.Protocol`."""
        if self._sending is not None:
            self._sending.cancel()
        self._on_lost()


def _parts(frame: Sequence[Buffer]) -> Iterator[bytes]:
    """Yield the bytes of a frame, about `PART_BYTES` at a time."""
    found: list[Buffer] = []
    size = 0
    for buffer in frame:
        for start in range(0, len(buffer), PART_BYTES):
            found.append(buffer[start : start + PART_BYTES])
            size += len(found[-1])
            if size >= PART_BYTES:
                yield b"".join(found)
                found, size = [], 0
    if found:
        yield b"".join(found)


def _pack_quotas(quotas: Quotas | None) -> tuple[int, bytes]:
    """Return which quotas there are, and their numbers."""
    requests, tokens = quotas or (None, None)
    flags = _REQUESTS * (requests is not None) | _TOKENS * (tokens is not None)
    numbers = (*(requests or (0, 0, 0)), *(tokens or (0, 0, 0)))
    return flags, _QUOTAS.pack(*(min(number, _MOST) for number in numbers)) if flags else b""


def _unpack_quotas(flags: int, body: bytes, start: int) -> Quotas | None:
    if not flags:
        return None
    a, b, c, *tokens = _QUOTAS.unpack_from(body, start)
    return (a, b, c) if flags & _REQUESTS else None, (tokens[0], tokens[1], tokens[2]) if flags & _TOKENS else None
