"""The dispatcher on a virtual clock, with engines that the tests simulate."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.batching.batcher import Batcher, QueueLimits
from inferctl.reading.rows import Tokens
from inferctl.serve.cache.store import VectorStore
from inferctl.serve.cache.vector_cache import VectorCache
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, DeviceInfo, EngineInfo, PrecisionInfo
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.scheduling.dispatcher import Dispatcher, RequestResult
from inferctl.serve.scheduling.engine_use import EngineUse
from inferctl.serve.work import Caller, RejectedError, Work
from tests.latency_models import learned

INFO = EngineInfo(
    1, "none", "", PrecisionInfo("fp32", "fp32", "native", ""), DeviceInfo("cpu", "virtual", None, 0), batch_tokens=8
)
CRASHING, FAILING = 15, 14


class VirtualEngine:
    """Keeps the batches that it receives until the test lets it complete them."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.up = False

    def send(self, batch: Batch) -> None:
        assert self.up
        self.batches.append(batch)


class World:
    """A dispatcher with engines that run ten tokens per second."""

    def __init__(self, engines: int = 1, slo: float | None = None, parallel: int = 1, idle: int = 0) -> None:
        self.now, self.crashes, self.computed = 0.0, 0, 0
        self.info = replace(INFO, parallel=parallel, idle_parallel=idle)
        self.batcher = Batcher(QueueLimits(8, 1_000, slo_s=slo), learned(0.0, 10.0))
        self.dispatcher = Dispatcher(self.batcher, Metrics(), lambda: self.now)
        self.engines = [VirtualEngine() for _ in range(engines)]
        for engine in self.engines:
            self.start(engine)

    def start(self, engine: VirtualEngine) -> None:
        engine.up = True
        self.dispatcher.engine_ready(engine, self.info)

    def crash(self, engine: VirtualEngine) -> None:
        self.crashes += 1
        engine.up, engine.batches = False, []
        self.dispatcher.engine_lost(engine)

    def step(self, engine: VirtualEngine, which: int = 0) -> None:
        """Let the engine complete one of its running batches, with a result, a failure or a crash."""
        batch = engine.batches.pop(which)
        self.now += len(batch.tokens) / 10
        if CRASHING in batch.tokens:
            self.crash(engine)
        elif FAILING in batch.tokens:
            self.dispatcher.batch_failed(engine, batch.id, "injected failure", False)
        else:
            ends = np.cumsum(batch.lengths) - 1
            vectors = batch.tokens[ends].astype(np.float32)[:, None]
            self.computed += len(batch.tokens)
            result = BatchResult(batch.id, vectors, np.ones(len(ends), dtype=np.bool_), len(batch.tokens) / 10)
            self.dispatcher.batch_done(engine, result)

    async def drain(self) -> None:
        """Complete all batches. A crashed engine restarts when the others are idle."""
        await run_callbacks()
        while (busy := [engine for engine in self.engines if engine.batches]) or not all(e.up for e in self.engines):
            if not busy:
                self.start(next(engine for engine in self.engines if not engine.up))
            for engine in busy:
                for idle, slots in enumerate((self.info.parallel, self.info.idle_parallel)):
                    running = [at for at, batch in enumerate(engine.batches) if batch.idle == idle]
                    assert len(running) <= slots + bool(slots)
                    if running and engine.up:
                        # The newest running batch completes first, so results arrive in another order than batches.
                        self.step(engine, running[min(len(running), slots) - 1])
            await run_callbacks()

    def request(self, *rows: list[int], bulk: bool = False) -> asyncio.Task[Any]:
        async def result() -> Any:
            return await self.dispatcher.submit([tokens(row) for row in rows], bulk=bulk)

        return asyncio.ensure_future(result())


async def run_callbacks() -> None:
    """Run the pending callbacks of the event loop: requests are queued, batches are sent, results are set."""
    for _ in range(3):
        await asyncio.sleep(0)


def tokens(row: list[int]) -> Tokens:
    return np.array(row, dtype=np.int32)


ROWS = st.lists(st.lists(st.integers(20, 99), min_size=1, max_size=6), min_size=1, max_size=4)


