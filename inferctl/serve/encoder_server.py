"""The server of the encoder tasks: its parts, from the edge to the engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from inferctl.batching.batcher import Batcher, QueueLimits
from inferctl.batching.latency_model import Capacity, LatencyModel
from inferctl.config.spec import Spec, Task
from inferctl.core import cgroup
from inferctl.core.sizes import parse_size
from inferctl.models.model import ModelFolder
from inferctl.reading import task_config
from inferctl.serve import event_loop
from inferctl.serve.api import app
from inferctl.serve.backend.local_backend import LocalBackend
from inferctl.serve.cache import vector_cache
from inferctl.serve.edge import access
from inferctl.serve.edge.exchange import Exchange
from inferctl.serve.edge.pages import Page, Pages
from inferctl.serve.engine_process.engine_protocol import EngineConfig, EngineInfo
from inferctl.serve.engine_process.pool import EnginePool
from inferctl.serve.front_end import FrontEnd
from inferctl.serve.lifetime import ServerLifetime
from inferctl.serve.observe import describe
from inferctl.serve.observe.metrics import Metrics, objectives
from inferctl.serve.observe.progress import StartProgress
from inferctl.serve.options import ServerOptions
from inferctl.serve.processes.api_processes import ApiProcesses
from inferctl.serve.scheduling.dispatcher import Dispatcher
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from inferctl.tenancy.access.limits import Limiter

# `serve.api_processes: auto`. One API process does not keep a GPU busy with small models; a CPU needs its cores itself.
_CORES_PER_API_PROCESS, _MOST_AUTO = 4, 4


class EncoderServer(ServerLifetime):
    """One running server of an encoder task."""

    def __init__(
        self,
        spec: Spec,
        task: Task,
        options: ServerOptions,
        notify: Callable[[str], None],
        folder: ModelFolder,
        progress: StartProgress,
    ) -> None:
        self._folder, self._config = folder, task_config.read(task, folder.path, spec.serve.max_input_tokens)
        self._capacity = Capacity.read(options.capacity) if options.capacity else None
        capacity_slo_ms = self._capacity.slo_p99_ms if self._capacity else None
        slo_ms = spec.slo.p99_ms or capacity_slo_ms
        self._admission = describe.admission_line(spec.slo.p99_ms, capacity_slo_ms)
        self._processes = processes = _api_processes(spec)
        super().__init__(spec, task, options, notify, progress, records=processes == 1)
        # Each part gets those that it passes a request on to, so the first ones are the last that a request meets.
        self._metrics = metrics = Metrics(objectives(spec.slo, slo_ms))
        self._batcher = Batcher(_queue_limits(spec, slo_ms), LatencyModel(self._capacity))
        self._dispatcher = Dispatcher(self._batcher, metrics)
        self._pool = EnginePool(
            _engine_config(spec, task, options, folder),
            options.engines,
            self._dispatcher,
            self._batch_timeout,
            self._engine_ready,
            progress.phase,
        )
        self._cache = vector_cache.create(spec.cache, task, metrics)
        limiter = Limiter(spec.access.replicas, exchanges=spec.access.broker is not None)
        self._exchange = Exchange.of(spec.access, limiter, spec.name, self._revoke)
        self._backend = LocalBackend(self._dispatcher, metrics, self._cache, limiter)
        self._tokenizer = TokenizerPool(folder.path, self._config, on_truncated=metrics.truncated.inc)
        self._sizes = {"dimensions": 0, "token_dimensions": 0, "vocabulary_size": 0}
        self._engine: EngineInfo | None = None  # the first one that was ready
        self._device: dict[str, Any] | None = None  # that of the last one
        self._api: ApiProcesses | None = None
        self._front: FrontEnd | ApiProcesses
        self._pages = Pages(self._lifecycle, self._describe, self._exposition, app.served(self._config))
        if processes == 1:
            self._front = FrontEnd(
                spec,
                self._config,
                self._setup,
                metrics,
                self._tokenizer,
                self._backend,
                self._page,
                truncate=options.truncate,
            )
        else:
            welcome = {
                "spec": _for_api_processes(spec, processes),
                "task": task,
                "folder": str(folder.path),
                "processes": processes,
                "truncate": options.truncate,
                "log": options.log,
                "traces": options.traces,
                "slo": objectives(spec.slo, slo_ms),
            }
            self._front = self._api = ApiProcesses(
                processes, welcome, self._backend, self._page, self._state, self._start, spec.serve.drain_seconds
            )
        metrics.engine_restarts.set_function(lambda: self._pool.counts()["restarts"])
        metrics.watch_capacity(self._rates)
        metrics.watch_threads("api" if processes == 1 else "backend", self._tokenizer.threads)
        self._engines: asyncio.Task[None] | None = None
        self._scrape: asyncio.Task[Page] | None = None
        self._info: dict[str, Any] | None = None
        self._ready_seconds = 0.0

    def _ready(self) -> bool:
        return self._dispatcher.ready and self._front.up > 0

    def _live(self) -> bool:
        return not (self._pool.crash_looping or (self._api is not None and self._api.crash_looping))

    async def _serve(self) -> int:
        self._metering.watch(self._metrics)
        self._engines = asyncio.create_task(self._pool.run())
        exchange = asyncio.create_task(self._exchange.run()) if self._exchange else None
        serving = asyncio.create_task(self._front.serve([self._socket]))
        await asyncio.wait((serving, self._engines), return_when=asyncio.FIRST_COMPLETED)
        if self._engines.done():
            self._dispatcher.fail_all("the server ends because of an error")
        self._front.close()
        await serving
        if exchange:
            exchange.cancel()
            await asyncio.wait((exchange,))
        return self._front.unfinished_responses

    async def _end(self) -> None:
        self._pool.stop()
        if self._engines:
            await self._engines

    def _drain(self) -> str:
        return f"requests in flight: {self._front.in_flight}; "

    def _close(self, seconds: float) -> None:
        self._front.close()

    def _kill(self) -> None:
        self._pool.kill()
        if self._api:
            self._api.kill()

    def _batch_timeout(self) -> float:
        """Return the seconds after which a batch counts as hung: 20 times the largest one, at least `hang_seconds`."""
        largest = max(self._batcher.limits.batch_tokens, self._config.max_tokens)
        return max(self._options.hang_seconds, 20 * self._batcher.latency.seconds(largest))

    def _engine_ready(self, info: EngineInfo) -> None:
        self._metering.ready(asdict(info.device), self._folder.digest)
        self._device = asdict(info.device)
        size = info.vocabulary_size or self._tokenizer.vocabulary_size
        vectors = {"dimensions": info.dimensions, "token_dimensions": info.token_dimensions}
        self._sizes = vectors | {"vocabulary_size": size}
        if isinstance(self._front, FrontEnd):
            self._front.set_sizes(self._sizes)
        self._info = describe.document(
            self._spec,
            self._folder,
            self._config,
            self._tokenizer.facts,
            info,
            self._options.truncate,
            self._options.image,
        )
        self._metrics.describe_model(self._info)
        if rate := info.matrix_rate:
            self._metrics.matrix_rate.labels(rate.source).set(rate.flops_per_s * self._pool.counts()["count"])
        if self._lifecycle.started:
            engines = self._pool.counts()
            counts = f"ready: {engines['up']} of {engines['count']}, restarts: {engines['restarts']}"
            self._notify(f"an engine is ready; {counts}")
            return
        self._engine = info
        self._start()

    def _start(self) -> None:
        """Say that the server is ready, once an engine and an API process are."""
        lifecycle, info = self._lifecycle, self._engine
        if info is None or lifecycle.started or not self._front.up:
            return
        lifecycle.started = True
        self._progress.stop()
        self._ready_seconds = time.monotonic() - self._started
        event_loop.freeze_garbage()
        if lifecycle.draining:
            return
        spec = self._spec
        if self._api:
            self._notify(f"processes  {self._processes} API processes, and this one with limits, queue and cache")
        for line in describe.lines(
            info, spec.name, self._url, self._ready_seconds, spec.access, self._admission, self._config
        ):
            self._notify(line)
        if not access.known(self._access):
            self._notify("warning    the relay has not copied the keys yet; requests get 503 until then")
        if self._api:
            self._api.update()  # else a process could still reject who reads here that the server is ready
        self._announce()

    def _revoke(self, ids: Iterable[str]) -> None:
        if self._access:
            self._access.revoke(ids)
        if self._api:
            self._api.revoke(list(ids))

    async def _page(self, path: str) -> Page:
        """Return what the whole server answers, with what all API processes counted."""
        if self._api:
            self._api.update()  # else a process that does not know it yet could reject who reads here that it is ready
        if path != "/metrics":
            return await self._pages.answer(path)
        # One for all who ask meanwhile: each takes 1 ms, in which this process does nothing for other requests.
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.create_task(self._scraped())
        return await asyncio.shield(self._scrape)

    async def _scraped(self) -> Page:
        if self._api:
            await self._api.scrape()
        return await self._pages.answer("/metrics")

    def _exposition(self) -> tuple[bytes, str]:
        return self._metrics.exposition(self._api.totals.collect if self._api else None)

    def _state(self) -> dict[str, Any]:
        """Return what API processes need to know of this server."""
        lifecycle = self._lifecycle
        state: dict[str, Any] = {
            "ready": self._dispatcher.ready,
            "device": self._device,
            "digest": self._folder.digest,
            **self._sizes,
        }
        state |= {name: getattr(lifecycle, name) for name in ("started", "draining", "closed")}
        return state

    def _rates(self) -> dict[str, float]:
        """Return the tokens per second of this server by source; without those that are not known."""
        batcher, capacity = self._batcher, self._capacity
        size = batcher.limits.batch_tokens, batcher.slots
        rates = {
            "capacity_file": capacity.tokens_per_second(*size) if capacity else None,
            "fitted": batcher.latency.tokens_per_second(*size),
        }
        return {source: rate for source, rate in rates.items() if rate is not None}

    def _describe(self) -> dict[str, Any] | None:
        """Return the document of `GET /info`; None before an engine was ready."""
        if self._info is None:
            return None
        engines, limits = self._pool.counts(), self._batcher.limits
        slo_ms = None if limits.slo_s is None else limits.slo_s * 1000
        return {
            **self._info,
            "limits": {**self._info["limits"], "max_batch_tokens": limits.batch_tokens, "slo_p99_ms": slo_ms},
            "tokenizer": self._tokenizer.library,
            "engines": {**engines, "out_of_memory": self._dispatcher.out_of_memory},
            "api_processes": {"count": self._processes, "up": self._front.up, "restarts": self._front.restarts},
            "restarts": engines["restarts"],
            "pace": self._batcher.latency.to_json(),
            "ready_seconds": round(self._ready_seconds, 3),
        }


def _queue_limits(spec: Spec, slo_ms: float | None) -> QueueLimits:
    return QueueLimits(
        spec.serve.max_batch_tokens,
        spec.serve.max_queue_tokens,
        max_wait_s=spec.serve.max_wait_seconds,
        slo_s=slo_ms / 1000 if slo_ms else None,
    )


def _engine_config(spec: Spec, task: Task, options: ServerOptions, folder: ModelFolder) -> EngineConfig:
    return EngineConfig(
        engine="echo" if options.engine == "echo" else "encoder",
        task=task,
        model=str(folder.path),
        precision=spec.serve.precision,
        device=options.device,
        max_input_tokens=spec.serve.max_input_tokens,
        max_batch_tokens=spec.serve.max_batch_tokens,
        engines=options.engines or 1,
        log=options.log,
        allow_inaccurate=spec.serve.allow_inaccurate,
    )


def _api_processes(spec: Spec) -> int:
    """Return how many API processes the server has. With one, this process is it."""
    if spec.serve.api_processes != "auto":
        return spec.serve.api_processes
    return max(1, min(_MOST_AUTO, cgroup.cores() // _CORES_PER_API_PROCESS))


def _for_api_processes(spec: Spec, count: int) -> dict[str, Any]:
    """Return a spec for API processes, which connect to no store and no broker, so they need no password.

    The name of their key file follows from the address of the database with the keys. Their outboxes share the size of
    the server's, which is that of its volume.
    """
    document = spec.model_dump(mode="json")
    document["access"] |= {"keys": spec.access.public_key_store or spec.access.keys, "broker": None}
    document["metering"] |= dict.fromkeys(("ledger", "broker"))
    document["metering"]["outbox_size"] = str(parse_size(spec.metering.outbox_size) // count)
    return document
