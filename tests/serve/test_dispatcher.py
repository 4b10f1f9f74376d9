"""The dispatcher on a virtual clock, with engines that the tests play themselves."""

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

from inferctl.serve.batcher import Batcher, Limits, RefusedError
from inferctl.serve.dispatcher import Dispatcher, EngineFailedError, EngineUnavailableError
from inferctl.serve.lane import Lane
from inferctl.serve.metrics import Metrics
from inferctl.serve.pace import Capacity, Pace
from inferctl.serve.types import Batch, BatchResult, DeviceInfo, EngineInfo, PrecisionInfo, Tokens

INFO = EngineInfo(
    1, "none", "", PrecisionInfo("fp32", "fp32", "native", ""), DeviceInfo("cpu", "virtual", None, 0), batch_tokens=8
)
KILLER, FAILING, SICKENING, CURSING = 666, 13, 14, 15


class World:
    """A dispatcher over engines that take a second for ten tokens."""

    def __init__(
        self, engines: int = 1, slo: float | None = None, parallel: int = 1, *, slow_start: bool = False
    ) -> None:
        """`slow_start`: an engine that died comes back when the others have nothing to do any more, and not at once."""
        self.now, self.slow_start = 0.0, slow_start
        self.down: list[Lane] = []
        self.info = replace(INFO, parallel=parallel)
        limits = Limits(8, 1_000, slo=slo)
        self.dispatcher = Dispatcher(Batcher(limits, Pace(Capacity(0.0, 10.0))), Metrics(), lambda: self.now)
        self.lanes = [self.dispatcher.lane() for _ in range(engines)]
        self.with_engine: dict[Lane, list[Batch]] = {lane: [] for lane in self.lanes}
        self.deaths = 0
        for lane in self.lanes:
            lane.write = self.with_engine[lane].append
            lane.kill = lambda lane=lane: self.die(lane)  # type: ignore[misc]
            lane.engine_ready(self.info)
        self.sick: set[Lane] = set()
        self.cursed: set[Lane] = set()  # will die of whatever they run next

    def die(self, lane: Lane) -> None:
        self.deaths += 1
        self.with_engine[lane].clear()
        self.sick.discard(lane)
        self.cursed.discard(lane)
        lane.engine_lost()
        if self.slow_start:
            self.down.append(lane)
        else:
            lane.engine_ready(self.info)

    def step(self, lane: Lane, which: int = 0) -> None:
        """The engine ends one of the batches that it runs, one way or another."""
        batch = self.with_engine[lane].pop(which)
        self.now += len(batch.tokens) / 10
        if SICKENING in batch.tokens:
            self.sick.add(lane)
        if KILLER in batch.tokens or lane in self.cursed:
            self.die(lane)
        elif {FAILING, CURSING} & set(batch.tokens.tolist()) or lane in self.sick:
            if CURSING in batch.tokens:
                self.cursed.add(lane)
            lane.batch_failed(batch.id, "asked to fail", False)
        else:
            ends = np.cumsum(batch.lengths) - 1
            vectors = batch.tokens[ends].astype(np.float32)[:, None]
            lane.batch_done(BatchResult(batch.id, vectors, np.ones(len(ends), dtype=np.bool_), len(batch.tokens) / 10))

    async def drain(self) -> None:
        await settled()
        while (busy := [lane for lane in self.lanes if self.with_engine[lane]]) or self.down:
            if not busy:
                self.down.pop().engine_ready(self.info)
            for lane in busy:
                assert len(self.with_engine[lane]) <= self.info.parallel + 1
                # The youngest of those that run is done first: the order of answers is not that of batches.
                self.step(lane, min(len(self.with_engine[lane]), self.info.parallel) - 1)
            await settled()

    def ask(self, *rows: list[int]) -> asyncio.Task[Any]:
        async def answer() -> Any:
            return await self.dispatcher.begin([tokens(row) for row in rows])

        return asyncio.ensure_future(answer())


