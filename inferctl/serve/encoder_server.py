"""The API process of the encoder tasks: port, engines, HTTP, signals and drain."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from typing import Any

from inferctl.batching.batcher import Batcher, QueueLimits
from inferctl.batching.latency_model import Capacity, LatencyModel
from inferctl.config.spec import Spec, Task
from inferctl.core import outputs
from inferctl.core.errors import EXIT_INTERRUPTED, NotReadyError
from inferctl.models.model import ModelFolder
from inferctl.serve import describe, events, metering, relay_process, task_config
from inferctl.serve.api import app
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge import access, listener
from inferctl.serve.edge.lifecycle import Lifecycle
from inferctl.serve.edge.load_report import LoadReport
from inferctl.serve.edge.middleware import Edge, EdgeLimits
from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.engine_process.engine_protocol import EngineConfig, EngineInfo
from inferctl.serve.engine_process.pool import EnginePool
from inferctl.serve.metering import Metering
from inferctl.serve.metrics import Metrics, objectives
from inferctl.serve.options import ServerOptions
from inferctl.serve.progress import StartProgress
from inferctl.serve.rerank_config import RerankConfig
from inferctl.serve.scheduling.dispatcher import Dispatcher
from inferctl.serve.signals import EXIT_TERMINATED, StopSignals
from inferctl.serve.tokenizer_pool import TokenizerPool
from inferctl.serve.vector_cache import keys, vector_cache

# Tokens of one request, if the queue is not larger. OpenAI's limit is 300,000.
_MAX_REQUEST_TOKENS = 262_144
_FLUSH_S = 1.0  # for the last usage events, if requests needed all of `drain_seconds`


class EncoderServer:
    """One running server of embeddings or scores."""

    def __init__(
        self,
        spec: Spec,
        task: Task,
        options: ServerOptions,
        notify: Callable[[str], None],
        folder: ModelFolder,
        progress: StartProgress,
    ) -> None:
        self._spec, self._options, self._notify, self._folder = spec, options, notify, folder
        self._progress = progress
        self._config = config = task_config.read(task, folder.path, spec.serve.max_input_tokens)
        self._capacity = capacity = Capacity.read(options.capacity) if options.capacity else None
        capacity_slo_ms = capacity.slo_p99_ms if capacity else None
        slo_ms = spec.slo.p99_ms or capacity_slo_ms
        self._metrics = metrics = Metrics(objectives(spec.slo, slo_ms))
        self._metering = Metering(spec.metering, spec.name, task, known_callers=spec.access.required)
        self._relay = relay_process.start(spec, notify)
        self._admission = describe.admission_line(spec.slo.p99_ms, capacity_slo_ms)
        queue = QueueLimits(
            spec.serve.max_batch_tokens,
            spec.serve.max_queue_tokens,
            max_wait_s=spec.serve.max_wait_seconds,
            slo_s=slo_ms / 1000 if slo_ms else None,
        )
        self._batcher = Batcher(queue, LatencyModel(capacity))
        self._dispatcher = Dispatcher(self._batcher, metrics)
        self._model = ServedModel(
            spec.name,
            frozenset({spec.model.source}),
            config.matryoshka if isinstance(config, EmbeddingConfig) else (),
            spec.serve.max_client_batch,
            max(_MAX_REQUEST_TOKENS, spec.serve.max_queue_tokens),
            options.truncate,
            task,
        )
        if isinstance(config, RerankConfig):
            self._model.activation = config.scores
        self._tokenizer = TokenizerPool(folder.path, config, on_truncated=metrics.truncated.inc)
        self._cache = vector_cache.create(spec.cache, task, metrics)
        self._access = access.create(spec.access, (spec.name, spec.model.source))
        self._lifecycle = Lifecycle(
            ready=lambda: self._dispatcher.ready,
            live=lambda: not self._pool.crash_looping,
            keys_known=lambda: access.known(self._access),
        )
        longest_wait = min(queue.slo_s or math.inf, queue.max_wait_s or math.inf)
        load = None
        if spec.serve.load_reports:
            load = LoadReport(lambda: self._batcher.slots, lambda: self._batcher.expected_wait() / longest_wait)
        sinks = [self._metering.record, *([load.record] if load else [])]
        self._edge_limits = EdgeLimits()
        self._edge = Edge(
            app.create(Inference(self._model, self._tokenizer, self._dispatcher, metrics, self._cache)),
            self._lifecycle,
            emit=events.emitter(metrics, options.log, options.traces, spec.name, *sinks),
            info=self._describe,
            metrics=metrics.exposition,
            endpoints=app.ENDPOINTS,
            limits=self._edge_limits,
            access=self._access,
            check_metering=self._metering.check,
            load_line=load.line if load else None,
            served=app.served(task),
        )
        engine_config = EngineConfig(
            engine="echo" if options.engine == "echo" else "encoder",
            task=task,
            model=str(self._folder.path),
            precision=spec.serve.precision,
            device=options.device,
            max_input_tokens=spec.serve.max_input_tokens,
            max_batch_tokens=spec.serve.max_batch_tokens,
            engines=options.engines or 1,
            log=options.log,
            allow_inaccurate=spec.serve.allow_inaccurate,
        )
        self._pool = EnginePool(
            engine_config, options.engines, self._dispatcher, self._batch_timeout, self._engine_ready, progress.phase
        )
        metrics.engine_restarts.set_function(lambda: self._pool.counts()["restarts"])
        metrics.watch_capacity(self._rates)
        self._info: dict[str, Any] | None = None
        self._started, self._ready_seconds = time.monotonic(), 0.0
        self._drain_end = 0.0
        self._signals = 0
        self._interrupted = False
        self._failure: NotReadyError | None = None

    async def run(self, signals: StopSignals) -> int:
        """Serve until a signal arrives, and return the exit code."""
        listener.raise_file_limit()
        self._tokenizer.warm()
        socket = listener.listen(self._spec.serve.host, self._spec.serve.port)
        self._url, host = listener.reached_at(socket, self._spec.serve.host, self._options.published)
        for warning in chain(access.warnings(self._spec.access, host), metering.warnings(self._spec.metering)):
            self._notify(f"warning    {warning}")
        self._http = listener.HttpServer(self._edge, self._spec.serve.drain_seconds, self._edge.rejected)
        self._metering.open()
        self._metering.watch(self._metrics)
        relay = asyncio.create_task(self._relay.run()) if self._relay else None
        engines = asyncio.create_task(self._pool.run())
        sharing = asyncio.create_task(self._cache.shared.run()) if self._cache and self._cache.shared else None
        exchange = asyncio.create_task(self._access.exchange()) if self._access else None
        serving = asyncio.create_task(self._http.serve(sockets=[socket]))
        signals.connect(self._handle_signal)
        showing = asyncio.create_task(self._progress.run())
        await asyncio.wait((serving, engines), return_when=asyncio.FIRST_COMPLETED)
        if engines.done():
            self._dispatcher.fail_all("the server ends because of an error")
        self._http.close()
        await serving
        for task in filter(None, (sharing, exchange, showing)):
            task.cancel()
            await asyncio.wait((task,))
        self._pool.stop()
        closing = asyncio.create_task(self._close_metering(relay))
        try:
            await engines
        finally:
            await closing
        self._tokenizer.close()
        if self._failure:
            raise self._failure
        if unfinished := self._edge.unfinished_responses:
            limit = self._spec.serve.drain_seconds
            self._notify(f"stopped after {limit:g} s; requests without a response: {unfinished}")
            return 1
        if self._lifecycle.started or not self._interrupted:
            self._notify("stopped")
        return EXIT_INTERRUPTED if self._interrupted else 0

    async def _close_metering(self, relay: asyncio.Task[None] | None) -> None:
        """Record the last requests, and let the relay store them before the drain ends."""
        left = max(_FLUSH_S, self._drain_end - time.monotonic())
        await self._metering.close(left)
        if self._relay and relay:
            await self._relay.stop(left)
            await relay

    def _batch_timeout(self) -> float:
        """Return the seconds after which a batch counts as hung: 20 times the largest one, at least `hang_seconds`."""
        largest = max(self._batcher.limits.batch_tokens, self._config.max_tokens)
        return max(self._options.hang_seconds, 20 * self._batcher.latency.seconds(largest))

    def _handle_signal(self, number: int) -> None:
        self._signals += 1
        self._progress.stop()
        self._interrupted |= number == signal.SIGINT
        if self._signals > 1:
            self._pool.kill()
            os._exit(EXIT_INTERRUPTED if self._interrupted else EXIT_TERMINATED)
        if self._lifecycle.started:
            requests = self._edge.in_flight
            self._notify(f"shutting down; requests in flight: {requests}; a second signal stops at once")
        self._lifecycle.draining = True
        # Load balancers notice `/readyz` with a delay, so requests are accepted for the grace period. After Ctrl-C, and
        # before the server was ready, no load balancer has to be waited for.
        grace = 0 if self._interrupted or not self._lifecycle.started else self._spec.serve.grace_seconds
        asyncio.get_running_loop().call_later(grace, self._close)

    def _close(self) -> None:
        self._drain_end = time.monotonic() + self._spec.serve.drain_seconds
        self._lifecycle.closed = True
        self._http.close()

    def _engine_ready(self, info: EngineInfo) -> None:
        lifecycle = self._lifecycle
        self._metering.ready(asdict(info.device), self._folder.digest)
        self._model.dimensions = info.dimensions
        self._model.vocabulary_size = info.vocabulary_size or self._tokenizer.vocabulary_size
        if self._cache and isinstance(self._config, EmbeddingConfig):
            self._cache.model_loaded(keys.identity(self._folder.digest, self._config, info), info.dimensions)
        self._info = describe.document(
            self._spec,
            self._folder,
            self._config,
            info,
            self._options.truncate,
            self._edge_limits.max_body_bytes,
            self._options.image,
        )
        self._metrics.describe_model(self._info)
        if lifecycle.started:
            engines = self._pool.counts()
            counts = f"ready: {engines['up']} of {engines['count']}, restarts: {engines['restarts']}"
            self._notify(f"an engine is ready; {counts}")
            return
        lifecycle.started = True
        self._progress.stop()
        self._ready_seconds = time.monotonic() - self._started
        gc.collect()
        gc.freeze()
        if lifecycle.draining:
            return
        spec = self._spec
        for line in describe.lines(info, spec.name, self._url, self._ready_seconds, spec.access, self._admission):
            self._notify(line)
        if not access.known(self._access):
            self._notify("warning    the relay has not copied the keys yet; requests get 503 until then")
        if self._options.announce:
            try:
                outputs.announce(self._options.announce, self._url)
            except NotReadyError as error:
                # A process that waits for the file would wait forever.
                self._failure = error
                self._close()

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
            "engines": {**engines, "out_of_memory": self._dispatcher.out_of_memory},
            "restarts": engines["restarts"],
            "pace": self._batcher.latency.to_json(),
            "ready_seconds": round(self._ready_seconds, 3),
        }
