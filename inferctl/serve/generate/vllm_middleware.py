"""The edge inside of vLLM's API process. vLLM loads it with its option `--middleware`.

vLLM's own server listens on a private Unix socket, which nobody uses. The edge serves vLLM's application on the port of
`inferctl serve`, with the same `Connection` and `Edge` as the other tasks.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferctl.config.spec import Spec
from inferctl.serve.backend.charges import GenerationCharges
from inferctl.serve.child import end_with_parent
from inferctl.serve.edge import listener
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.exchange import Exchange, follow_ledger
from inferctl.serve.edge.pages import Pages
from inferctl.serve.edge_setup import EdgeSetup
from inferctl.serve.generate import (
    adapter_probe,
    command,
    control,
    engine_usage,
    generation_app,
    live_adapters,
    protocols,
)
from inferctl.serve.generate.live_adapters import LiveAdapters
from inferctl.serve.generate.model_names import ModelNames
from inferctl.serve.observe import logs
from inferctl.serve.observe.metrics import RequestMetrics, objectives
from inferctl.tenancy.access.budgets import Budgets
from inferctl.tenancy.access.limits import Limiter

_BEAT_S = 1.0
_FLUSH_S = 2.0  # to write the last usage events
_ORPHAN_S = 5.0  # to end without the supervisor
_WAITING = "vllm:num_requests_waiting"
# The usage of the KV cache changes with each part of a long prompt, whose tokens count at its end.
_PROGRESS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc")


class VllmMiddleware:
    """Starts the edge with vLLM's application, and ends it with it. Passes everything on to `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._server: _EdgeServer | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a message. After vLLM's start-up, serve on the port of `inferctl serve`."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def started(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                folder = Path(os.environ["INFERCTL_EDGE"])
                settings = control.EdgeSettings.read(folder)
                await adapter_probe.check(scope["app"], settings, folder)
                self._server = _EdgeServer(scope["app"], settings, folder)
            await send(message)

        await self._app(scope, receive, started)


