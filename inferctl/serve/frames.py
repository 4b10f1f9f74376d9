"""Frames between the API process and an engine process, over a stream socket: length, kind, body. No pickle.

    u32 length of the rest | u8 kind | body

JSON bodies for what is said once, raw little-endian arrays for what is said often. End of file means that the other side died.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from enum import IntEnum
from typing import Any

import numpy as np

from inferctl.serve.types import Batch, BatchResult

_HEAD = struct.Struct("<IB")
_BATCH = struct.Struct("<QII")  # id, sequences, whether exact
_RESULT = struct.Struct("<QIId")
_MAX_FRAME = 1 << 28


class Kind(IntEnum):
    """What a frame carries."""

    CONFIG = 1  # to the engine: EngineConfig as JSON
    READY = 2  # from the engine: EngineInfo as JSON
    FATAL = 3  # from the engine: it cannot start; {"message", "hint", "exit_code"}
    BATCH = 4  # to the engine
    RESULT = 5  # from the engine
    FAILED = 6  # from the engine: one batch failed; {"id", "message", "out_of_memory"}


def pack_json(kind: Kind, value: Any) -> bytes:
    """A whole frame with a JSON body."""
    body = json.dumps(value).encode()
    return _HEAD.pack(len(body) + 1, kind) + body


def pack_batch(batch: Batch) -> bytes:
    """A whole BATCH frame."""
    count, lengths, tokens = len(batch.lengths), batch.lengths.tobytes(), batch.tokens.tobytes()
    size = 1 + _BATCH.size + len(lengths) + len(tokens)
    return b"".join((_HEAD.pack(size, Kind.BATCH), _BATCH.pack(batch.id, count, batch.exact), lengths, tokens))


def unpack_batch(body: bytes) -> Batch:
    """The batch in the body of a BATCH frame."""
    number, count, exact = _BATCH.unpack_from(body)
    values = np.frombuffer(body, dtype="<i4", offset=_BATCH.size)
    return Batch(number, values[count:], values[:count], bool(exact))


def pack_result(result: BatchResult) -> bytes:
    """A whole RESULT frame."""
    rows, width = result.vectors.shape
    vectors, ok = np.ascontiguousarray(result.vectors, dtype="<f4").tobytes(), result.ok.astype(np.uint8).tobytes()
    size = 1 + _RESULT.size + len(vectors) + len(ok)
    return b"".join((_HEAD.pack(size, Kind.RESULT), _RESULT.pack(result.id, rows, width, result.seconds), vectors, ok))


def unpack_result(body: bytes) -> BatchResult:
    """The result in the body of a RESULT frame."""
    number, rows, width, seconds = _RESULT.unpack_from(body)
    vectors = np.frombuffer(body, dtype="<f4", count=rows * width, offset=_RESULT.size).reshape(rows, width)
    ok = np.frombuffer(body, dtype=np.uint8, offset=_RESULT.size + vectors.nbytes).astype(np.bool_)
    return BatchResult(number, vectors, ok, seconds)


def receive(connection: socket.socket) -> tuple[Kind, bytes] | None:
    """The next frame, blocking; None when the other side is gone."""
    head = _exactly(connection, _HEAD.size)
    if head is None:
        return None
    size, kind = _HEAD.unpack(head)
    body = _exactly(connection, _checked(size) - 1)
    return None if body is None else (Kind(kind), body)


async def receive_async(reader: asyncio.StreamReader) -> tuple[Kind, bytes] | None:
    """The next frame; None when the other side is gone."""
    try:
        size, kind = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        return Kind(kind), await reader.readexactly(_checked(size) - 1)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _checked(size: int) -> int:
    if not 1 <= size <= _MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes: the two sides do not speak the same version")
    return size


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        try:
            count = connection.recv_into(view[got:])
        except ConnectionError:
            return None
        if not count:
            return None
        got += count
    return bytes(buffer)
