"""What the front end asks of the backend, and gets: the same in this process and across a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import numpy as np
import pytest

from inferctl.serve.backend.local_backend import LocalBackend, Stack
from inferctl.serve.cache.store import VectorStore
from inferctl.serve.cache.vector_cache import VectorCache
from inferctl.serve.engine_process.engine_protocol import BatchResult
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.processes.api_process_link import ApiProcessLink
from inferctl.serve.processes.link import PART_BYTES, Link, frame
from inferctl.serve.processes.remote_backend import RemoteBackend
from inferctl.serve.scheduling.dispatcher import RequestResult
from inferctl.serve.work import Backend, Caller, Outcome, RejectedError, Used, Work
from inferctl.tenancy.access.limits import Limiter
from tests.serve.test_dispatcher import FAILING, World, tokens

LIMITED = Caller("key", (10, 100), "key")
SMALL, LARGE = 100, 20_000  # bytes of bodies: of a large one, the API process asks before it is read
NON_FINITE = 13


class Front:
    """A front end and its backend, whose engine computes when `compute` is called. `remote`: over a socket."""

    def __init__(self, remote: bool, *, cache: bool = False) -> None:
        self.world, metrics = World(), Metrics()
        kept = VectorCache(VectorStore(100_000), metrics) if cache else None
        self.limiter = Limiter()
        self.local = LocalBackend([Stack(self.world.dispatcher, kept)], self.limiter)
        self.backend: Backend = self.local
        self._remote = remote

    async def __aenter__(self) -> Self:
        if self._remote:
            here, there = socket.socketpair()
            loop, backend = asyncio.get_running_loop(), RemoteBackend()
            self.link = ApiProcessLink(self.local, self.page, {}, lambda: None, most_unsent=1 << 28)
            backend.link = Link(backend.handlers, backend.lost)
            await loop.create_connection(lambda: backend.link, sock=here)
            await loop.create_connection(lambda: self.link.messages, sock=there)
            self.backend = backend
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if isinstance(self.backend, RemoteBackend):
            self.backend.link.close()
            await until(lambda: self.link.messages._transport.is_closing())  # type: ignore[union-attr]
        assert kind or not self.local._requests, "each request has ended"

    async def page(self, path: str) -> Any:
        return 200, path.encode(), "text/plain"

    async def submit(self, number: int, *rows: list[int], caller: Caller = LIMITED) -> Outcome:
        """Compute a request whose outcome is known when the engine is done."""
        task = self.start(number, *rows, caller=caller)
        await self.compute()
        return await task

    def start(self, number: int, *rows: list[int], caller: Caller = LIMITED) -> asyncio.Task[Outcome]:
        async def run() -> Outcome:
            return await self.backend.submit(number, Work(caller, [tokens(row) for row in rows]))

        return asyncio.ensure_future(run())

    async def compute(self) -> None:
        """Let the engine compute all that arrives."""
        await until(lambda: bool(self.world.engines[0].batches))
        while self.world.engines[0].batches:
            batch = self.world.engines[0].batches[0]
            if NON_FINITE in batch.tokens:
                self.world.engines[0].batches.clear()
                rows = np.full((len(batch.lengths), 1), np.nan, np.float32)
                result = BatchResult(batch.id, rows, np.zeros(len(rows), np.bool_), 0.1)
                self.world.dispatcher.batch_done(self.world.engines[0], result)
            else:
                self.world.step(self.world.engines[0])
            await asyncio.sleep(0)

    async def left(self) -> tuple[int, int]:
        """Return what remains of the limits, of requests and of tokens, when the backend knows all."""
        if isinstance(self.backend, RemoteBackend):
            await self.backend.page("/")
        requests, tokens = self.limiter.usage("key", LIMITED.limits, time.time()).quotas(time.time())
        assert requests and tokens
        return requests[1], tokens[1]


async def until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not ready():
            await asyncio.sleep(0)


async def rejection(work: Callable[[], Awaitable[object]]) -> RejectedError:
    with pytest.raises(RejectedError) as error:
        await work()
    return error.value


async def an_outcome_has_its_rows_and_what_it_used(front: Front) -> None:
    assert await front.backend.admit(0, LIMITED, SMALL) is None
    outcome = await front.submit(0, [20, 21], [22, 23, 24])
    assert outcome.rows[:, 0].tolist() == [21, 24]  # type: ignore[call-overload]
    assert outcome.used == Used(5, 0, pytest.approx(0.5), ((10, 9, 65), (100, 95, 65)))
    front.backend.end(0)
    assert await front.left() == (10 - 1, 95)


async def rows_of_several_widths_and_marks_arrive(front: Front) -> None:
    rows = [np.arange(size, dtype=np.float32) for size in (3, 0, 5)]
    found: list[Any] = []

    def submit(sequences: Any, marks: Any, **_: Any) -> asyncio.Future[Any]:
        found.append(([each.tolist() for each in sequences], marks))
        future = asyncio.get_running_loop().create_future()
        future.set_result(RequestResult(rows, [], 0.25, 0.5))
        return future

    front.world.dispatcher.submit = submit  # type: ignore[method-assign,assignment]
    work = Work(Caller("a"), [tokens([1, -5]), tokens([2**31 - 1])], [1, 0], b"no-store\xff")
    outcome = await front.backend.submit(0, work)
    assert found == [([[1, -5], [2**31 - 1]], [1, 0])]
    assert [row.tolist() for row in outcome.rows] == [row.tolist() for row in rows]
    assert (outcome.queue_seconds, outcome.inference_seconds) == (0.25, 0.5)
    front.backend.end(0)


async def a_request_without_outcome_is_charged(front: Front) -> None:
    for number, size in enumerate((0, SMALL, LARGE)):
        await front.backend.admit(number, LIMITED, size)
        used = await front.backend.report(number, in_vain=5)
        assert used == Used(quotas=((10, 9 - number, 65), (100, 100 - size // 256, 65 if size > 256 else 0)))


async def a_limit_of_requests_is_exact(front: Front) -> None:
    """Whatever the request asks for, and whenever the backend hears of it."""
    for number in range(10):
        await front.backend.admit(number, LIMITED, SMALL)
        await front.backend.report(number)
    for number, ending in enumerate(("computed", "not computed", "large"), 10):
        error = await rejection(lambda number=number, ending=ending: _end(front, number, ending))
        assert error.reason == "rate_limit_exceeded"
        assert error.retry_after is not None
        assert 0 < error.retry_after <= 65
        assert error.used == Used(quotas=((10, 0, 65), (100, 100, 0)))


async def _end(front: Front, number: int, ending: str) -> None:
    await front.backend.admit(number, LIMITED, LARGE if ending == "large" else SMALL)
    if ending == "computed":
        await front.backend.submit(number, Work(LIMITED, [tokens([20])]))
    else:
        await front.backend.report(number)


async def a_chunked_body_is_charged_when_its_size_is_known(front: Front) -> None:
    for number, size in enumerate((1_000, 2_560, LARGE)):
        await front.backend.admit(number, LIMITED, 0)
        await front.backend.admit(number, LIMITED, size)
        await front.backend.report(number)
    assert await front.left() == (7, 100 - 3 - 10 - 78)


async def a_limit_of_tokens_is_exact(front: Front) -> None:
    await front.backend.admit(0, LIMITED, SMALL)
    await front.submit(0, [20] * 8)
    front.backend.end(0)
    await front.backend.admit(1, LIMITED, SMALL)
    error = await rejection(lambda: front.backend.submit(1, Work(LIMITED, [tokens([20] * 93)])))
    assert (error.reason, "93 tokens" in str(error)) == ("rate_limit_exceeded", True)
    assert error.used is not None
    assert error.used.quotas == ((10, 8, 65), (100, 92, 65))
    assert await front.left() == (9, 92)
    # It was tokenized in vain, and so is this: a whole limit in all, after which only what surely fits is tokenized.
    await front.backend.admit(2, LIMITED, SMALL)
    await front.backend.report(2, in_vain=7, give_back=True)
    assert (await rejection(lambda: front.backend.admit(3, LIMITED, LARGE))).reason == "rate_limit_exceeded"
    await front.backend.admit(4, LIMITED, 92)
    await front.backend.report(4, give_back=True)


async def what_is_given_back_costs_nothing_but_what_was_computed(front: Front) -> None:
    await front.backend.admit(0, LIMITED, SMALL)
    await front.submit(0, [20] * 4, [21] * 2)
    front.backend.end(0, give_back=True)  # as if the response did not fit
    await front.backend.admit(1, LIMITED, LARGE)
    await front.backend.report(1, give_back=True)
    assert await front.left() == (9, 94)


async def a_full_queue_rejects(front: Front) -> None:
    filling = [front.start(3, *[[20] * 8] * 3, caller=Caller())]
    await until(lambda: bool(front.world.engines[0].batches))
    filling.append(front.start(0, *[[20] * 8] * 124, caller=Caller()))
    await until(lambda: front.world.batcher.waiting_tokens >= 1000)
    full = await front.backend.admit(1, LIMITED, LARGE)
    assert full is not None
    assert (full.reason, full.used) == ("queue_full", None)
    await front.backend.report(1, give_back=True)
    await front.backend.admit(2, LIMITED, SMALL)
    error = await rejection(lambda: front.backend.submit(2, Work(LIMITED, [tokens([20] * 20)])))
    assert error.reason == "queue_full"
    assert await front.left() == (10, 100)
    for task, number in zip(filling, (3, 0), strict=True):
        task.cancel()
        await front.backend.report(number, wait=False)


async def what_the_engine_cannot_compute_is_rejected(front: Front) -> None:
    for number, (token, reason, used) in enumerate(
        ((FAILING, "engine_failed", Used(2, 0, pytest.approx(0.2))), (NON_FINITE, "non_finite", Used(4, 0, 0.1)))
    ):
        error = await rejection(lambda n=number, token=token: front.submit(n, [20, 21], [20, token], caller=Caller()))
        assert (error.reason, error.used) == (reason, used)
    await front.backend.admit(3, LIMITED, SMALL)
    error = await rejection(lambda: front.submit(3, [20, NON_FINITE]))
    assert error.used == Used(2, 0, 0.1, ((10, 9, 65), (100, 98, 65))), "its response has headers of limits, too"
    assert await front.left() == (9, 98)
    front.world.crash(front.world.engines[0])
    error = await rejection(lambda: front.backend.submit(2, Work(Caller(), [tokens([20])])))
    assert (error.reason, error.retry_after, error.used) == ("engine_unavailable", 1, Used())


async def a_client_that_leaves_is_charged_what_was_computed(front: Front) -> None:
    """Of three batches, the first is complete, and the second is running when the client leaves."""
    await front.backend.admit(0, LIMITED, SMALL)
    task = front.start(0, [20] * 8, [21] * 8, [22] * 8, [23] * 8)
    engine = front.world.engines[0]
    await until(lambda: bool(engine.batches))
    front.world.step(engine)
    task.cancel()
    await until(task.done)
    report = asyncio.ensure_future(_report(front))
    await until(lambda: not front.world.dispatcher._requests)
    assert not report.done(), "an engine still computes"
    while engine.batches:
        front.world.step(engine)
    used = await report
    assert (used.tokens, used.cached) == (front.world.computed, 0)
    assert 8 < used.tokens < 32
    assert used.quotas is not None
    assert used.quotas[1] == (100, 100 - 32, 65), "the charge stays"


async def _report(front: Front) -> Used:
    return await front.backend.report(0)


async def a_result_that_arrives_when_the_client_leaves_counts(front: Front) -> None:
    for moment in ("before", "with", "after"):
        task = front.start(0, [20, 21], [22], caller=Caller())
        if moment == "after":  # the engine has it, and nobody waits for it
            await until(lambda: bool(front.world.engines[0].batches))
        else:
            await front.compute()
        if moment == "before":  # the future of the task has the result, and the task has not run since
            await until(lambda task=task: task._fut_waiter is None or task._fut_waiter.done())
        task.cancel()
        await asyncio.wait((task,))
        report = asyncio.ensure_future(_report(front))
        await until(lambda: not front.world.dispatcher._requests)
        while front.world.engines[0].batches:
            front.world.step(front.world.engines[0])
        assert await report == Used(3, 0, pytest.approx(0.3)), moment


async def a_rejection_that_arrives_when_the_client_leaves_counts(front: Front) -> None:
    async def run(number: int, token: int) -> Used | None:
        try:
            await front.backend.submit(number, Work(Caller(), [tokens([20, 21]), tokens([20, token])]))
        except RejectedError as error:
            return error.used
        except asyncio.CancelledError:  # over a socket, the rejection is here, and this has not read it
            return await front.backend.report(number)
        raise AssertionError("it was computed")

    for number, token, computed in ((0, FAILING, 2), (1, NON_FINITE, 4)):
        task = asyncio.ensure_future(run(number, token))
        await front.compute()
        await until(lambda task=task: task._fut_waiter is None or task._fut_waiter.done())
        task.cancel()
        used = await task
        assert used is not None
        assert used.tokens == computed


async def a_server_that_stops_does_not_wait(front: Front) -> None:
    task = front.start(0, [20] * 8, [21] * 8, [22] * 8, caller=Caller())
    await until(lambda: bool(front.world.engines[0].batches))
    front.world.step(front.world.engines[0])
    task.cancel()
    await asyncio.wait((task,))
    waiting = asyncio.ensure_future(_report(front))
    await asyncio.sleep(0)
    waiting.cancel()  # by the drain
    assert await front.backend.report(0, wait=False) == Used(8, 0, pytest.approx(0.8))
    front.world.engines[0].batches.clear()


SCENARIOS = [
    an_outcome_has_its_rows_and_what_it_used,
    rows_of_several_widths_and_marks_arrive,
    a_request_without_outcome_is_charged,
    a_limit_of_requests_is_exact,
    a_chunked_body_is_charged_when_its_size_is_known,
    a_limit_of_tokens_is_exact,
    what_is_given_back_costs_nothing_but_what_was_computed,
    a_full_queue_rejects,
    what_the_engine_cannot_compute_is_rejected,
    a_client_that_leaves_is_charged_what_was_computed,
    a_result_that_arrives_when_the_client_leaves_counts,
    a_rejection_that_arrives_when_the_client_leaves_counts,
    a_server_that_stops_does_not_wait,
]


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_both_backends(
    scenario: Callable[[Front], Awaitable[None]], remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.0)  # limits have cells of time
    async with asyncio.timeout(60), Front(remote) as front:
        await scenario(front)


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_cached_tokens_are_counted_and_given_back(remote: bool) -> None:
    async with Front(remote, cache=True) as front:
        for number, cached in enumerate((0, 3)):
            await front.backend.admit(number, LIMITED, SMALL)
            outcome = await (
                front.backend.submit(number, Work(LIMITED, [tokens([20] * 3)]))
                if cached
                else front.submit(number, [20] * 3)
            )
            assert outcome.used[:2] == (3, cached)
            front.backend.end(number, give_back=True)
        assert await front.left() == (9, 97)


async def test_requests_and_pages_fail_when_the_backend_ends() -> None:
    async with Front(True) as front:
        assert isinstance(front.backend, RemoteBackend)
        assert await front.backend.page("/info") == (200, b"/info", "text/plain")
        task = front.start(0, [20])
        leaving = front.start(1, [20])
        await until(lambda: bool(front.world.engines[0].batches))
        leaving.cancel()
        report = front.backend.report(1)
        front.link.messages.close()
        error = await rejection(lambda: task)
        assert (error.reason, error.used, await report) == ("engine_unavailable", Used(), Used())
        assert (await rejection(lambda: front.backend.submit(2, Work(Caller(), [tokens([1])])))).used == Used()
        assert await front.backend.report(2) == Used()
        front.world.step(front.world.engines[0])


async def test_a_bug_fails_its_request_only(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = LocalBackend.submit
    monkeypatch.setattr(
        LocalBackend, "submit", lambda self, number, work: 1 / 0 if work.marks else submit(self, number, work)
    )
    async with Front(True) as front:
        error = await rejection(lambda: front.backend.submit(0, Work(Caller(), [tokens([1])], [1, 2], b"")))
        assert error.reason == "internal_error"
        await front.backend.report(0, give_back=True)
        assert (await front.submit(1, [20], caller=Caller())).used.tokens == 1
        front.backend.end(1)
        await front.backend.admit(2, Caller(), LARGE)
        monkeypatch.setattr(front.local, "report", lambda *_, **__: 1 / 0)
        async with asyncio.timeout(5):
            assert (await rejection(lambda: front.backend.report(2))).reason == "internal_error"
    assert "ZeroDivisionError" in caplog.text


# -- The link


MESSAGES: list[tuple[Any, ...]] = [
    ("hello",),
    ("taken", 5),
    ("state", {"a": [1, None]}),
    ("used", 1, (2, 0, 0.5, None)),
]


def test_frames_that_are_cut_at_any_byte_arrive_once_and_in_order() -> None:
    def handlers(arrived: list[Any]) -> Any:
        kinds = [kind for kind, *_ in MESSAGES] + ["rows"]
        return {kind: lambda *fields, kind=kind: arrived.append((kind, *fields)) for kind in kinds}

    stream = b"".join(b"".join(frame(*message)) for message in MESSAGES) + b"".join(frame("rows", 7, payload=[b"abc"]))
    expected = [*MESSAGES[:3], ("used", 1, [2, 0, 0.5, None]), ("rows", 7, b"abc")]
    for cut in range(len(stream) + 1):
        arrived: list[Any] = []
        link = Link(handlers(arrived), lambda: None)
        link.data_received(stream[:cut])
        link.data_received(stream[cut:])
        assert arrived == expected, cut
    arrived = []
    link = Link(handlers(arrived), lambda: None)
    for number in range(len(stream)):
        link.data_received(stream[number : number + 1])
    assert arrived == expected


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff\x01\0\0\0", b"".join(frame("unknown"))], ids=["large", "kind"])
def test_an_invalid_frame_is_an_error(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        Link({}, lambda: None).data_received(data)


async def test_what_need_not_arrive_soon_arrives_with_the_next_message() -> None:
    arrived: list[str] = []
    kinds = {kind: lambda kind=kind: arrived.append(kind) for kind in ("later", "now")}
    here, there = socket.socketpair()
    sender, receiver = Link({}, lambda: None), Link(kinds, lambda: None)
    for link, each in ((sender, here), (receiver, there)):
        await asyncio.get_running_loop().create_connection(lambda link=link: link, sock=each)
    sender.send("later", soon=False)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (arrived, sender.buffered > 0) == ([], True)
    sender.send("now")
    await until(lambda: arrived == ["later", "now"])
    for link in (sender, receiver):
        link.close()


def test_a_large_frame_waits_for_its_reader_and_holds_up_no_other() -> None:
    """Each result that an API process had not read was in the memory of the backend: 4 GB of 64 requests."""
    rows = [bytes([number]) * 2**18 for number in range(64)]  # 16 MiB
    arrived: list[Any] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        kinds = {kind: lambda *fields, kind=kind: arrived.append((kind, *fields)) for kind in ("rows", "hello")}
        sender, receiver = Link({}, lambda: None), Link(kinds, lambda: None)
        here, there = socket.socketpair()
        reading, _ = await loop.create_connection(lambda: receiver, sock=there)
        await loop.create_connection(lambda: sender, sock=here)
        reading.pause_reading()
        for number in range(2):
            sender.send_large(frame("rows", number, payload=rows))
        before = -1
        while sender.buffered != before:  # until nothing more fits into the socket
            before = sender.buffered
            for _ in range(50):
                await asyncio.sleep(0)
        assert 0 < before < 2 * PART_BYTES + 2**17
        sender.send("hello")
        reading.resume_reading()
        await until(lambda: len(arrived) == 3)
        assert sender.large_bytes == 0
        for each in (sender, receiver):
            each.close()

    asyncio.run(run())
    assert arrived == [("hello",), ("rows", 0, b"".join(rows)), ("rows", 1, b"".join(rows))]


async def test_large_results_that_are_not_read_are_bounded() -> None:
    found = ApiProcessLink(LocalBackend([Stack(World().dispatcher)]), Front(False).page, {}, lambda: None, 5 << 20)
    found._send([b"a" * (8 << 20)], None)  # a single one is always sent
    with pytest.raises(RejectedError) as error:
        found._send([b"a" * (2 << 20)], None)
    assert error.value.reason == "responses_full"
    found._send([b"a" * 100], None)
    with contextlib.suppress(asyncio.CancelledError):
        found.messages.connection_lost(None)