async def settled() -> None:
    """Requests are queued, what arrived together is sent, answers are taken."""
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
    st.sampled_from([KILLER, FAILING, SICKENING, CURSING]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
@hypothesis.example([[[22] * 2], [[20] * 3], [[24]]], {1}, CURSING, 2, 1, True)
def test_whoever_is_not_at_fault_is_answered(
    requests: list[list[list[int]]], bad: set[int], how: int, engines: int, parallel: int, slow_start: bool
) -> None:
    async def scenario() -> None:
        world = World(engines, parallel=parallel, slow_start=slow_start)
        asked = [[[how, *row] if i in bad else row for row in rows] for i, rows in enumerate(requests)]
        tasks = [world.ask(*rows) for rows in asked]
        await world.drain()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for i, (rows, answer) in enumerate(zip(asked, answers, strict=True)):
            if i in bad:
                assert isinstance(answer, EngineFailedError if how == FAILING else EngineUnavailableError)
            else:
                assert answer.vectors[:, 0].tolist() == [row[-1] for row in rows]
        # A killer may be with every engine at once, first in company, then alone; the second death alone is the last.
        # A request that makes engines sick, or die later, does so until it fails on a fresh one, alone: once for each half that it was in.
        assert how in (SICKENING, CURSING) or world.deaths <= (2 * engines * parallel + 1) * len(bad)

    run(scenario)


def test_a_batch_sent_ahead_is_no_suspect_and_runs_in_company_again() -> None:
    async def scenario() -> None:
        world = World()
        lane = world.lanes[0]
        first = world.ask([20])
        await settled()
        tasks = [world.ask([KILLER, 1, 1]), *(world.ask([30 + i, 1, 1]) for i in range(6))]
        await settled()
        world.step(lane)
        await settled()
        assert [len(batch.lengths) for batch in world.with_engine[lane]] == [2, 2], "the killer's and one ahead"
        world.step(lane)  # dies
        sizes = []
        while world.with_engine[lane]:
            sizes.append([len(batch.lengths) for batch in world.with_engine[lane]])
            world.step(lane)
            await settled()
        assert sizes[:3] == [[1], [1], [1]], "the killer, its neighbour, the killer again: each with nothing beside it"
        assert sizes[3:] == [[2, 2], [2], [1]]
        answers = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [isinstance(answer, EngineUnavailableError) for answer in answers] == [False, True, *[False] * 6]

    run(scenario)


def test_the_engine_with_the_least_to_do_is_next() -> None:
    async def scenario() -> None:
        world = World(engines=2)
        one, two = world.lanes
        tasks = [world.ask([20] * 7), world.ask([21] * 2)]
        await settled()
        assert (one.tokens, two.tokens) == (7, 2)
        world.step(two)
        tasks.append(world.ask([22] * 3))
        await settled()
        assert (one.tokens, two.tokens) == (7, 3)
        await world.drain()
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_request_that_comes_too_late_anyway_is_refused_before_its_body_is_read() -> None:
    async def scenario() -> None:
        world = World(slo=0.5)
        world.dispatcher.check()
        task = world.ask([20] * 8)  # 0.8 s
        await settled()
        with pytest.raises(RefusedError):
            world.dispatcher.check()
        await world.drain()
        await task

    run(scenario)


def test_what_runs_counts_for_the_wait_and_time_that_passed_does_not() -> None:
    async def scenario() -> None:
        world = World(slo=1.0)
        task = world.ask([20] * 8)  # 0.8 s
        await settled()
        with pytest.raises(RefusedError) as refused:
            await world.ask([21] * 4)
        assert refused.value.retry_after == pytest.approx(0.2)
        world.now += 0.25
        late = world.ask([21] * 4)
        await settled()
        assert not late.done()
        await world.drain()
        await asyncio.gather(task, late)

    run(scenario)


def test_a_cancelled_request_never_runs() -> None:
    async def scenario() -> None:
        world = World()
        first = world.ask([20])
        await settled()
        gone = world.ask([66], [66])
        await settled()
        gone.cancel()
        await settled()
        ran = [batch.tokens.tolist() for batch in world.with_engine[world.lanes[0]]]
        await world.drain()
        await first
        assert ran == [[20]]
        with pytest.raises(asyncio.CancelledError):
            await gone

    run(scenario)


def test_an_engine_that_runs_several_batches_gets_them_at_once_and_of_equal_size() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        world.dispatcher._batcher.limits = Limits(1_000, 10_000)
        lane = world.lanes[0]
        task = world.ask(*([20] * 50 for _ in range(8)))
        await settled()
        assert [len(batch.tokens) for batch in world.with_engine[lane]] == [200, 200]
        assert lane.free == 0
        await world.drain()
        await task

    run(scenario)


def test_nothing_is_sent_ahead_while_another_engine_is_free() -> None:
    async def scenario() -> None:
        world = World(engines=4)
        tasks = [world.ask([20] * 8) for _ in range(6)]
        await settled()
        assert sorted(len(batches) for batches in world.with_engine.values()) == [1, 1, 2, 2]
        await world.drain()
        await asyncio.gather(*tasks)

    run(scenario)


def test_a_batch_that_waits_for_a_slot_begins_when_one_is_free() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        lane = world.lanes[0]
        tasks = [world.ask([20] * 8) for _ in range(3)]
        await settled()
        assert len(world.with_engine[lane]) == 3, "two run, a full one is sent ahead"
        assert lane.left(lambda sent: sent.tokens / 10) == pytest.approx(1.2)
        world.now += 0.5
        world.step(lane, 1)
        assert lane.left(lambda sent: sent.tokens / 10) == pytest.approx((0.0 + 0.8) / 2), (
            "the first is overdue, the third began now"
        )
        await world.drain()
        await asyncio.gather(*tasks)

    run(scenario)


def test_the_batch_limit_grows_back_after_memory_was_short() -> None:
    async def scenario() -> None:
        world = World()
        lane, limits = world.lanes[0], world.dispatcher._batcher.limits
        lane.engine_ready(replace(INFO, batch_tokens=1024))
        task = world.ask(*([20] * 100 for _ in range(8)))
        await settled()
        lane.batch_failed(world.with_engine[lane].pop(0).id, "no memory", True)
        low = world.dispatcher.batch_tokens
        await world.drain()
        await task
        assert low == 400
        for _ in range(400):
            task = world.ask(*([20] * 100 for _ in range(10)))
            await settled()
            await world.drain()
            await task
        assert world.dispatcher.batch_tokens == 1024 > limits.batch_tokens

    run(scenario)


@hypothesis.settings(max_examples=300)
@given(
    st.lists(ROWS, min_size=1, max_size=8),
    st.lists(st.sampled_from([0, 0, KILLER, FAILING, SICKENING, CURSING]), min_size=8, max_size=8),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_faults_of_several_kinds_leave_nobody_without_an_answer(
    requests: list[list[list[int]]], faults: list[int], engines: int, parallel: int, slow_start: bool
) -> None:
    async def scenario() -> None:
        world = World(engines, parallel=parallel, slow_start=slow_start)
        asked = [
            [[fault, *row] if fault else row for row in rows] for rows, fault in zip(requests, faults, strict=False)
        ]
        tasks = [world.ask(*rows) for rows in asked]
        await world.drain()
        assert all(task.done() for task in tasks)
        for rows, fault, task in zip(asked, faults, tasks, strict=False):
            if not fault:
                assert task.result().vectors[:, 0].tolist() == [row[-1] for row in rows]
        await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


def test_an_engine_that_dies_while_a_doubt_waits_does_not_lose_the_suspect() -> None:
    async def scenario() -> None:
        world = World()
        suspect = world.ask([FAILING])
        await settled()
        killer = world.ask([KILLER, *[1] * 7])
        await settled()
        await world.drain()
        answers = await asyncio.wait_for(asyncio.gather(suspect, killer, return_exceptions=True), 5)
        assert [type(answer) for answer in answers] == [EngineFailedError, EngineUnavailableError]

    run(scenario)


def test_the_health_check_batch_is_one_that_an_engine_without_one_token_attention_computes() -> None:
    async def scenario() -> None:
        world = World()
        lane = world.lanes[0]
        suspect = world.ask([FAILING])
        await settled()
        for _ in range(2):
            world.step(lane)
        assert all(length > 1 for batch in world.with_engine[lane] for length in batch.lengths)
        await world.drain()
        assert isinstance(suspect.exception(), EngineFailedError)
        assert world.deaths == 0

    run(scenario)


def test_a_request_that_engines_die_after_is_given_up_and_the_next_is_answered() -> None:
    async def scenario() -> None:
        world = World()
        cursing, innocent = world.ask([CURSING]), world.ask([20] * 8)
        await asyncio.wait_for(world.drain(), 5)
        assert isinstance(cursing.exception(), EngineUnavailableError)
        assert innocent.result().vectors[0, 0] == 20
        assert world.deaths <= 3

    run(scenario)


def test_who_fails_beside_what_spoils_the_engine_is_tried_again_alone() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        lane = world.lanes[0]
        innocent, spoiling = world.ask([20] * 8), world.ask([SICKENING, *[30] * 7])
        await settled()
        world.sick.add(lane)
        world.step(lane, 0)
        await world.drain()
        assert innocent.result().vectors[0, 0] == 20
        assert isinstance(spoiling.exception(), EngineUnavailableError)

    run(scenario)


def test_a_text_that_ran_out_of_memory_beside_others_is_tried_alone() -> None:
    async def scenario() -> None:
        world = World(parallel=2)
        lane = world.lanes[0]
        tasks = [world.ask([20] * 8), world.ask([30] * 8)]
        await settled()
        lane.batch_failed(world.with_engine[lane].pop(0).id, "no memory", True)
        await world.drain()
        answers = await asyncio.gather(*tasks)
        assert [answer.vectors[0, 0] for answer in answers] == [20, 30]

    run(scenario)