@hypothesis.settings(max_examples=400)
@given(
    st.lists(ROWS, min_size=1, max_size=8),
    st.lists(st.sampled_from([0, 0, CRASHING, FAILING]), min_size=8, max_size=8),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_only_faulty_requests_fail(
    requests: list[list[list[int]]], faults: list[int], engines: int, parallel: int
) -> None:
    async def scenario() -> None:
        world = World(engines, parallel=parallel)
        asked = [
            [[fault, *row] if fault else row for row in rows] for rows, fault in zip(requests, faults, strict=False)
        ]
        tasks = [world.request(*rows) for rows in asked]
        await world.drain()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        for rows, fault, result in zip(asked, faults, results, strict=False):
            if fault:
                assert result.reason == ("engine_failed" if fault == FAILING else "engine_unavailable")
            else:
                assert result.rows[:, 0].tolist() == [row[-1] for row in rows]
        # A request that crashes engines can run on every engine at once, first with others, then in isolation. Its
        # first crash in isolation is the last.
        crashing = faults[: len(requests)].count(CRASHING)
        assert world.crashes <= 2 * engines * parallel * crashing

    asyncio.run(scenario())


@hypothesis.settings(max_examples=300)
@given(st.lists(ROWS, min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.data())
def test_every_request_completes_once_when_engines_are_killed_at_any_moment(
    requests: list[list[list[int]]], engines: int, parallel: int, idle: int, data: st.DataObject
) -> None:
    async def scenario() -> None:
        world = World(engines, parallel=parallel, idle=idle)
        tasks = [world.request(*rows, bulk=number % 2 == 1) for number, rows in enumerate(requests)]
        await run_callbacks()
        for index in data.draw(st.lists(st.integers(0, 2 * engines - 1), max_size=8)):
            engine = world.engines[index % engines]
            if not engine.up:
                world.start(engine)
            elif index < engines or not engine.batches:
                world.crash(engine)
            else:
                world.step(engine)
            await run_callbacks()
        await world.drain()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        for rows, result in zip(requests, results, strict=True):
            if isinstance(result, RejectedError):
                assert world.crashes >= 2, "only two crashes while it runs can fail a request"
            else:
                assert result.rows[:, 0].tolist() == [row[-1] for row in rows]
        assert world.batcher.waiting_tokens == 0

    asyncio.run(scenario())


ACTION = st.sampled_from(["ask", "ask", "ask", "bulk", "leave", "leave", "step", "step", "crash"])


@hypothesis.settings(max_examples=400)
@given(st.lists(st.tuples(ACTION, st.integers(0, 9)), max_size=40), st.integers(1, 2))
@hypothesis.example(
    # The client leaves after its request failed, while an engine still runs a batch of it.
    [("ask", 6), ("ask", 2), ("crash", 0), ("crash", 0), ("crash", 2), ("leave", 1)],
    1,
)
def test_what_engines_compute_counts_once_whoever_leaves(actions: list[tuple[str, int]], parallel: int) -> None:
    async def scenario() -> None:
        world = World(2, parallel=parallel, idle=parallel - 1)
        cache = VectorCache(VectorStore(100_000), Metrics())
        asked: list[asyncio.Task[Any]] = []
        left: set[asyncio.Task[Any]] = set()
        ended: set[asyncio.Task[Any] | None] = set()
        events: list[tuple[int, int, float]] = []

        async def ask(rows: list[Tokens], bulk: bool, directives: bytes) -> Any:
            use = EngineUse()
            submit = partial(world.dispatcher.submit, bulk=bulk)
            try:
                return await cache.run(Work(Caller(bulk=bulk), rows, None, directives), submit, use)
            finally:  # as the edge does, which then looks no more for a client that leaves
                ended.add(asyncio.current_task())
                await use.settled()
                events.append((sum(map(len, rows)), use.tokens, use.seconds))

        for action, number in actions:
            engine = world.engines[number % 2]
            if action in ("ask", "bulk"):
                # Few sequences of few lengths, so that requests share some of them.
                rows = [tokens([20 + i % 3] * (1 + i % 4)) for i in range(1 + number // 2)]
                if number == 9:
                    rows.append(tokens([FAILING]))
                directives = b"no-cache" if number == 8 else b"no-store" if number == 7 else b""
                asked.append(asyncio.ensure_future(ask(rows, action == "bulk", directives)))
            elif action == "leave" and asked:
                chosen = asked[-1 - number % len(asked)]
                if chosen not in left | ended:
                    left.add(chosen)
                    chosen.cancel()
            elif action == "step" and engine.batches:
                world.step(engine)
            elif action == "crash" and engine.up:
                world.crash(engine)
            elif action == "crash":
                world.start(engine)
            for _ in range(number % 3):
                await asyncio.sleep(0)
        for _ in range(10):  # a request that waited for another one may compute its inputs after all
            await run_callbacks()
            await world.drain()
        results = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
        assert sum(tokens for _, tokens, _ in events) == world.computed
        assert sum(seconds for *_, seconds in events) == pytest.approx(world.computed / 10)
        assert all(tokens <= length for length, tokens, _ in events)
        for task, result in zip(asked, results, strict=True):
            assert isinstance(result, RequestResult | RejectedError) or task in left

    asyncio.run(scenario())


async def test_a_prefetched_batch_is_not_retried_in_isolation() -> None:
    world = World()
    engine = world.engines[0]
    first = world.request([20])
    await run_callbacks()
    tasks = [world.request([CRASHING, 1, 1]), *(world.request([30 + i, 1, 1]) for i in range(6))]
    await run_callbacks()
    world.step(engine)
    await run_callbacks()
    assert [len(batch.lengths) for batch in engine.batches] == [2, 2], "one with the crashing request, one prefetched"
    sizes = []
    while engine.batches:
        world.step(engine)
        if not engine.up:
            world.start(engine)
        await run_callbacks()
        sizes.append([len(batch.lengths) for batch in engine.batches])
    assert sizes[:2] == [[1], [1]], "in isolation: crashing request, neighbor"
    assert sizes[2:] == [[2, 2], [2], [1], []]
    results = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [isinstance(result, RejectedError) for result in results] == [False, True, *[False] * 6]


async def test_interactive_requests_do_not_wait_for_bulk_batches() -> None:
    world = World(slo=1.0, idle=2)
    engine = world.engines[0]
    tasks = [world.request([20] * 4, bulk=True) for _ in range(8)]
    await run_callbacks()
    assert [batch.idle for batch in engine.batches] == [True] * 3, "one is prefetched"
    tasks.append(world.request([21] * 6))  # 0.6 s
    await run_callbacks()
    assert not engine.batches[-1].idle
    world.step(engine, 3)
    await run_callbacks()
    assert tasks[-1].done()
    failing = [world.request([FAILING]), world.request([22] * 2)]
    await run_callbacks()
    world.step(engine, 3)
    await run_callbacks()
    assert all(batch.idle for batch in engine.batches), "what failed runs in isolation, so it waits"
    await world.drain()
    results = await asyncio.gather(*tasks, *failing, return_exceptions=True)
    assert [isinstance(result, RejectedError) for result in results] == [False] * 9 + [True, False]


async def test_the_least_loaded_engine_gets_the_next_batch() -> None:
    world = World(engines=2)
    one, two = world.engines
    tasks = [world.request([20] * 7), world.request([21] * 2)]
    await run_callbacks()
    assert [len(engine.batches[0].tokens) for engine in world.engines] == [7, 2]
    world.step(two)
    tasks.append(world.request([22] * 3))
    await run_callbacks()
    assert (len(one.batches), len(two.batches[0].tokens)) == (1, 3)
    await world.drain()
    await asyncio.gather(*tasks)


async def test_the_predicted_wait_includes_the_remaining_time_of_running_batches() -> None:
    world = World(slo=1.0)
    world.dispatcher.check_admission()
    task = world.request([20] * 8)  # 0.8 s
    await run_callbacks()
    with pytest.raises(RejectedError) as rejected:
        await world.request([21] * 4)
    assert rejected.value.retry_after == pytest.approx(0.2)
    world.batcher.limits = replace(world.batcher.limits, slo_s=0.8)
    with pytest.raises(RejectedError):
        world.dispatcher.check_admission()
    world.batcher.limits = replace(world.batcher.limits, slo_s=1.0)
    world.now += 0.25
    late = world.request([21] * 4)
    await run_callbacks()
    assert not late.done()
    await world.drain()
    await asyncio.gather(task, late)


async def test_a_prefetched_batch_counts_from_the_moment_a_slot_is_free() -> None:
    world = World(parallel=2, slo=10.0)
    tasks = [world.request([20] * 8) for _ in range(3)]  # two run, a full one is prefetched
    await run_callbacks()
    engine = world.engines[0]
    assert len(engine.batches) == 3
    assert world.dispatcher._seconds_until_free() == pytest.approx((0.8 + 0.8 + 0.8) / 2)
    world.now += 0.5
    world.step(engine, 1)
    third = world.batcher.latency.seconds(8)
    assert world.dispatcher._seconds_until_free() == pytest.approx((0.0 + third) / 2), "the first is overdue"
    await world.drain()
    await asyncio.gather(*tasks)


async def test_an_engine_with_several_slots_gets_equal_batches_at_once() -> None:
    world = World(parallel=2)
    world.batcher.limits = QueueLimits(1_000, 10_000)
    task = world.request(*([20] * 50 for _ in range(8)))
    await run_callbacks()
    assert [len(batch.tokens) for batch in world.engines[0].batches] == [200, 200]
    await world.drain()
    await task


# Requests of one batch, as texts and their second segments, and those of the batch: 0 for a text.
SEGMENTS: list[tuple[list[tuple[list[list[int]], list[int] | None]], dict[tuple[int, ...], int] | None]] = [
    ([([[20, 21]], None), ([[30]], None)], None),
    ([([[20, 21]], [1]), ([[30, 31, 32]], [2])], {(20, 21): 1, (30, 31, 32): 2}),
    ([([[20, 21]], None), ([[30, 31, 32], [40]], [2, 1])], {(20, 21): 0, (30, 31, 32): 2, (40,): 1}),
    ([([[20, 21]], [1]), ([[30]], None)], {(20, 21): 1, (30,): 0}),
]


@pytest.mark.parametrize(("requests", "expected"), SEGMENTS)
async def test_a_text_beside_pairs_has_no_second_segment(
    requests: list[tuple[list[list[int]], list[int] | None]], expected: dict[tuple[int, ...], int] | None
) -> None:
    world = World()
    tasks = [world.dispatcher.submit([tokens(row) for row in rows], starts) for rows, starts in requests]
    await run_callbacks()
    (batch,) = world.engines[0].batches
    found = None
    if batch.marks is not None:
        rows = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
        starts = batch.marks.tolist()
        found = {tuple(row.tolist()): start for row, start in zip(rows, starts, strict=True)}
    assert found == expected
    await world.drain()
    await asyncio.gather(*tasks)


async def test_no_batch_is_prefetched_while_another_engine_is_free() -> None:
    world = World(engines=4)
    tasks = [world.request([20] * 8) for _ in range(6)]
    await run_callbacks()
    assert sorted(len(engine.batches) for engine in world.engines) == [1, 1, 2, 2]
    await world.drain()
    await asyncio.gather(*tasks)


async def test_the_batch_limit_recovers_after_insufficient_memory() -> None:
    world = World()
    world.info = replace(INFO, batch_tokens=1024)
    engine = world.engines[0]
    world.start(engine)
    task = world.request(*([20] * 100 for _ in range(8)))
    await run_callbacks()
    world.dispatcher.batch_failed(engine, engine.batches.pop(0).id, "no memory", True)
    assert world.batcher.limits.batch_tokens == 400
    await world.drain()
    await task
    for _ in range(400):
        task = world.request(*([20] * 100 for _ in range(10)))
        await world.drain()
        await task
    assert world.batcher.limits.batch_tokens == 1024


async def test_an_out_of_memory_failure_next_to_other_batches_is_retried_in_isolation() -> None:
    world = World(parallel=2)
    engine = world.engines[0]
    tasks = [world.request([20] * 8), world.request([30] * 8)]
    await run_callbacks()
    world.dispatcher.batch_failed(engine, engine.batches.pop(0).id, "no memory", True)
    assert len(engine.batches) == 1, "the retry waits until the other batch is complete"
    await world.drain()
    results = await asyncio.gather(*tasks)
    assert [result.rows[0, 0] for result in results] == [20, 30]


async def test_a_sequence_that_does_not_fit_into_memory_in_isolation_is_rejected() -> None:
    world = World()
    engine = world.engines[0]
    task = world.request([20] * 8)
    await run_callbacks()
    for _ in range(2):
        world.dispatcher.batch_failed(engine, engine.batches.pop(0).id, "no memory", True)
    with pytest.raises(RejectedError, match="insufficient memory for this request: no memory"):
        await task
    assert world.dispatcher.out_of_memory == 2
