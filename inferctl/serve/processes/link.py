"""The socket between an API process and the backend, which carries messages in frames. They do not use pickle.

    u32 bytes of the rest | u32 bytes of the head | head: JSON, [kind, fields] | payload: arrays

Each kind is a method of the receiver, whose parameters are the fields. Both ends are processes of one server, so they
always have the same version. A large frame is sent in frames of the kind `part`. Between them, others have their turn.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import orjson

_HEAD = struct.Struct("<II")
_MAX_FRAME = 1 << 30
PART_BYTES = 1 << 18
_PART = "part"

Buffer: TypeAlias = bytes | memoryview
# Kind -> what takes its fields, and the payload if there is one.
Handlers: TypeAlias = Mapping[str, Callable[..., object]]


def frame(kind: str, *fields: Any, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the parts of a frame. The payload is not copied."""
    head = orjson.dumps((kind, *fields), option=orjson.OPT_SERIALIZE_NUMPY)
    size = len(head) + sum(map(len, payload))
    return [_HEAD.pack(4 + size, len(head)) + head, *payload]


class Link(asyncio.Protocol):
    """One end of the socket. What is sent in one turn of the event loop is sent together.

    `handlers`: take what arrives. `on_lost` is called when the other process ended.
    """

    def __init__(self, handlers: Handlers, on_lost: Callable[[], None]) -> None:
        self._handlers, self._on_lost = {**handlers, _PART: self._part}, on_lost
        self._transport: asyncio.Transport | None = None
        self._received, self._parts = b"", bytearray()
        self._unsent: list[Buffer] = []
        self._unsent_bytes, self._flushes = 0, False
        self._large: deque[Sequence[Buffer]] = deque()  # frames that are sent in parts, one after the other
        self.large_bytes = 0  # of them
        self._sending: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def send(self, kind: str, *fields: Any, payload: Sequence[Buffer] = (), soon: bool = True) -> None:
        """Send a message at the end of this turn of the event loop, or unless it must arrive `soon`, with the next one.

        After the end of the link, it is dropped.
        """
        self.send_frame(frame(kind, *fields, payload=payload), soon=soon)

    def send_frame(self, parts: Sequence[Buffer], *, soon: bool = True) -> None:
        """Send a frame, as `send` does."""
        self._unsent += parts
        self._unsent_bytes += sum(map(len, parts))
        if soon and not self._flushes:
            self._flushes = True
            asyncio.get_running_loop().call_soon(self.flush)

    @property
    def buffered(self) -> int:
        """Bytes that the other process has not read."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return waiting + self._unsent_bytes

    def send_large(self, parts: Sequence[Buffer]) -> None:
        """Send a frame in parts, as fast as the other process reads them. What is sent meanwhile does not wait."""
        self._large.append(parts)
        self.large_bytes += sum(map(len, parts))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send_parts())

    async def _send_parts(self) -> None:
        while self._large:
            for part in _parts(self._large[0]):
                await self._writable.wait()
                self.send(_PART, payload=[part])
                await asyncio.sleep(0)
            self.large_bytes -= sum(map(len, self._large.popleft()))

    def flush(self) -> None:
        """Send what waits, also for the connection."""
        self._flushes = False
        if self._transport is None:
            return
        if self._unsent and not self._transport.is_closing():
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
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Part of `asyncio.Protocol`."""
        received = self._received + data if self._received else data
        start = 0
        while len(received) - start >= _HEAD.size:
            size, head_size = _HEAD.unpack_from(received, start)
            if size > _MAX_FRAME:
                raise ValueError(f"invalid frame of {size} bytes")
            if len(received) < (end := start + 4 + size):
                break
            self._take(received[start + _HEAD.size : end], head_size)
            start = end
        self._received = received[start:]

    def _take(self, body: bytes, head_size: int) -> None:
        kind, *fields = orjson.loads(body[:head_size])
        if len(body) > head_size:
            fields.append(body[head_size:])
        self._handlers[kind](*fields)

    def _part(self, body: bytes) -> None:
        self._parts += body
        size, head_size = _HEAD.unpack_from(self._parts)
        if len(self._parts) == 4 + size:
            whole, self._parts = bytes(memoryview(self._parts)[_HEAD.size :]), bytearray()
            self._take(whole, head_size)

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
