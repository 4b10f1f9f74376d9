"""The API process from start to end: port, engines, HTTP, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import inferctl
from inferctl import hub, outputs
from inferctl.errors import EXIT_INTERRUPTED, NotReadyError, UsageError
from inferctl.model import ModelFolder
from inferctl.serve import app as http_app
from inferctl.serve import describe, logs, recipe, web
from inferctl.serve.batcher import Batcher
from inferctl.serve.batcher import Limits as QueueLimits
from inferctl.serve.dispatcher import Dispatcher
from inferctl.serve.metrics import Metrics
from inferctl.serve.pace import Capacity, Pace
from inferctl.serve.supervisor import Supervisor
from inferctl.serve.tokenise import TokenizerPool
from inferctl.serve.types import EngineConfig, EngineInfo
from inferctl.spec import Spec

_EXIT_AT_ONCE = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Options:
    """What is not part of the spec. `announce` is written once the server is ready; `image` is (reference, digest) inside a container.

    `engines`: None for one a device. `hang_seconds`: an engine is killed when a batch takes that long, or twenty times what it should.
    `capacity`: a measurement to start from. `log`: text or json. `traces`: whether OpenTelemetry is configured.
    """

    device: str = "auto"
    engine: str = "encoder"
    truncate: bool = True
    announce: Path | None = None
    image: tuple[str, str | None] | None = None
    engines: int | None = None
    hang_seconds: float = 60.0
    capacity: Path | None = None
    log: str = "text"
    traces: bool = False


def run(spec: Spec, options: Options, say: Callable[[str], None], fetch: hub.Fetch | None = None) -> int:
    """Serve until told to stop; returns the exit code. `say` gets lines for people.

    `fetch` brings the model. Without it, or if all lines are JSON, the progress of a download are lines as well.
    Raises `UsageError` for a model that is not there or not usable, `NotReadyError` for a port or a device that is not.
    """
    if options.log not in ("text", "json"):
        raise UsageError(f"there is no log style {options.log!r}", "--log takes text or json")
    logs.configure(options.log)
    # Its own threads, one a core, would compete with batches that have a core each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    say = logs.speaker(options.log, say)
    if options.announce:
        outputs.retract(options.announce)
    source, revision = spec.model.source, spec.model.revision
    if fetch is None or options.log == "json":
        folder = hub.fetch(source, revision, hub.Lines(source, say))
    else:
        folder = fetch(source, revision)
    loop_factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner, _Stops() as stops:
        return runner.run(Server(spec, options, say, folder).run(stops))


class _Stops:
    """SIGINT and SIGTERM while the server exists, none of them as an exception.

    An exception can interrupt the start of a thread at any point. Python then waits for that thread forever at exit.
    """

    def __init__(self) -> None:
        self._early: list[int] = []
        self._deliver: Callable[[int], object] = self._early.append

    def __enter__(self) -> _Stops:
        self._before = {
            number: signal.signal(number, lambda number, _: self._deliver(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def call(self, stop: Callable[[int], None]) -> None:
        """Call `stop` on the running event loop with each signal, first with those that have arrived."""
        loop = asyncio.get_running_loop()
        self._deliver = lambda number: loop.call_soon_threadsafe(stop, number)
        for number in self._early:
            stop(number)


class Server:
    """One running server."""

    def __init__(self, spec: Spec, options: Options, say: Callable[[str], None], folder: ModelFolder) -> None:
        self._spec, self._options, self._say, self._folder = spec, options, say, folder
        self._recipe = recipe.read(self._folder.path, spec.serve.max_input_tokens)
        metrics = Metrics()
        capacity = Capacity.read(options.capacity) if options.capacity else None
        slo_ms = spec.slo.p99_ms or (capacity and capacity.slo_p99_ms)
        queue = QueueLimits(
            spec.serve.max_batch_tokens, spec.serve.max_queue_tokens, slo=slo_ms / 1000 if slo_ms else None
        )
        self._dispatcher = Dispatcher(Batcher(queue, Pace(capacity)), metrics)
        self._state = http_app.State(
            name=spec.name,
            aliases=frozenset({spec.model.source}),
            limits=http_app.Limits(
                max_inputs=spec.serve.max_client_batch,
                max_input_tokens=self._recipe.max_tokens,
                max_queue_tokens=spec.serve.max_queue_tokens,
                truncate=options.truncate,
            ),
            tokenizer=TokenizerPool(self._folder.path, self._recipe, on_cut=metrics.truncated.inc),
            dispatcher=self._dispatcher,
            metrics=metrics,
            matryoshka=self._recipe.matryoshka,
            describe=self._describe,
            log_requests=options.log == "json",
            hopeless=lambda: all(supervisor.hopeless for supervisor in self._supervisors),
        )
        if options.traces:
            from inferctl.serve import tracing

            self._state.trace = tracing.tracer(spec.name, inferctl.__version__)
        self._config = EngineConfig(
            engine="echo" if options.engine == "echo" else "encoder",
            model=str(self._folder.path),
            precision=spec.serve.precision,
            device=options.device,
            max_input_tokens=spec.serve.max_input_tokens,
            max_batch_tokens=spec.serve.max_batch_tokens,
            log=options.log,
        )
        self._supervisors: list[Supervisor] = []
        self._engines: list[asyncio.Task[None]] = []
        self._info: dict[str, Any] | None = None
        self._started, self._ready_seconds = time.monotonic(), 0.0
        self._signals = 0
        self._interrupted = False
        self._failure: NotReadyError | None = None

    async def run(self, stops: _Stops) -> int:
        """Serve until a signal; returns the exit code."""
        web.allow_connections()
        self._state.tokenizer.warm()
        listener = web.listen(self._spec.serve.host, self._spec.serve.port)
        self._url = web.url_of(listener, self._spec.serve.host)
        self._web = web.Web(
            http_app.create(self._state), self._spec.serve.drain_seconds, self._state.limits.max_body_bytes
        )
        for _ in range(self._options.engines or 1):
            self._add_engine(self._config)
        serving = asyncio.create_task(self._web.serve(sockets=[listener]))
        stops.call(self._signal)
        await asyncio.wait((serving, self._engines[0]), return_when=asyncio.FIRST_COMPLETED)
        self._web.close()
        await serving
        for supervisor in self._supervisors:
            supervisor.stop()
        await asyncio.gather(*self._engines)
        self._state.tokenizer.close()
        if self._failure:
            raise self._failure
        if unanswered := self._state.load.accepted:
            self._say(f"stopped with {unanswered} requests unanswered after {self._spec.serve.drain_seconds:g} s")
            return 1
        self._say("stopped")
        return EXIT_INTERRUPTED if self._interrupted else 0

    def _add_engine(self, config: EngineConfig) -> None:
        lane, first = self._dispatcher.lane(), not self._supervisors
        supervisor = Supervisor(
            config,
            lane,
            lambda: self._dispatcher.patience(self._options.hang_seconds, self._recipe.max_tokens),
            essential=first,
        )
        lane.write, lane.kill = supervisor.send, supervisor.kill
        lane.on_ready, lane.on_lost = self._ready, self._lost
        self._supervisors.append(supervisor)
        self._engines.append(asyncio.create_task(supervisor.run()))

    def _signal(self, number: int) -> None:
        self._signals += 1
        self._interrupted |= number == signal.SIGINT
        if self._signals > 1:
            for supervisor in self._supervisors:
                if supervisor.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(supervisor.pid, signal.SIGKILL)
            os._exit(EXIT_INTERRUPTED if self._interrupted else _EXIT_AT_ONCE)
        self._say(f"shutting down: {self._state.load.requests} requests to finish; once more stops at once")
        self._state.draining = True
        # Who sends requests hears of it a moment late. A person at a terminal, or a server that is not up yet, need not wait.
        grace = 0 if self._interrupted or not self._state.started else self._spec.serve.grace_seconds
        asyncio.get_running_loop().call_later(grace, self._close)

    def _close(self) -> None:
        self._state.closed = True
        self._web.close()

    def _ready(self, info: EngineInfo) -> None:
        state = self._state
        state.dimensions = info.dimensions
        self._info = describe.document(self._spec, self._folder, self._recipe, state.limits, info, self._options.image)
        if self._options.engines is None and len(self._supervisors) == 1:
            for index in range(1, info.device.count):
                self._add_engine(replace(self._config, device=f"cuda:{index}"))
        if state.started:
            self._say(f"an engine is up, {self._up()}")
            return
        state.started = True
        self._ready_seconds = time.monotonic() - self._started
        gc.collect()
        gc.freeze()
        if state.draining:
            return
        for line in describe.lines(info, self._spec.name, self._url, self._ready_seconds):
            self._say(line)
        if self._options.announce:
            try:
                outputs.announce(self._options.announce, self._url)
            except NotReadyError as error:
                # Whoever watches the file would wait for ever.
                self._failure = error
                self._close()

    def _lost(self) -> None:
        self._state.metrics.engine_restarts.set(sum(supervisor.restarts for supervisor in self._supervisors))

    def _up(self) -> str:
        up = sum(lane.up for lane in self._dispatcher.lanes)
        restarts = sum(supervisor.restarts for supervisor in self._supervisors)
        return f"{up} of {len(self._supervisors)} (restarts so far: {restarts})"

    def _describe(self) -> dict[str, Any] | None:
        """The document of `GET /info`."""
        if self._info is None:
            return None
        limits = {
            **self._info["limits"],
            "max_batch_tokens": self._dispatcher.batch_tokens,
            "slo_p99_ms": self._dispatcher.slo_ms,
        }
        engines = {
            "count": len(self._supervisors),
            "up": sum(lane.up for lane in self._dispatcher.lanes),
            "restarts": sum(supervisor.restarts for supervisor in self._supervisors),
            "hangs": sum(supervisor.hangs for supervisor in self._supervisors),
            "out_of_memory": self._dispatcher.out_of_memory,
        }
        return {
            **self._info,
            "limits": limits,
            "engines": engines,
            "restarts": engines["restarts"],
            "pace": self._dispatcher.pace,
            "ready_seconds": round(self._ready_seconds, 3),
        }
