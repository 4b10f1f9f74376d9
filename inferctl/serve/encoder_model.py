"""One encoder model of a server: what computes for it, from tokenizer to engines, and what `/info` says of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from inferctl.batching.batcher import Batcher, QueueLimits
from inferctl.batching.device_share import DeviceShare
from inferctl.config.spec import Spec, Task
from inferctl.models.model import ModelFolder
from inferctl.reading import space, task_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Output
from inferctl.reading.space import Space
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.backend.local_backend import Stack
from inferctl.serve.cache import vector_cache
from inferctl.serve.engine_process.engine_protocol import EngineConfig, EngineInfo
from inferctl.serve.engine_process.pool import EnginePool
from inferctl.serve.engine_process.supervisor import EngineSupervisor
from inferctl.serve.observe import describe
from inferctl.serve.observe.metrics import Metrics, objectives
from inferctl.serve.options import ServerOptions
from inferctl.serve.scheduling.dispatcher import Dispatcher
from inferctl.serve.text.tokenizer_pool import TokenizerPool


class EncoderModel:
    """`spec`: of this model only. `number`: among the models of the server. `share`: with others, that of the device.

    `on_ready` gets it after each start of an engine. `first_ready`: set after the first one. `device`: of the last one.
    `caches`: how many models share the size of the cache.
    """

    def __init__(
        self,
        spec: Spec,
        task: Task,
        folder: ModelFolder,
        options: ServerOptions,
        on_ready: Callable[[EncoderModel], None],
        on_phase: Callable[[str], None],
        number: int = 0,
        *,
        share: DeviceShare | None = None,
        weight: float = 1.0,
        caches: int = 1,
    ) -> None:
        self.spec, self.task, self.number, self.folder, self._options = spec, task, number, folder, options
        self._config = task_config.read(task, folder.path, spec.serve.max_input_tokens)
        self.objectives = objectives(spec.slo)
        # Each part gets those that it passes a request on to, so the first ones are the last that a request meets.
        self.metrics = metrics = Metrics(self.objectives, spec.name if share else None)
        self.batcher = Batcher(_queue_limits(spec))
        self.dispatcher = Dispatcher(self.batcher, metrics, share=share, weight=weight)
        self.pool = EnginePool(
            engine_config(spec, task, options, folder),
            options.engines,
            self.dispatcher,
            self._batch_timeout,
            self._engine_ready,
            (lambda phase: on_phase(f"{spec.name}: {phase}")) if share else on_phase,
            f"the engine process of {spec.name}" if share else EngineSupervisor.name,
        )
        self.stack = Stack(self.dispatcher, vector_cache.create(spec.cache, task, metrics, caches), spec.name)
        self.tokenizer = TokenizerPool(folder.path, self._config, on_truncated=metrics.truncated.inc)
        self.served = ServedModel.of(spec, self._config, options.truncate, number)
        self.sizes: dict[str, Any] = {"dimensions": 0, "token_dimensions": 0, "vocabulary_size": 0, "spaces": {}}
        # While the engine loads the weights, a thread reads them too, for which the end of the server does not wait.
        self._spaces = Future[dict[Output, Space]]()
        threading.Thread(target=self._read_folder, name="space", daemon=True).start()
        self.first_ready = asyncio.Event()
        self.device: dict[str, Any] | None = None
        self._engine: EngineInfo | None = None  # the first one that was ready
        self._info: dict[str, Any] | None = None
        self._on_ready = on_ready
        metrics.engine_restarts.set_function(lambda: self.pool.counts()["restarts"])
        metrics.watch_capacity(
            lambda: self.batcher.latency.tokens_per_second(self.batcher.limits.batch_tokens, self.batcher.slots)
        )

    def _batch_timeout(self) -> float:
        """Return the seconds after which a batch counts as hung: 20 times the largest one, at least `hang_seconds`."""
        largest = max(self.batcher.limits.batch_tokens, self._config.max_tokens)
        return max(self._options.hang_seconds, 20 * self.batcher.latency.seconds(largest))

    def _read_folder(self) -> None:
        self._spaces.set_running_or_notify_cancel()
        try:
            config, _ = self._config, self.folder.digest  # which is kept, and would block the event loop too
            self._spaces.set_result(space.read(self.folder.path, config) if isinstance(config, EmbeddingConfig) else {})
        except Exception as error:  # noqa: BLE001  # the server ends with any
            self._spaces.set_exception(error)

    async def wait_ready(self) -> None:
        """Return when the first engine is ready. Raises why the spaces are not known."""
        await asyncio.wrap_future(self._spaces)
        await self.first_ready.wait()

    def _engine_ready(self, info: EngineInfo) -> None:
        if not self._spaces.done():  # the server responds to probes meanwhile
            loop = asyncio.get_running_loop()
            self._spaces.add_done_callback(lambda _: loop.call_soon_threadsafe(self._engine_ready, info))
            return
        self.device = asdict(info.device)
        size = info.vocabulary_size or self.tokenizer.vocabulary_size
        vectors = {"dimensions": info.dimensions, "token_dimensions": info.token_dimensions}
        spaces = self._spaces.result()
        definitions = {output: each.definition for output, each in spaces.items()}
        self.sizes = vectors | {"vocabulary_size": size, "spaces": definitions}
        options, facts = self._options, self.tokenizer.facts
        self._info = describe.document(
            self.spec, self.folder, self._config, facts, info, options.truncate, options.image
        )
        if spaces:
            self._info["model"]["spaces"] = {output: each.described for output, each in spaces.items()}
        self.metrics.describe_model(self._info)
        if rate := info.matrix_rate:
            self.metrics.matrix_rate.labels(rate.source).set(rate.flops_per_s * self.pool.counts()["count"])
        self._engine = self._engine or info
        self.first_ready.set()
        self._on_ready(self)

    @property
    def lines(self) -> list[str]:
        """The lines printed when the server is ready."""
        return list(describe.lines(self._engine, self.spec.slo.p99_ms, self._config)) if self._engine else []

    def state(self) -> dict[str, Any]:
        """Return what API processes need to know of it."""
        return {"device": self.device, "digest": self.device and self.folder.digest, **self.sizes}

    def describe(self) -> dict[str, Any] | None:
        """Return what `GET /info` says of it; None before an engine was ready."""
        if self._info is None:
            return None
        engines, limits = self.pool.counts(), self.batcher.limits
        slo_ms = None if limits.slo_s is None else limits.slo_s * 1000
        return {
            **self._info,
            "limits": {**self._info["limits"], "max_batch_tokens": limits.batch_tokens, "slo_p99_ms": slo_ms},
            "tokenizer": self.tokenizer.library,
            "engines": {**engines, "out_of_memory": self.dispatcher.out_of_memory},
            "restarts": engines["restarts"],
            "pace": self.batcher.latency.to_json(),
        }


def _queue_limits(spec: Spec) -> QueueLimits:
    return QueueLimits(
        spec.serve.max_batch_tokens,
        spec.serve.max_queue_tokens,
        max_wait_s=spec.serve.max_wait_seconds,
        slo_s=spec.slo.p99_ms / 1000 if spec.slo.p99_ms else None,
    )


def engine_config(spec: Spec, task: Task, options: ServerOptions, folder: ModelFolder) -> EngineConfig:
    """Return the configuration of the engines of one model."""
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
