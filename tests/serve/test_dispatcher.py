"""The dispatcher on a virtual clock, with engines that the tests simulate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.serve.engine_process.engine_protocol import (
    Batch,
    BatchResult,
    DeviceInfo,
    EngineInfo,
    PrecisionInfo,
    Tokens,
)
from inferctl.serve.metrics import Metrics
from inferctl.serve.scheduling.batcher import AdmissionError, Batcher, QueueLimits
from inferctl.serve.scheduling.dispatcher import Dispatcher, EngineFailedError, EngineUnavailableError
from inferctl.serve.scheduling.engine_queue import EngineQueue
from inferctl.serve.scheduling.latency_model import Capacity, LatencyModel

INFO = EngineInfo(
    1, "none", "", PrecisionInfo("fp32", "fp32", "native", ""), DeviceInfo("cpu", "virtual", None, 0), batch_tokens=8
)
CRASHING, FAILING, CORRUPTING, CRASHING_NEXT = 666, 13, 14, 15


class World:
    """A dispatcher with engines that run ten tokens per second."""

    def __init__(
        self, engines: int = 1, slo: float | None = None, parallel: int = 1, *, slow_start: bool = False
    ) -> None:
        """`slow_start`: a crashed engine restarts only when the others are idle, not at once."""
        self.now, self.slow_start = 0.0, slow_start
        self.down: list[EngineQueue] = []
        self.info = replace(INFO, parallel=parallel)
        limits = QueueLimits(8, 1_000, slo_s=slo)
        self.dispatcher = Dispatcher(Batcher(limits, LatencyModel(Capacity(0.0, 10.0))), Metrics(), lambda: self.now)
        self.engines = [self.dispatcher.add_engine() for _ in range(engines)]
        self.in_flight: dict[EngineQueue, list[Batch]] = {engine: [] for engine in self.engines}
        self.crashes = 0
        for engine in self.engines:
            engine.write = self.in_flight[engine].append
            engine.kill = lambda engine=engine: self.crash(engine)  # type: ignore[misc]
            engine.engine_ready(self.info)
        self.corrupted: set[EngineQueue] = set()
        self.will_crash: set[EngineQueue] = set()  # crash on their next batch

    def crash(self, engine: EngineQueue) -> None:
        self.crashes += 1
        self.in_flight[engine].clear()
        self.corrupted.discard(engine)
        self.will_crash.discard(engine)
        engine.engine_lost()
        if self.slow_start:
            self.down.append(engine)
        else:
            engine.engine_ready(self.info)

    def step(self, engine: EngineQueue, which: int = 0) -> None:
        """Let the engine complete one of its running batches, with a result, a failure or a crash."""
        batch = self.in_flight[engine].pop(which)
        self.now += len(batch.tokens) / 10
        if CORRUPTING in batch.tokens:
            self.corrupted.add(engine)
        if CRASHING in batch.tokens or engine in self.will_crash:
            self.crash(engine)
        elif {FAILING, CRASHING_NEXT} & set(batch.tokens.tolist()) or engine in self.corrupted:
            if CRASHING_NEXT in batch.tokens:
                self.will_crash.add(engine)
            engine.batch_failed(batch.id, "injected failure", False)
        else:
            ends = np.cumsum(batch.lengths) - 1
            vectors = batch.tokens[ends].astype(np.float32)[:, None]
            engine.batch_done(
                BatchResult(batch.id, vectors, np.ones(len(ends), dtype=np.bool_), len(batch.tokens) / 10)
            )

    async def drain(self) -> None:
        await run_callbacks()
        while (busy := [engine for engine in self.engines if self.in_flight[engine]]) or self.down:
            if not busy:
                self.down.pop().engine_ready(self.info)
            for engine in busy:
                assert len(self.in_flight[engine]) <= self.info.parallel + 1
                # The newest running batch completes first, so results arrive in another order than batches.
                self.step(engine, min(len(self.in_flight[engine]), self.info.parallel) - 1)
            await run_callbacks()

    def request(self, *rows: list[int]) -> asyncio.Task[Any]:
        async def result() -> Any:
            return await self.dispatcher.submit([tokens(row) for row in rows])

        return asyncio.ensure_future(result())


async def run_callbacks() -> None:
    """Run the pending callbacks of the event loop: requests are queued, batches are sent, results are set."""
    for _ in range(3):
        await asyncio.sleep(0)


def tokens(row: list[int]) -> Tokens:
    return np.array(row, dtype=np.int32)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


ROWS = st.lists(st.lists(st.integers(20, 99), min_size=1, max_size=6), min_size=1, max_size=4)


@hypothesis.settings(max_examples=400)
@given(
    st.lists(ROWS, min_size=1, max_size=8),
    st.sets(st.integers(0, 7), max_size=2),
    st.sampled_from([CRASHING, FAILING, CORRUPTING, CRASHING_NEXT]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
@hypothesis.example([[[22] * 2], [[20] * 3], [[24]]], {1}, CRASHING_NEXT, 2, 1, True)
def test_only_faulty_requests_fail(
    requests: list[list[list[int]]], bad: set[int], fault: int, engines: int, parallel: int, slow_start: bool
) -> None:
    async def scenario() -> None:
        world = World(engines, parallel=parallel, slow_start=slow_start)
        asked = [[[fault, *row] if i in bad else row for row in rows] for i, rows in enumerate(requests)]
        tasks = [world.request(*rows) for rows in asked]
        await world.drain()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for i, (rows, result) in enumerate(zip(asked, results, strict=True)):
            if i in bad:
                assert isinstance(result, EngineFailedError if fault == FAILING else EngineUnavailableError)
            else:
                assert result.vectors[:, 0].tolist() == [row[-1] for row in rows]
        # A crashing request can run on every engine at once, first with others, then in isolation. Its second crash in
        # isolation is the last. A request that corrupts engines does so until it fails in isolation on a new engine:
        # once for each half batch that contained it.
        assert fault in (CORRUPTING, CRASHING_NEXT) or world.crashes <= (2 * engines * parallel + 1) * len(bad)

    run(scenario)


def test_a_prefetched_batch_is_not_retried_in_isolation() -> None:
    async def scenario() -> None:
        world = World()
        engine = world.engines[0]
        first = world.request([20])
        await run_callbacks()
        tasks = [world.request([CRASHING, 1, 1]), *(world.request([30 + i, 1, 1]) for i in range(6))]
        await run_callbacks()
        world.step(engine)
        await run_callbacks()
        assert [len(batch.lengths) for batch in world.in_flight[engine]] == [2, 2], (
            "the one with the crashing request, and a prefetched one"
        )
        world.step(engine)  # crashes
        sizes = []
        while world.in_flight[engine]:
            sizes.append([len(batch.lengths) for batch in world.in_flight[engine]])
            world.step(engine)
            await run_callbacks()
        assert sizes[:3] == [[1], [1], [1]], "in isolation: crashing request, neighbor, crashing request"
        assert sizes[3:] == [[2, 2], [2], [1]]
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [isinstance(result, EngineUnavailableError) for result in results] == [False, True, *[False] * 6]

    run(scenario)


def test_the_least_loaded_engine_gets_the_next_batch() -> None:
    async def scenario() -> None:
        world = World(engines=2)
        one, two = world.engines
        tasks = [world.request([20] * 7), world.request([21] * 2)]
        await run_callbacks()
        assert (one.tokens, two.tokens) == (7, 2)
        world.step(two)
        tasks.append(world.request([22] * 3))
        await run_callbacks()
        assert (one.tokens, two.tokens) == (7, 3)
        await world.drain()
        await asyncio.gather(*tasks)

    run(scenario)


def test_check_rejects_any_request_when_the_engine_is_too_busy_for_the_slo() -> None:
    async def scenario() -> None:
        world = World(slo=0.5)
        world.dispatcher.check()
        task = world.request([20] * 8)  # 0.8 s
        await run_callbacks()
        with pytest.raises(AdmissionError):
            world.dispatcher.check()
        await world.drain()
        await task

    run(scenario)


def test_the_predicted_wait_includes_the_remaining_time_of_running_batches() -> None:
    async def scenario() -> None:
        world = World(slo=1.0)
        task = world.request([20] * 8)  # 0.8 s
        await run_callbacks()
        with pytest.raises(AdmissionError) as rejected:
            await world.request([21] * 4)
        assert rejected.value.retry_after == pytest.approx(0.2)
        world.now += 0.25
        late = world.request([21] * 4)
        await run_callbacks()
        assert not late.done()
        await world.drain()
        await asyncio.gather(task, late)

    run(scenario)


def test_a_cancelled_request_does_not_run() -> None:
    async def scenario() -> None:
        world = World()
        first = world.request([20])
        await run_callbacks()
        cancelled = world.request([66], [66])
        await run_callbacks()
        cancelled.cancel()
        await run_callbacks()
        ran = [batch.tokens.tolist() for batch in world.in_flight[world.engines[0]]]
        await world.drain()
        await first
        assert ran == [[20]]
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    run(scenario)


def test_an_engine_with_several_slots_gets_equal_batches_at_once() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        world.dispatcher._batcher.limits = QueueLimits(1_000, 10_000)
        engine = world.engines[0]
        task = world.request(*([20] * 50 for _ in range(8)))
        await run_callbacks()
        assert [len(batch.tokens) for batch in world.in_flight[engine]] == [200, 200]
        assert engine.free_slots == 0
        await world.drain()
        await task

    run(scenario)


def test_no_batch_is_prefetched_while_another_engine_is_free() -> None:
    async def scenario() -> None:
        world = World(engines=4)
        tasks = [world.request([20] * 8) for _ in range(6)]
        await run_callbacks()
        assert sorted(len(batches) for batches in world.in_flight.values()) == [1, 1, 2, 2]
        await world.drain()
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_prefetched_batch_starts_when_a_slot_is_free() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        engine = world.engines[0]
        tasks = [world.request([20] * 8) for _ in range(3)]
        await run_callbacks()
        assert len(world.in_flight[engine]) == 3, "two run, a full one is prefetched"
        assert engine.seconds_until_free(lambda attempt: attempt.tokens / 10) == pytest.approx(1.2)
        world.now += 0.5
        world.step(engine, 1)
        assert engine.seconds_until_free(lambda attempt: attempt.tokens / 10) == pytest.approx((0.0 + 0.8) / 2), (
            "the first is overdue, the third started now"
        )
        await world.drain()
        await asyncio.gather(*tasks)

    run(scenario)


def test_the_batch_limit_recovers_after_insufficient_memory() -> None:
    async def scenario() -> None:
        world = World()
        engine, limits = world.engines[0], world.dispatcher._batcher.limits
        engine.engine_ready(replace(INFO, batch_tokens=1024))
        task = world.request(*([20] * 100 for _ in range(8)))
        await run_callbacks()
        engine.batch_failed(world.in_flight[engine].pop(0).id, "no memory", True)
        low = world.dispatcher.batch_tokens
        await world.drain()
        await task
        assert low == 400
        for _ in range(400):
            task = world.request(*([20] * 100 for _ in range(10)))
            await run_callbacks()
            await world.drain()
            await task
        assert world.dispatcher.batch_tokens == 1024 > limits.batch_tokens

    run(scenario)


@hypothesis.settings(max_examples=300)
@given(
    st.lists(ROWS, min_size=1, max_size=8),
    st.lists(st.sampled_from([0, 0, CRASHING, FAILING, CORRUPTING, CRASHING_NEXT]), min_size=8, max_size=8),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_every_request_completes_under_mixed_faults(
    requests: list[list[list[int]]], faults: list[int], engines: int, parallel: int, slow_start: bool
) -> None:
    async def scenario() -> None:
        world = World(engines, parallel=parallel, slow_start=slow_start)
        asked = [
            [[fault, *row] if fault else row for row in rows] for rows, fault in zip(requests, faults, strict=False)
        ]
        tasks = [world.request(*rows) for rows in asked]
        await world.drain()
        assert all(task.done() for task in tasks)
        for rows, fault, task in zip(asked, faults, tasks, strict=False):
            if not fault:
                assert task.result().vectors[:, 0].tolist() == [row[-1] for row in rows]
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_a_crash_while_a_health_check_batch_waits_does_not_lose_the_suspect_request() -> None:
    async def scenario() -> None:
        world = World()
        suspect = world.request([FAILING])
        await run_callbacks()
        crashing = world.request([CRASHING, *[1] * 7])
        await run_callbacks()
        await world.drain()
        results = await asyncio.wait_for(asyncio.gather(suspect, crashing, return_exceptions=True), 5)
        assert [type(result) for result in results] == [EngineFailedError, EngineUnavailableError]

    run(scenario)


def test_the_health_check_batch_has_more_than_one_token() -> None:
    async def scenario() -> None:
        world = World()
        engine = world.engines[0]
        suspect = world.request([FAILING])
        await run_callbacks()
        for _ in range(2):
            world.step(engine)
        assert all(length > 1 for batch in world.in_flight[engine] for length in batch.lengths)
        await world.drain()
        assert isinstance(suspect.exception(), EngineFailedError)
        assert world.crashes == 0

    run(scenario)


def test_a_request_after_which_engines_crash_is_rejected_and_the_next_completes() -> None:
    async def scenario() -> None:
        world = World()
        crashing_next, innocent = world.request([CRASHING_NEXT]), world.request([20] * 8)
        await asyncio.wait_for(world.drain(), 5)
        assert isinstance(crashing_next.exception(), EngineUnavailableError)
        assert innocent.result().vectors[0, 0] == 20
        assert world.crashes <= 3

    run(scenario)


def test_a_failure_next_to_a_corrupting_request_is_retried_in_isolation() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        engine = world.engines[0]
        innocent, corrupting = world.request([20] * 8), world.request([CORRUPTING, *[30] * 7])
        await run_callbacks()
        world.corrupted.add(engine)
        world.step(engine, 0)
        await world.drain()
        assert innocent.result().vectors[0, 0] == 20
        assert isinstance(corrupting.exception(), EngineUnavailableError)

    run(scenario)


def test_an_out_of_memory_failure_next_to_other_batches_is_retried_in_isolation() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        engine = world.engines[0]
        tasks = [world.request([20] * 8), world.request([30] * 8)]
        await run_callbacks()
        engine.batch_failed(world.in_flight[engine].pop(0).id, "no memory", True)
        await world.drain()
        results = await asyncio.gather(*tasks)
        assert [result.vectors[0, 0] for result in results] == [20, 30]

    run(scenario)
