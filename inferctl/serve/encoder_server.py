"""The server of the encoder tasks: its parts, from the edge to the engines."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from inferctl.batching.batcher import Batcher, QueueLimits
from inferctl.batching.latency_model import Capacity, LatencyModel
from inferctl.config.spec import Spec, Task
from inferctl.models.model import ModelFolder
from inferctl.serve import describe, task_config
from inferctl.serve.api import app
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.backend.local import LocalBackend
from inferctl.serve.edge import access, key_limits, listener
from inferctl.serve.edge.lifecycle import Lifecycle
from inferctl.serve.edge.load_report import LoadReport
from inferctl.serve.edge.middleware import Edge, EdgeLimits
from inferctl.serve.edge.pages import Pages
from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.engine_process.engine_protocol import EngineConfig, EngineInfo
from inferctl.serve.engine_process.pool import EnginePool
from inferctl.serve.lifetime import ServerLifetime
from inferctl.serve.metrics import Metrics, objectives
from inferctl.serve.options import ServerOptions
from inferctl.serve.progress import StartProgress
from inferctl.serve.rerank_config import RerankConfig
from inferctl.serve.scheduling.dispatcher import Dispatcher
from inferctl.serve.task_config import TaskConfig
from inferctl.serve.tokenizer_pool import TokenizerPool
from inferctl.serve.vector_cache import keys, vector_cache

# Tokens of one request, if the queue is not larger. OpenAI's limit is 300,000.
_MAX_REQUEST_TOKENS = 262_144


class EncoderServer(ServerLifetime):
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
        self._folder, self._config = folder, task_config.read(task, folder.path, spec.serve.max_input_tokens)
        self._capacity = Capacity.read(options.capacity) if options.capacity else None
        capacity_slo_ms = self._capacity.slo_p99_ms if self._capacity else None
        slo_ms = spec.slo.p99_ms or capacity_slo_ms
        self._admission = describe.admission_line(spec.slo.p99_ms, capacity_slo_ms)
        super().__init__(spec, task, options, notify, progress)
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
        self._limits = key_limits.create(spec.access, spec.name, self._access)
        self._backend = LocalBackend(self._dispatcher, metrics, self._cache, self._limits)
        self._tokenizer = TokenizerPool(folder.path, self._config, on_truncated=metrics.truncated.inc)
        self._model = _served_model(spec, task, options, self._config)
        self._lifecycle = Lifecycle(
            ready=lambda: self._dispatcher.ready,
            live=lambda: not self._pool.crash_looping,
            keys_known=lambda: access.known(self._access),
        )
        self._edge_limits = EdgeLimits()
        load = LoadReport(lambda: self._batcher.slots, self._expected_wait) if spec.serve.load_reports else None
        self._edge = Edge(
            app.create(Inference(self._model, self._tokenizer, self._backend)),
            self._lifecycle,
            emit=self._emitter(metrics, *([load.record] if load else [])),
            page=Pages(self._lifecycle, self._describe, metrics.exposition, app.served(task)).answer,
            endpoints=app.ENDPOINTS,
            limits=self._edge_limits,
            access=self._access,
            charge=self._backend.charge,
            check_metering=self._metering.check,
            load_line=load.line if load else None,
        )
        self._http = listener.HttpServer(self._edge, spec.serve.drain_seconds, self._edge.rejected)
        metrics.engine_restarts.set_function(lambda: self._pool.counts()["restarts"])
        metrics.watch_capacity(self._rates)
        self._engines: asyncio.Task[None] | None = None
        self._info: dict[str, Any] | None = None
        self._ready_seconds = 0.0

    async def _serve(self) -> int:
        self._tokenizer.warm()
        self._metering.watch(self._metrics)
        self._engines = asyncio.create_task(self._pool.run())
        sharing = [asyncio.create_task(self._cache.shared.run())] if self._cache and self._cache.shared else []
        if self._limits:
            sharing.append(asyncio.create_task(self._limits.exchange()))
        serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        await asyncio.wait((serving, self._engines), return_when=asyncio.FIRST_COMPLETED)
        if self._engines.done():
            self._dispatcher.fail_all("the server ends because of an error")
        self._http.close()
        await serving
        for task in sharing:
            task.cancel()
            await asyncio.wait((task,))
        return self._edge.unfinished_responses

    async def _end(self) -> None:
        self._pool.stop()
        if self._engines:
            await self._engines
        self._tokenizer.close()

    def _drain(self) -> str:
        return f"requests in flight: {self._edge.in_flight}; "

    def _close(self, seconds: float) -> None:
        self._http.close()

    def _kill(self) -> None:
        self._pool.kill()

    def _expected_wait(self) -> float:
        """Return the predicted wait of a request, as a share of the longest one that is accepted."""
        limits = self._batcher.limits
        return self._batcher.expected_wait() / min(limits.slo_s or math.inf, limits.max_wait_s or math.inf)

    def _batch_timeout(self) -> float:
        """Return the seconds after which a batch counts as hung: 20 times the largest one, at least `hang_seconds`."""
        largest = max(self._batcher.limits.batch_tokens, self._config.max_tokens)
        return max(self._options.hang_seconds, 20 * self._batcher.latency.seconds(largest))

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
            self._tokenizer.facts,
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
        # By default, 700 new objects start a collection, which is more often than once per batch.
        gc.set_threshold(50_000, 20, 100)
        if lifecycle.draining:
            return
        spec = self._spec
        lines = describe.lines(
            info, spec.name, self._url, self._ready_seconds, spec.access, self._admission, self._model.prompts
        )
        for line in lines:
            self._notify(line)
        if not access.known(self._access):
            self._notify("warning    the relay has not copied the keys yet; requests get 503 until then")
        self._announce()

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


def _served_model(spec: Spec, task: Task, options: ServerOptions, config: TaskConfig) -> ServedModel:
    served = ServedModel(
        spec.name,
        frozenset({spec.model.source}),
        config.matryoshka if isinstance(config, EmbeddingConfig) else (),
        spec.serve.max_client_batch,
        max(_MAX_REQUEST_TOKENS, spec.serve.max_queue_tokens),
        options.truncate,
        task,
    )
    if isinstance(config, RerankConfig):
        served.activation = config.scores
    else:
        served.prompts = config.prompts
    return served
