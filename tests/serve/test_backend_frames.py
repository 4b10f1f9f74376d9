"""Frames between API processes and the backend: unpacked as packed, and complete however the socket cuts them."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.processes import frames
from inferctl.serve.processes.api_process_link import ApiProcessLink
from inferctl.serve.processes.frames import Kind, Link, Reply, Submission
from inferctl.serve.processes.remote import RemoteBackend
from inferctl.serve.scheduling.dispatcher import RequestResult

U32 = st.integers(0, 2**32 - 1)
I32 = st.integers(-(2**31), 2**31 - 1)
SECONDS = st.floats(allow_nan=False)
QUOTA = st.none() | st.tuples(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 100))
QUOTAS = st.tuples(QUOTA, QUOTA).filter(any)
SEQUENCES = st.lists(st.lists(I32, min_size=1, max_size=20), min_size=1, max_size=12)
HEAD = 5


def body(frame: bytes) -> bytes:
    return frame[HEAD:]


@given(U32, st.text(max_size=9), st.booleans(), st.booleans(), st.binary(max_size=40), SEQUENCES, st.booleans())
def test_a_request_is_unchanged(
    number: int, key_id: str, bulk: bool, shared: bool, directives: bytes, rows: list[list[int]], pairs: bool
) -> None:
    starts = [len(row) // 2 for row in rows] if pairs else None
    sent = Submission(number, key_id, bulk, shared, directives, [np.array(row, np.int32) for row in rows], starts)
    arrived = frames.unpack_submit(body(frames.pack_submit(sent)))
    assert [row.tolist() for row in arrived.sequences] == rows
    assert arrived._replace(sequences=[]) == sent._replace(sequences=[])


@given(U32, st.lists(st.integers(0, 9), max_size=9), U32, SECONDS, SECONDS, SECONDS, st.none() | QUOTAS)
def test_a_result_is_bitwise_unchanged(
    number: int, widths: list[int], cached: int, engine: float, queue: float, inference: float, quotas: Any
) -> None:
    rows: Any = [np.random.default_rng(width).standard_normal(width).astype(np.float32) for width in widths]
    if len(set(widths)) < 2:
        rows = np.array(rows, dtype=np.float32).reshape(len(rows), -1) if rows else np.empty((0, 3), np.float32)
    sent = Reply(number, RequestResult(rows, (), queue, inference), cached, engine, quotas)
    arrived = frames.unpack_result(body(b"".join(frames.pack_result(sent))))
    assert [row.tobytes() for row in arrived.result.rows] == [row.tobytes() for row in rows]
    assert arrived._replace(result=arrived.result._replace(rows=rows)) == sent


@given(
    U32,
    st.integers(400, 599),
    st.text(),
    st.none() | st.text(),
    st.none() | st.text(),
    st.dictionaries(st.text(), st.text()),
    st.none() | QUOTAS,
    st.tuples(U32, U32, SECONDS),
)
def test_an_error_is_unchanged(
    number: int, status: int, message: str, code: Any, param: Any, headers: dict[str, str], quotas: Any, used: Any
) -> None:
    error = ApiError(status, message, code=code, param=param, headers=headers)
    frame = frames.pack_reject(number, error, quotas, used)
    arrived_number, arrived, arrived_quotas, arrived_used = frames.unpack_reject(body(frame))
    assert vars(arrived) == vars(error)
    assert (arrived_number, arrived_quotas, arrived_used) == (number, quotas, used)


@given(st.lists(U32, max_size=9), st.text())
def test_the_other_frames_are_unchanged(numbers: list[int], path: str) -> None:
    assert frames.unpack_numbers(body(frames.pack_numbers(Kind.CLOSE, *numbers))) == tuple(numbers)
    assert json.loads(body(frames.pack_json(Kind.STATE, {path: numbers}))) == {path: numbers}


def _each_kind() -> list[tuple[Kind, bytes]]:
    """Return one frame of each kind."""
    tokens = [np.arange(3, dtype=np.int32)]
    result = RequestResult(np.ones((2, 3), np.float32), (), 0.1, 0.2)
    special = {
        Kind.SUBMIT: frames.pack_submit(Submission(1, "a", False, True, b"no-store", tokens, [1])),
        Kind.RESULT: b"".join(frames.pack_result(Reply(1, result, 3, 0.5, ((9, 8, 7), None)))),
        Kind.REJECT: frames.pack_reject(1, ApiError(429, "full"), None),
        Kind.ADMITTED: frames.pack_json(Kind.ADMITTED, [1, None]),
        Kind.HELLO: frames.pack(Kind.HELLO),
    }
    found = {kind: special.get(kind) or frames.pack_numbers(kind, 1, 2) for kind in Kind if kind is not Kind.PART}
    return list(found.items())


def test_frames_that_are_cut_at_any_byte_arrive_once_and_in_order() -> None:
    sent = _each_kind()
    stream = b"".join(frame for _, frame in sent)
    expected = [(kind, body(frame)) for kind, frame in sent]
    for cut in range(len(stream) + 1):
        arrived: list[tuple[Kind, bytes]] = []
        link = Link(lambda *frame, arrived=arrived: arrived.append(frame), lambda: None)
        link.data_received(stream[:cut])
        link.data_received(stream[cut:])
        assert arrived == expected, cut
    arrived = []
    link = Link(lambda *frame: arrived.append(frame), lambda: None)
    for number in range(len(stream)):
        link.data_received(stream[number : number + 1])
    assert arrived == expected


def test_a_large_frame_waits_for_its_reader_and_holds_up_no_other() -> None:
    """Each result that an API process had not read was in the memory of the backend: 4 GB of 64 requests."""
    rows = [np.full(2**16, number, np.float32) for number in range(64)]  # 16 MiB
    large = frames.pack_result(Reply(7, RequestResult(rows, (), 0.1, 0.2), 1, 0.5, None))
    arrived: list[tuple[Kind, bytes]] = []

    async def run() -> None:
        complete, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_frame(kind: Kind, content: bytes) -> None:
            arrived.append((kind, content))
            if sum(kind is Kind.RESULT for kind, _ in arrived) == 2:
                complete.set()

        sender, receiver = Link(lambda *_: None, lambda: None), Link(on_frame, lambda: None)
        here, there = socket.socketpair()
        reading, _ = await loop.create_connection(lambda: receiver, sock=there)
        await loop.create_connection(lambda: sender, sock=here)
        reading.pause_reading()
        sender.send_large(large)
        sender.send_large(large)
        before = -1
        while sender.buffered != before:  # until nothing more fits into the socket
            before = sender.buffered
            for _ in range(50):
                await asyncio.sleep(0)
        assert 0 < before < 2 * frames.PART_BYTES + 2**17
        sender.send(frames.pack(Kind.HELLO))
        reading.resume_reading()
        await asyncio.wait_for(complete.wait(), 60)
        assert sender.large_bytes == 0
        for each in (sender, receiver):
            each.close()

    asyncio.run(run())
    assert [kind for kind, _ in arrived] == [Kind.HELLO, Kind.RESULT, Kind.RESULT]
    for _, content in arrived[1:]:
        np.testing.assert_array_equal(frames.unpack_result(content).result.rows, rows)


def test_large_results_that_are_not_read_are_bounded() -> None:
    def frame(size: int) -> list[frames.Buffer]:
        return frames.pack_result(
            Reply(1, RequestResult(np.ones((1, size // 4), np.float32), (), 0.1, 0.2), 1, 0.5, None)
        )

    async def run() -> None:
        nothing: Any = None
        found = ApiProcessLink(nothing, nothing, nothing, nothing, lambda: None, most_unsent=5 << 20)
        found._send_result(frame(8 << 20))  # a single one is always sent
        with pytest.raises(ApiError) as error:
            found._send_result(frame(2 << 20))
        assert (error.value.status, error.value.code) == (429, "responses_full")
        found._send_result(frame(100))
        found.link.connection_lost(None)

    asyncio.run(run())


@pytest.mark.parametrize("head", [b"\xff\xff\xff\xff\x01", b"\x01\x00\x00\x00\xf0"], ids=["too large", "no such kind"])
def test_an_invalid_frame_is_an_error(head: bytes) -> None:
    with pytest.raises(ValueError):
        Link(lambda *_: None, lambda: None).data_received(head)


class Sent(Link):
    """A link whose frames are in `frames`."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None, lambda: None)
        self.frames: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)


