"""The API process from start to end: port, engine, HTTP, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

import inferctl
from inferctl.errors import EXIT_INTERRUPTED, NotReadyError, UsageError
from inferctl.serve import app as http_app
from inferctl.serve import recipe
from inferctl.serve.batcher import Batcher
from inferctl.serve.batcher import Limits as QueueLimits
from inferctl.serve.dispatcher import Dispatcher
from inferctl.serve.locate import locate
from inferctl.serve.metrics import Metrics
from inferctl.serve.supervisor import Supervisor
from inferctl.serve.tokenise import TokenizerPool
from inferctl.serve.types import EngineConfig, EngineInfo
from inferctl.spec import Spec

log = logging.getLogger("inferctl.server")

_EXIT_AT_ONCE = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Options:
    """What is not part of the spec. `announce` is written once the server is ready; `image` is (reference, digest) inside a container."""

    device: str = "auto"
    engine: str = "encoder"
    truncate: bool = True
    announce: Path | None = None
    image: tuple[str, str | None] | None = None


def run(spec: Spec, options: Options, say: Callable[[str], None]) -> int:
    """Serve until told to stop; returns the exit code. `say` gets lines for people.

    Raises `UsageError` for a model that is not there or not usable, `NotReadyError` for a port or a device that is not.
    """
    server = Server(spec, options, say)
    loop_factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(server.run())


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `NotReadyError` when the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        hint = (
            "`--port 0` takes a free one, `--port N` another"
            if error.errno != 99
            else "`--host 0.0.0.0` listens on all addresses"
        )
        raise NotReadyError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0).lower()}", hint) from None
    except OverflowError:
        listener.close()
        raise NotReadyError(f"there is no port {port}", "ports go from 1 to 65535") from None
    listener.setblocking(False)
    return listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handling: draining is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One running server."""

    def __init__(self, spec: Spec, options: Options, say: Callable[[str], None]) -> None:
        self._spec, self._options, self._say = spec, options, say
        self._folder = locate(spec, say)
        self._recipe = recipe.read(self._folder.path, spec.serve.max_input_tokens)
        self._metrics = Metrics()
        queue = QueueLimits(spec.serve.max_batch_tokens, spec.serve.max_queue_tokens)
        self._dispatcher = Dispatcher(Batcher(queue), self._metrics)
        config = EngineConfig(
            engine="echo" if options.engine == "echo" else "encoder",
            model=str(self._folder.path),
            precision=spec.serve.precision,
            device=options.device,
            max_input_tokens=spec.serve.max_input_tokens,
            max_batch_tokens=spec.serve.max_batch_tokens,
        )
        self._supervisor = Supervisor(config, self._dispatcher)
        self._dispatcher.send, self._dispatcher.on_ready, self._dispatcher.on_lost = (
            self._supervisor.send,
            self._ready,
            self._lost,
        )
        self._state = http_app.State(
            name=spec.name,
            aliases=frozenset({spec.model.source}),
            limits=http_app.Limits(
                max_inputs=spec.serve.max_client_batch,
                max_input_tokens=self._recipe.max_tokens,
                max_batch_tokens=spec.serve.max_batch_tokens,
                max_queue_tokens=spec.serve.max_queue_tokens,
                truncate=options.truncate,
            ),
            tokenizer=TokenizerPool(self._folder.path, self._recipe),
            dispatcher=self._dispatcher,
            metrics=self._metrics,
            matryoshka=self._recipe.matryoshka,
        )
        self._started = time.monotonic()
        self._signals = 0
        self._interrupted = False
        self._draining_since, self._abandoned_before = 0.0, 0
        if options.announce:
            _prepare(options.announce)

    async def run(self) -> int:
        """Serve until a signal; returns the exit code."""
        listener = listen(self._spec.serve.host, self._spec.serve.port)
        port = listener.getsockname()[1]
        host = "127.0.0.1" if self._spec.serve.host in ("0.0.0.0", "::") else self._spec.serve.host
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                http_app.create(self._state),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(self._spec.serve.drain_seconds)),
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, number)
        engine = asyncio.create_task(self._supervisor.run())
        web = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
        await asyncio.wait((engine, web), return_when=asyncio.FIRST_COMPLETED)
        if engine.done() and (problem := engine.exception()) is not None:
            self._uvicorn.should_exit = True
            await web
            raise problem
        await web
        unfinished = 0
        if loop.time() - self._draining_since >= self._uvicorn.config.timeout_graceful_shutdown:  # type: ignore[operator]
            unfinished = self._dispatcher.abandoned - self._abandoned_before
        self._supervisor.stop()
        await engine
        self._state.tokenizer.close()
        if unfinished:
            self._say(f"stopped with {unfinished} requests unanswered after {self._spec.serve.drain_seconds:g} s")
            return 1
        self._say("stopped")
        return EXIT_INTERRUPTED if self._interrupted else 0

    def _signal(self, number: int) -> None:
        self._signals += 1
        self._interrupted |= number == signal.SIGINT
        if self._signals > 1:
            if self._supervisor.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._supervisor.pid, signal.SIGKILL)
            os._exit(EXIT_INTERRUPTED if self._interrupted else _EXIT_AT_ONCE)
        self._say(f"shutting down: {self._dispatcher.outstanding} requests to finish; once more stops at once")
        self._state.phase = "draining"
        self._draining_since = asyncio.get_running_loop().time()
        self._abandoned_before = self._dispatcher.abandoned
        self._uvicorn.should_exit = True

    def _ready(self, info: EngineInfo) -> None:
        first = self._state.info is None
        seconds = time.monotonic() - self._started
        self._state.dimensions, self._state.hopeless = info.dimensions, False
        if self._state.phase != "draining":
            self._state.phase = "ready"
        if not first:
            self._say(f"the engine is back (restart {self._supervisor.restarts})")
            return
        self._state.info = self._describe(info, seconds)
        gc.collect()
        gc.freeze()
        for line in _lines(info, self._spec.name, self._url, seconds):
            self._say(line)
        if self._options.announce:
            _announce(self._options.announce, self._url)

    def _lost(self) -> None:
        if self._state.phase == "ready":
            self._state.phase = "restarting"
        self._state.hopeless = self._supervisor.hopeless

    def _describe(self, info: EngineInfo, seconds: float) -> dict[str, Any]:
        """The document of `GET /info`."""
        how, limits, image = self._recipe, self._state.limits, self._options.image
        said = info.to_json()
        return {
            "name": self._spec.name,
            "inferctl": inferctl.__version__,
            "model": {
                "source": self._spec.model.source,
                "sha256": self._folder.digest,
                "architecture": self._folder.architecture,
                "dimensions": info.dimensions,
                "max_tokens": how.max_tokens,
                "pooling": how.pooling,
                "pooling_assumed": how.assumed,
                "normalize": how.normalize,
            },
            "precision": said["precision"],
            "attention": info.attention,
            "attention_reason": info.attention_reason,
            "fidelity": {"cosine_min": info.cosine_min, "cosine_mean": info.cosine_mean, "check": info.check},
            "device": said["device"],
            "versions": {"python": sys.version.split()[0], **info.versions},
            "limits": {
                "max_client_batch": limits.max_inputs,
                "max_input_tokens": limits.max_input_tokens,
                "max_batch_tokens": info.batch_tokens,
                "max_queue_tokens": limits.max_queue_tokens,
                "max_body_bytes": limits.max_body_bytes,
                "truncate": limits.truncate,
            },
            "ready_seconds": round(seconds, 3),
            "image": {"reference": image[0], "digest": image[1]} if image else None,
        }


def _lines(info: EngineInfo, name: str, url: str, seconds: float) -> Iterator[str]:
    precision, device = info.precision, info.device
    asked = f" (asked for {precision.requested})" if precision.requested != precision.effective else ""
    yield f"precision  {precision.effective}{asked}, {precision.level}, {precision.method}: {precision.reason}"
    yield f"attention  {info.attention}: {info.attention_reason}"
    if info.cosine_min is not None:
        yield f"fidelity   cosine to fp32 at least {info.cosine_min:.5f}, {info.cosine_mean:.5f} on average ({info.check})"
    yield f"device     {device.name}" + (
        f", {device.threads} threads" if device.threads else f", compute capability {device.compute_capability}"
    )
    yield f"ready      {name} at {url} after {seconds:.1f} s; {url}/docs describes it"


def _prepare(announce: Path) -> None:
    """Remove what an earlier server announced; raises `UsageError` when the file cannot be written later."""
    if not os.access(announce.parent, os.W_OK):
        raise UsageError(
            f"{announce} cannot be written", "--announce takes a file in a folder that exists and is writable"
        )
    announce.unlink(missing_ok=True)


def _announce(file: Path, url: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    temporary.replace(file)
