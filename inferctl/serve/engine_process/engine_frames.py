"""The frames between the API process and an engine process, over a stream socket. They do not use pickle.

    u32 length of the rest | u8 kind | body

Rare frames have JSON bodies, batches and results have raw little-endian arrays. End of file means that the other
process ended.
"""

from __future__ import annotations

import asyncio
import json
import struct
from enum import IntEnum
from io import BufferedIOBase
from typing import Any

import numpy as np

from inferctl.reading.rows import pack_rows, unpack_rows
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult

_HEAD = struct.Struct("<IB")
_BATCH = struct.Struct("<QIBB")  # id, number of sequences, whether `marks` follow `lengths`, `idle`
_RESULT = struct.Struct("<QIidd")  # id, rows, width (see `pack_rows`), seconds, FLOP
_MAX_FRAME = 1 << 29  # below "GET " as a number


class Kind(IntEnum):
    """The kind of a frame, which determines its body."""

    CONFIG = 1  # to the engine: `EngineConfig` as JSON
    READY = 2  # from the engine: `EngineInfo` as JSON
    FATAL = 3  # from the engine, which cannot start: {"message", "hint", "exit_code"}
    BATCH = 4  # to the engine
    RESULT = 5  # from the engine
    PHASE = 7  # from the engine, which starts: what it does now, as a JSON string
    FAILED = 6  # from the engine, for a batch that raised: {"id", "message", "out_of_memory"}


def pack_json(kind: Kind, value: Any) -> bytes:
    """Return a frame with a JSON body."""
    body = json.dumps(value).encode()
    return _HEAD.pack(len(body) + 1, kind) + body


def pack_batch(batch: Batch) -> bytes:
    """Return a BATCH frame."""
    arrays = [batch.lengths, *([] if batch.marks is None else [batch.marks]), batch.tokens]
    head = _BATCH.pack(batch.id, len(batch.lengths), batch.marks is not None, batch.idle)
    body = b"".join([head, *(array.astype("<i4", copy=False).tobytes() for array in arrays)])
    return _HEAD.pack(len(body) + 1, Kind.BATCH) + body


def unpack_batch(body: bytes) -> Batch:
    """Return the batch in the body of a BATCH frame."""
    number, count, has_marks, idle = _BATCH.unpack_from(body)
    values = np.frombuffer(body, dtype="<i4", offset=_BATCH.size)
    lengths, rest = values[:count], values[count:]
    marks, tokens = (rest[:count], rest[count:]) if has_marks else (None, rest)
    return Batch(number, tokens, lengths, marks, bool(idle))


def pack_result(result: BatchResult) -> bytes:
    """Return a RESULT frame."""
    count, width, rows = pack_rows(result.rows)
    ok = result.ok.astype(np.uint8).tobytes()
    size = 1 + _RESULT.size + len(rows) + len(ok)
    head = _RESULT.pack(result.id, count, width, result.seconds, result.flops)
    return b"".join((_HEAD.pack(size, Kind.RESULT), head, rows, ok))


def unpack_result(body: bytes) -> BatchResult:
    """Return the result in the body of a RESULT frame."""
    number, count, width, seconds, flops = _RESULT.unpack_from(body)
    rows, end = unpack_rows(count, width, body, _RESULT.size)
    return BatchResult(number, rows, np.frombuffer(body, dtype=np.uint8, offset=end).astype(np.bool_), seconds, flops)


def receive(stream: BufferedIOBase) -> tuple[Kind, bytes] | None:
    """Wait for the next frame and return it; None if the other process ended."""
    try:
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        size, kind = _HEAD.unpack(head)
        body = stream.read(_checked(size) - 1)
    except ConnectionError:
        return None
    return (Kind(kind), body) if len(body) == size - 1 else None


async def receive_async(reader: asyncio.StreamReader) -> tuple[Kind, bytes] | None:
    """Return the next frame; None if the other process ended."""
    try:
        size, kind = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        return Kind(kind), await reader.readexactly(_checked(size) - 1)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _checked(size: int) -> int:
    if not 1 <= size <= _MAX_FRAME:
        raise ValueError(f"invalid frame of {size} bytes: the two processes do not use the same version")
    return size