RESULT = b"".join(frames.pack_result(Reply(1, RequestResult(np.ones((1, 3), np.float32), (), 0.1, 0.2), 1, 0.5, None)))
REJECT = frames.pack_reject(1, ApiError(503, "failed", code="engine_unavailable"), None, (2, 0, 0.25))


@pytest.mark.parametrize("moment", ["before", "with", "after"])
@pytest.mark.parametrize(("frame", "used"), [(RESULT, (3, 0.5)), (REJECT, (2, 0.25))], ids=["result", "error"])
def test_a_client_that_leaves_at_any_moment_ends_with_what_was_computed(
    frame: bytes, used: tuple[int, float], moment: str
) -> None:
    """`moment`: when the frame arrives: before the task is cancelled, before it sees that, or after its CANCEL."""

    async def run() -> tuple[int, float]:
        link = Sent()
        backend, context = RemoteBackend(link, lambda _: (None, None)), RequestContext("")
        task = asyncio.create_task(backend.compute(context, [np.arange(4, dtype=np.int32)], None))
        await asyncio.sleep(0)
        if moment == "before":
            backend.on_frame(Kind(frame[4]), body(frame))
        task.cancel()
        if moment == "with":  # the task has not seen it yet
            backend.on_frame(Kind(frame[4]), body(frame))
        await asyncio.wait((task,))
        assert (moment == "after") == (frames.pack_numbers(Kind.CANCEL, 1) in link.frames)
        if moment == "after":
            backend.on_frame(Kind(frame[4]), body(frame))
        if context.use is not None:
            await asyncio.wait_for(context.use.settled(), 5)
            return context.use.tokens, context.use.seconds
        return context.input_tokens - context.cached_tokens, context.engine_seconds

    assert asyncio.run(run()) == used


def test_a_limit_above_64_bits_is_sent_as_the_largest_number() -> None:
    frame = frames.pack_result(
        Reply(1, RequestResult(np.ones((1, 3), np.float32), (), 0.1, 0.2), 1, 0.5, ((2**70, 2**70, 60), None))
    )
    assert frames.unpack_result(body(b"".join(frame))).quotas == ((2**63 - 1, 2**63 - 1, 60), None)


def test_ids_need_32_bits_and_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = frames.ids()
    assert [next(found) for _ in range(3)] == [1, 2, 3]
    monkeypatch.setattr(frames, "_MOST_ID", 2)
    found = frames.ids()
    assert [next(found) for _ in range(5)] == [1, 2, 1, 2, 1]
