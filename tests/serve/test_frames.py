"""Frames are unchanged by the socket, and the end of the other process is detected."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.reading.rows import finite_rows
from inferctl.serve.engine_process import engine_frames
from inferctl.serve.engine_process.engine_frames import Kind
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@given(LENGTHS, st.integers(0, 2**63), st.booleans())
def test_a_batch_is_unchanged_by_packing(lengths: list[int], number: int, segments: bool) -> None:
    tokens, sizes = np.arange(sum(lengths), dtype=np.int32), np.array(lengths, dtype=np.int32)
    marks = sizes // 2 if segments else None
    arrived = engine_frames.unpack_batch(engine_frames.pack_batch(Batch(number, tokens, sizes, marks, segments))[5:])
    assert (None if arrived.marks is None else arrived.marks.tolist()) == (None if marks is None else marks.tolist())
    assert (arrived.id, arrived.idle) == (number, segments)
    assert arrived.lengths.tolist() == lengths
    assert arrived.tokens.tolist() == tokens.tolist()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=20), st.booleans())
def test_a_result_is_bitwise_unchanged_by_packing(widths: list[int], equal: bool) -> None:
    draw = np.random.default_rng(len(widths)).standard_normal
    rows: Any = [draw(width).astype(np.float32) for width in widths]
    if equal:
        rows = draw((len(widths), 5)).astype(np.float32)
        rows[0, 0] = np.nan
    ok = finite_rows(rows)
    assert ok.tolist() == [not np.isnan(row).any() for row in rows]
    arrived = engine_frames.unpack_result(engine_frames.pack_result(BatchResult(7, rows, ok, 0.25))[5:])
    assert [row.tobytes() for row in arrived.rows] == [row.tobytes() for row in rows]
    assert isinstance(arrived.rows, list) == (len({len(row) for row in rows}) > 1)
    assert arrived.ok.tolist() == ok.tolist()
    assert arrived.seconds == 0.25


def test_a_frame_larger_than_the_socket_buffer_is_received_completely() -> None:
    parent, child = socket.socketpair()
    frame = engine_frames.pack_json(Kind.FAILED, {"message": "x" * 3_000_000})
    sender = threading.Thread(target=child.sendall, args=(frame,))
    sender.start()
    received = engine_frames.receive(parent.makefile("rb"))
    sender.join()
    assert received is not None
    assert received[0] is Kind.FAILED
    assert len(received[1]) == len(frame) - 5
    parent.close()
    child.close()


@pytest.mark.parametrize("sent", [b"", b"\x05\x00", engine_frames.pack_json(Kind.READY, {"a": 1})[:-1]])
def test_end_of_file_within_a_frame_returns_none(sent: bytes) -> None:
    parent, child = socket.socketpair()
    child.sendall(sent)
    child.close()
    assert engine_frames.receive(parent.makefile("rb")) is None
    parent.close()


def test_the_asyncio_reader_equals_the_blocking_one() -> None:
    async def read() -> list[object]:
        reader = asyncio.StreamReader()
        reader.feed_data(engine_frames.pack_json(Kind.READY, {"a": 1}) + b"\x00")
        reader.feed_eof()
        return [await engine_frames.receive_async(reader), await engine_frames.receive_async(reader)]

    assert asyncio.run(read()) == [(Kind.READY, b'{"a": 1}'), None]


def test_a_frame_of_another_protocol_is_an_error() -> None:
    parent, child = socket.socketpair()
    child.sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ValueError, match="same version"):
        engine_frames.receive(parent.makefile("rb"))
    parent.close()
    child.close()
