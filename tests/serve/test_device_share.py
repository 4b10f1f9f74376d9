"""Several models on one device: dispatchers on a virtual clock, with engines and clients that are simulated."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inferctl.batching.batcher import Batcher, QueueLimits
from inferctl.batching.device_share import DeviceShare
from inferctl.batching.latency_model import LatencyModel
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.scheduling.dispatcher import Dispatcher
from inferctl.serve.work import RejectedError
from tests.serve.test_dispatcher import INFO

_FIXED_S, _BATCH_TOKENS, _TOKENS = 0.002, 512, 50


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        selector, self.now = selectors.SelectSelector(), 0.0
        super().__init__(selector)
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            self.now += timeout or 0.0
            return select(0)

        selector.select = jump  # type: ignore[method-assign]

    def time(self) -> float:
        return self.now


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())


class World:
    """A device with its models."""

    def __init__(self, seed: int = 1) -> None:
        self.loop, self.random, self.share = asyncio.get_running_loop(), random.Random(seed), DeviceShare()
        self.models: list[Model] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.add(task := self.loop.create_task(work))
        task.add_done_callback(self.tasks.discard)

    @property
    def used(self) -> float:
        return sum(model.running / model.slots for model in self.models)

    async def run(self, loads: Sequence[float], seconds: float) -> None:
        """Let clients send for some time, and check in between that the device never waits while there is work."""
        loading = asyncio.gather(*(m.load(times, seconds) for m, times in zip(self.models, loads, strict=True)))
        while not loading.done():
            await asyncio.sleep(0.0017)
            for _ in range(5):
                await asyncio.sleep(0)
            if self.used < 1 - 1e-9:
                assert not any(model.dispatcher.waits() for model in self.models), "the device waits"
        await loading


class Model:
    """A model whose one engine runs `slots` batches at a time, and what came of its requests."""

    def __init__(
        self, world: World, weight: float = 1.0, slots: int = 1, per_token: float = 1e-4, slo: float | None = None
    ) -> None:
        self.world, self.weight, self.slots, self.per_token = world, weight, slots, per_token
        self.latencies: list[float] = []
        self.rejected, self.running, self.hangs = 0, 0, False
        self.used_s = self.longest_s = 0.0  # of the device: by all batches, by one
        self._free = asyncio.Semaphore(slots)
        batcher = Batcher(QueueLimits(_BATCH_TOKENS, 1 << 40, slo_s=slo), LatencyModel())
        self.dispatcher = Dispatcher(batcher, Metrics(), world.loop.time, world.share, weight)
        self.dispatcher.engine_ready(self, replace(INFO, parallel=slots, batch_tokens=_BATCH_TOKENS))
        world.models.append(self)

    def send(self, batch: Batch) -> None:
        self.world.add(self._run(batch))

    async def _run(self, batch: Batch) -> None:
        async with self._free:
            if self.hangs:
                await asyncio.sleep(3600)
            assert self.world.used < 1 - 1e-9, "another batch starts on a full device"
            self.running += 1
            seconds = (_FIXED_S + self.per_token * len(batch.tokens)) * self.world.random.uniform(0.9, 1.1)
            await asyncio.sleep(seconds)
            self.running -= 1
        self.used_s += seconds / self.slots
        self.longest_s = max(self.longest_s, seconds / self.slots)
        rows = np.zeros((len(batch.lengths), 1), dtype=np.float32)
        self.dispatcher.batch_done(self, BatchResult(batch.id, rows, np.ones(len(rows), dtype=np.bool_), seconds))

    async def request(self, tokens: int) -> None:
        arrived = self.world.loop.time()
        try:
            await self.dispatcher.submit([np.zeros(tokens, dtype=np.int32)])
            self.latencies.append(self.world.loop.time() - arrived)
        except RejectedError:
            self.rejected += 1

    async def load(self, times: float, seconds: float) -> None:
        """Send a multiple of what it completes alone, at random times."""
        draw, end = self.world.random, self.world.loop.time() + seconds
        peak = self.slots / (_TOKENS * (self.per_token + _FIXED_S / _BATCH_TOKENS))
        while times and (pause := draw.expovariate(times * peak)) + self.world.loop.time() < end:
            await asyncio.sleep(pause)
            self.world.add(self.request(max(1, min(256, int(_TOKENS * draw.lognormvariate(-0.25, 0.7))))))


@pytest.mark.parametrize("seed", range(12))
def test_the_device_is_shared_by_weight_and_never_waits(seed: int) -> None:
    async def scenario() -> None:
        world, draw = World(seed), random.Random(seed)
        loads = [3.0, *draw.choices([0, 0.1, 0.5, 3.0], k=draw.randint(1, 3))]
        for _ in loads:
            Model(world, draw.choice([0.1, 0.5, 1, 3]), draw.randint(1, 3), draw.choice([1e-4, 3e-4]))
        await world.run(loads, 1.5)
        virtual = [(model.used_s / model.weight, model.longest_s / model.weight) for model in world.models]
        for (one, longest), load in zip(virtual, loads, strict=True):
            for other, others_longest in virtual:
                assert load < 3 or other <= one + 2 * (longest + others_longest), "more than its share"
        await asyncio.gather(*world.tasks)
        assert sum(model.rejected for model in world.models) == 0

    run(scenario)


# Loads in multiples of what each model completes alone, weights, SLO (s).
FLOODS = [
    ([3.0, 0.25, 0.25], [1.0, 1.0, 1.0], 0.3),
    ([3.0, 0.6, 0.1], [1.0, 4.0, 1.0], 0.3),
    ([3.0, 3.0, 0.2], [1.0, 1.0, 1.0], 0.5),
    ([3.0, 0.3, 0.3], [1.0, 1.0, 1.0], 2.0),
    ([0.3, 0.3, 0.3], [1.0, 1.0, 1.0], 0.3),
]


@pytest.mark.parametrize(("loads", "weights", "slo"), FLOODS)
def test_the_slo_of_each_model_holds_while_another_is_flooded(
    loads: list[float], weights: list[float], slo: float
) -> None:
    async def scenario() -> None:
        world = World()
        for weight, slots in zip(weights, (2, 2, 1), strict=True):
            Model(world, weight, slots, slo=slo)
        await world.run(loads, 8.0)
        await asyncio.gather(*world.tasks)
        for model, load in zip(world.models, loads, strict=True):
            late = sum(seconds > slo for seconds in model.latencies) / len(model.latencies)
            rejected = model.rejected / (model.rejected + len(model.latencies))
            # Of the responses near the SLO, one of ten may be late: `Batcher.observe`.
            most = (0.15, 1) if load > 1 else (0.01, 0.05)
            assert late < most[0] and rejected < most[1], (late, rejected)

    run(scenario)


def test_idle_time_is_not_made_up_for() -> None:
    async def scenario() -> None:
        world = World()
        busy, _ = Model(world), Model(world)
        await world.run([3.0, 0.0], 2.0)
        before = busy.used_s
        await world.run([3.0, 3.0], 1.0)
        assert before == pytest.approx(2, abs=0.1)
        assert busy.used_s - before == pytest.approx(0.5, abs=0.1)

    run(scenario)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_hanging_engine_does_not_keep_the_device(slots: int) -> None:
    async def scenario() -> None:
        world = World()
        hanging, other = Model(world, slots=slots), Model(world, slots=slots)
        hanging.hangs = True
        for _ in range(40):
            world.add(hanging.request(50))
        await asyncio.sleep(0.001)
        for _ in range(2):  # clients that send nothing more until they have a response
            await asyncio.wait_for(asyncio.gather(*(other.request(50) for _ in range(40))), 1)
            if hanging.hangs:  # in the end it is killed
                hanging.dispatcher.engine_lost(hanging)
                hanging.hangs = False

    run(scenario)
