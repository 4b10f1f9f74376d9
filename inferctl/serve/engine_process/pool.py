"""The engine processes of one server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from inferctl.serve.engine_process.engine_protocol import EngineConfig, EngineInfo, Listener
from inferctl.serve.engine_process.supervisor import EngineSupervisor


class EnginePool:
    """Starts the engines of a server, assigns their devices and keeps them running.

    `count`: how many engines; None for one per GPU that `config.device` can use, else one. The first engine checks the
    model; the others start when it is ready, and use its results. `on_ready` is called after each start of an engine,
    `on_phase` with each phase of a start. `name`: of an engine, in messages.
    """

    def __init__(
        self,
        config: EngineConfig,
        count: int | None,
        listener: Listener,
        batch_timeout: Callable[[], float],
        on_ready: Callable[[EngineInfo], None] = lambda _: None,
        on_phase: Callable[[str], None] = lambda _: None,
        name: str = EngineSupervisor.name,
    ) -> None:
        self._config, self._count, self._listener = config, count, listener
        self._batch_timeout, self._on_ready, self._on_phase, self._name = batch_timeout, on_ready, on_phase, name
        self._supervisors: list[EngineSupervisor] = []
        self._tasks, self._stopped = asyncio.TaskGroup(), False

    def counts(self) -> dict[str, int]:
        """Return how many engines there are (`count`) and accept batches (`up`), and their `restarts` and `hangs`."""
        return {
            "count": len(self._supervisors),
            "up": sum(supervisor.ready for supervisor in self._supervisors),
            "restarts": sum(supervisor.restarts for supervisor in self._supervisors),
            "hangs": sum(supervisor.hangs for supervisor in self._supervisors),
        }

    @property
    def crash_looping(self) -> bool:
        """Whether every engine fails to start."""
        return all(supervisor.crash_looping for supervisor in self._supervisors)

    async def run(self) -> None:
        """Keep the engines running until `stop`.

        Raises `EngineStartError` if the first start of the first engine fails, and any other error of a supervisor.
        Then all engines end.
        """
        try:
            async with self._tasks:
                self._add(self._config)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    def stop(self) -> None:
        """Let the engines end. `run` returns soon after, also if it is called later."""
        self._stopped = True
        for supervisor in self._supervisors:
            supervisor.stop()

    def kill(self) -> None:
        """Kill all engine processes."""
        for supervisor in self._supervisors:
            supervisor.kill()

    def _add(self, config: EngineConfig) -> None:
        supervisor = EngineSupervisor(config, self._listener, self._batch_timeout, self._engine_ready, self._on_phase)
        supervisor.name = self._name
        self._supervisors.append(supervisor)
        if self._stopped:
            supervisor.stop()
        self._tasks.create_task(supervisor.run())

    def _engine_ready(self, info: EngineInfo) -> None:
        if len(self._supervisors) == 1:
            for config in more_engines(self._config, self._count, info):
                self._add(config)
        self._on_ready(info)


def more_engines(config: EngineConfig, count: int | None, first: EngineInfo) -> list[EngineConfig]:
    """Return the configurations of all engines but the first, whose info is `first`.

    The engines share the GPUs that `config.device` can use evenly.
    """
    gpus = first.device.count
    devices = [f"cuda:{index % gpus}" if gpus > 1 else config.device for index in range(count or gpus)]
    return [replace(config, device=device, previous_info=first.to_json()) for device in devices[1:]]
