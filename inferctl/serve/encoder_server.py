"""The server of the encoder tasks: its parts, from the edge to the engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import inferctl
from inferctl.batching.device_share import DeviceShare
from inferctl.config.spec import Spec, Task
from inferctl.config.spec_types import CACHED
from inferctl.core import cgroup
from inferctl.models.model import ModelFolder
from inferctl.serve import event_loop
from inferctl.serve.api import app
from inferctl.serve.backend.local_backend import LocalBackend
from inferctl.serve.edge import access, exchange
from inferctl.serve.edge.exchange import Exchange
from inferctl.serve.edge.pages import Page, Pages
from inferctl.serve.encoder_model import EncoderModel
from inferctl.serve.engine_process import memory
from inferctl.serve.front_end import FrontEnd
from inferctl.serve.lifetime import ServerLifetime, without_stores
from inferctl.serve.observe.progress import StartProgress
from inferctl.serve.observe.server_metrics import ServerMetrics
from inferctl.serve.options import ServerOptions
from inferctl.serve.processes.api_processes import ApiProcesses
from inferctl.tenancy.access.budgets import Budgets
from inferctl.tenancy.access.limits import Limiter

# `serve.api_processes: auto`. One API process does not keep a GPU busy with small models; a CPU needs its cores itself.
_CORES_PER_API_PROCESS, _MOST_AUTO = 4, 4


class EncoderServer(ServerLifetime):
    """One running server of encoder models. `loaded`: task and folder of each model of the spec."""

    def __init__(
        self,
        spec: Spec,
        loaded: Sequence[tuple[Task, ModelFolder]],
        options: ServerOptions,
        notify: Callable[[str], None],
        progress: StartProgress,
    ) -> None:
        """Raises `UsageError` for a model that is not usable, `NotReadyError` for insufficient memory."""
        several, tasks = len(loaded) > 1, [task for task, _ in loaded]
        if several and options.engine != "echo":
            folders = (folder for _, folder in loaded)
            memory.check_all(list(zip(spec.each(), folders, strict=True)), options.device)
        share = DeviceShare() if several else None
        self._models = models = [
            EncoderModel(
                one,
                *found,
                options,
                self._model_ready,
                progress.phase,
                number,
                share=share,
                weight=spec.models[number].weight if several else 1.0,
                caches=sum(task in CACHED for task in tasks),
            )
            for number, (one, found) in enumerate(zip(spec.each(), loaded, strict=True))
        ]
        self._processes = processes = _api_processes(spec)
        by_name = {model.spec.name: model.task for model in models} if several else {}
        task = None if several else tasks[0]
        super().__init__(spec, task, options, notify, progress, tasks=by_name, records=processes == 1)
        self._metrics = metrics = ServerMetrics({model.spec.name: model.metrics for model in models})
        limiter = Limiter(spec.access.replicas, exchanges=spec.access.broker is not None)
        self._budgets = budgets = Budgets.of(spec.access, spec.metering)
        self._exchange = Exchange.of(spec.access, limiter, spec.name, self._revoke, budgets)
        backend = LocalBackend([model.stack for model in models], limiter, budgets)
        self._api: ApiProcesses | None = None
        self._front: FrontEnd | ApiProcesses
        served = [model.served for model in models]
        self._pages = Pages(self._lifecycle, self._describe, self._exposition, list(app.endpoints(served)))
        if processes == 1:
            parts = [(model.served, model.tokenizer) for model in models]
            self._front = FrontEnd(spec, parts, self._setup, metrics, backend, self._page)
        else:
            welcome = {
                "spec": without_stores(spec, processes),
                "models": [(model.task, str(model.folder.path), model.objectives) for model in models],
                "processes": processes,
                "batch_secret": self._batch_secret,
                "truncate": options.truncate,
                "log": options.log,
                "traces": options.traces,
            }
            self._front = self._api = ApiProcesses(
                processes, welcome, backend, self._page, self._state, self._start, spec.serve.drain_seconds
            )
        threads = [model.tokenizer.threads for model in models]
        metrics.general.watch_threads("api" if processes == 1 else "backend", *threads)
        self._engines: asyncio.Task[None] | None = None
        self._scrape: asyncio.Task[Page] | None = None
        self._ready_seconds = 0.0

    def _ready(self) -> bool:
        """Return whether the models can compute: at the start all, then any. So one does not stop the others."""
        enough = any if self._lifecycle.started else all
        return (
            enough(model.dispatcher.ready and model.first_ready.is_set() for model in self._models)
            and self._front.up > 0
        )

    def _live(self) -> bool:
        engines = any(not model.pool.crash_looping for model in self._models)
        return engines and not (self._api is not None and self._api.crash_looping)

    async def _serve(self) -> int:
        self._metering.watch(self._metrics.general)
        self._metrics.general.watch_budgets(self._budgets.reached)
        self._engines = asyncio.create_task(self._run_engines())
        self._budgets.open(self._metering.source, time.time())
        work = [exchange.follow_ledger(self._budgets), *([self._exchange.run()] if self._exchange else ())]
        tasks = [asyncio.create_task(each) for each in work]
        serving = asyncio.create_task(self._front.serve([self._socket]))
        await asyncio.wait((serving, self._engines), return_when=asyncio.FIRST_COMPLETED)
        if self._engines.done():
            for model in self._models:
                model.dispatcher.fail_all("the server ends because of an error")
        self._front.close()
        await serving
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return self._front.unfinished_responses

    async def _end(self) -> None:
        for model in self._models:
            model.pool.stop()
        if self._engines:
            await self._engines

    def _drain(self) -> str:
        return f"requests in flight: {self._front.in_flight}; "

    def _close(self, seconds: float) -> None:
        self._front.close()

    def _kill(self) -> None:
        for model in self._models:
            model.pool.kill()
        if self._api:
            self._api.kill()

    async def _run_engines(self) -> None:
        """Start the engines of one model after those of another, and keep them running.

        So the loads need their memory one after the other, and each engine measures its device while it has that for
        itself. Raises why an engine cannot start.
        """
        try:
            async with asyncio.TaskGroup() as running:
                for model in self._models:
                    engines = running.create_task(model.pool.run())
                    ready = asyncio.create_task(model.wait_ready())
                    await asyncio.wait((engines, ready), return_when=asyncio.FIRST_COMPLETED)
                    if ready.done():
                        ready.result()
                    ready.cancel()
                    if engines.done():  # by a signal
                        break
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    def _model_ready(self, model: EncoderModel) -> None:
        assert model.device is not None
        self._metering.ready(model.device, model.folder.digest, model.spec.name)
        self._budgets.ready(model.spec.name, self._metering.hardware(model.spec.name))
        if isinstance(self._front, FrontEnd):
            self._front.set_sizes(model.number, model.sizes)
        if not self._lifecycle.started:
            self._start()
            return
        engines = model.pool.counts()
        counts = f"ready: {engines['up']} of {engines['count']}, restarts: {engines['restarts']}"
        self._notify(f"an engine{self._of(model)} is ready; {counts}")

    def _of(self, model: EncoderModel) -> str:
        return f" of {model.spec.name}" if len(self._models) > 1 else ""

    def _start(self) -> None:
        """Say that the server is ready, once an engine of each model and an API process are."""
        lifecycle = self._lifecycle
        if lifecycle.started or not self._front.up or not all(model.first_ready.is_set() for model in self._models):
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
        for model in self._models:
            if len(self._models) > 1:
                self._notify(f"model      {model.spec.name}, {model.task}")
            for line in model.lines:
                self._notify(line)
        self._notify(access.ready_line(spec.name, self._url, self._ready_seconds, spec.access))
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
        return self._metrics.exposition(self._api.totals if self._api else None)

    def _state(self) -> dict[str, Any]:
        """Return what API processes need to know of this server."""
        lifecycle = self._lifecycle
        state: dict[str, Any] = {"ready": self._ready(), "models": [model.state() for model in self._models]}
        state |= {name: getattr(lifecycle, name) for name in ("started", "draining", "closed")}
        return state

    def _describe(self) -> dict[str, Any] | None:
        """Return the document of `GET /info`; None before each model had an engine that was ready."""
        found = [document for model in self._models if (document := model.describe()) is not None]
        if len(found) < len(self._models):
            return None
        shared = {
            "api_processes": {"count": self._processes, "up": self._front.up, "restarts": self._front.restarts},
            "ready_seconds": round(self._ready_seconds, 3),
        }
        if len(found) == 1:
            return found[0] | shared
        phases = ["ready" if model.dispatcher.ready else "restarting" for model in self._models]
        return {
            "name": self._spec.name,
            "inferctl": inferctl.__version__,
            "models": [document | {"phase": phase} for document, phase in zip(found, phases, strict=True)],
            "restarts": sum(document["restarts"] for document in found),
            **shared,
        }


def _api_processes(spec: Spec) -> int:
    """Return how many API processes the server has. With one, this process is it."""
    if spec.serve.api_processes != "auto":
        return spec.serve.api_processes
    return max(1, min(_MOST_AUTO, cgroup.cores() // _CORES_PER_API_PROCESS))