class _EdgeServer:
    """The edge of one vLLM process. `app`: vLLM's application with all its middleware."""

    def __init__(self, app: Starlette, settings: control.EdgeSettings, folder: Path) -> None:
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        logs.configure(settings.log)
        self._app, self._folder = app, folder
        self._healthy = True
        settings.info["ready_seconds"] = round(time.monotonic() - settings.started, 3)
        spec = Spec.model_validate(settings.spec)
        metrics = RequestMetrics(REGISTRY, slo=objectives(spec.slo), answer_tokens=generation_app.ASSUMED_ANSWER_TOKENS)
        metrics.describe_model(settings.info)
        metrics.watch_threads("api")
        metrics.engine_restarts.set(settings.info["restarts"])
        metrics.engine_up.set_function(lambda: self._healthy)
        metrics.watch_queue(
            lambda: _waiting() * metrics.size.mean, _waiting, lambda: self._generation.running, estimated=True
        )
        keys, names = spec.access, command.base_names(spec)
        adapters = {each["name"]: each["sha256"] for each in settings.info["adapters"]}
        setup = EdgeSetup(
            spec.name,
            [*names, spec.model.source, *adapters],
            "generate",
            keys,
            spec.metering,
            lambda: self._healthy,
            log=settings.log,
            traces=settings.traces,
            tasks=dict.fromkeys(adapters, "generate"),
            batches=spec.serve.batches,
            batch_secret=settings.batch_secret,
        )
        self._metering, self._lifecycle = setup.metering, setup.lifecycle
        self._metering.ready(settings.info["device"], settings.info["model"]["sha256"])
        for name, digest in adapters.items():
            self._metering.ready(settings.info["device"], digest, name)
        self._metering.open()
        self._metering.watch(metrics)
        limiter = Limiter(keys.replicas, exchanges=keys.broker is not None)
        budgets = Budgets.of(keys, spec.metering)
        budgets.open(self._metering.source, time.time())
        metrics.watch_budgets(budgets.reached)
        budgets.ready(None, self._metering.hardware(spec.name))
        charges = GenerationCharges(limiter, budgets)
        self._lifecycle.started = True
        limits = settings.info["limits"]
        sequences = limits["max_sequences"]
        known = ModelNames(names, spec.model.source, list(adapters), limits["max_context_tokens"])
        self._live = LiveAdapters(
            app, settings, folder, known, setup, lambda *sent, **of: self._channel.send(*sent, **of)
        )
        engine_usage.install(app.state.engine_client)
        self._generation = generation_app.GenerationApp(
            app,
            app.state.engine_client,
            known,
            self._check,
            lambda: self._edge.stopped,
            sequences,
            charges,
            metrics.offer_body,
            "--enable-lora" in settings.info["engine"]["options"],
            self._live.answer if limits["max_adapters"] else None,
            ResponsesRequest.model_validate,
        )
        pages = Pages(self._lifecycle, lambda: settings.info, metrics.exposition, list(protocols.ENDPOINTS))
        self._edge = setup.edge(
            self._generation,
            metrics,
            pages.answer,
            endpoints=protocols.NAMES,
            error_body=protocols.error_body,
            backend=charges,
        )
        self._http = listener.HttpServer(self._edge, spec.serve.drain_seconds, self._edge.rejected)
        end_with_parent(_ORPHAN_S, lambda: os.killpg(0, signal.SIGKILL))  # vLLM's processes, too
        self._channel = control.connect(folder)
        self._channel.send("ready", adapters=settings.info.get("adapters", []))
        self._socket = self._channel.receive_listener()
        work = [self._serve(), self._beat(), self._follow(), follow_ledger(budgets)]
        if setup.access and (exchange := Exchange.of(keys, limiter, spec.name, setup.access.revoke, budgets)):
            work.append(exchange.run())
        self._tasks = [asyncio.create_task(each) for each in work]

    async def _serve(self) -> None:
        await self._http.serve(sockets=[self._socket])
        await asyncio.sleep(0.05)  # cancelled requests send their last event
        await self._metering.close(_FLUSH_S)
        self._channel.send("closed", unfinished=self._edge.unfinished_responses)

    async def _beat(self) -> None:
        while True:
            await self._check()
            running = self._generation.running
            self._channel.send("beat", healthy=self._healthy, running=running, progress=self._progress())
            await asyncio.sleep(_BEAT_S)

    def _progress(self) -> float:
        """Return a number that grows while the engine computes."""
        if not self._generation.running:
            return 0.0
        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples if sample.name in _PROGRESS]
        # Chats wait for /tokenize, because vLLM tokenizes in one thread. With `--disable-log-stats`, nothing is known.
        if self._generation.tokenizing or not samples:
            return time.monotonic()
        return self._generation.events + sum(sample.value for sample in samples)

    async def _check(self) -> bool:
        """Return whether vLLM says that its engine runs. An engine that ended does not run again."""
        if self._healthy:
            self._healthy = (await adapter_probe.request(self._app, "/health"))[0] == 200
        return self._healthy

    async def _follow(self) -> None:
        """Do what the supervisor says, and end with it."""
        while (message := await self._channel.receive()) is not None:
            if message["kind"] in live_adapters.ANSWERS:
                self._live.receive(message)
            elif message["kind"] == "drain":
                self._lifecycle.draining = True
            elif message["kind"] == "close":
                self._lifecycle.closed = True
                self._edge.stopped = ApiError(503, message["message"], code=message["code"])
                self._http.config.timeout_graceful_shutdown = message["seconds"]
                self._http.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # the supervisor cannot if it was killed
        os.kill(os.getpid(), signal.SIGTERM)


def _waiting() -> float:
    """Return how many requests wait in vLLM; 0 if vLLM publishes no statistics."""
    found = REGISTRY.restricted_registry([_WAITING]).collect()
    return sum(sample.value for metric in found for sample in metric.samples)
