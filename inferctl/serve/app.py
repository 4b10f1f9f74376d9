"""The HTTP side: Starlette routes over a `Dispatcher`. Probes, metrics and info never touch the queue."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from inferctl.serve import openapi
from inferctl.serve.dispatcher import Dispatcher
from inferctl.serve.endpoint import EmbeddingsEndpoint
from inferctl.serve.http import ApiError
from inferctl.serve.load import Load
from inferctl.serve.metrics import CONTENT_TYPE, Metrics
from inferctl.serve.tokenise import TokenizerPool

Phase = Literal["starting", "ready", "restarting", "draining"]
_SAID = {"restarting": "starting its engine again", "draining": "shutting down"}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. `max_body_bytes` bounds the raw body."""

    max_inputs: int
    max_input_tokens: int
    max_queue_tokens: int
    truncate: bool
    max_body_bytes: int = 32 * 1024 * 1024


@dataclass
class State:
    """What the routes share. `describe()` is the document of `GET /info`, None until an engine was ready.

    `trace(headers, request id, status, tokens, seconds, seconds by phase)` is told of every request that ended.
    """

    name: str
    aliases: frozenset[str]
    limits: Limits
    tokenizer: TokenizerPool
    dispatcher: Dispatcher
    metrics: Metrics
    matryoshka: tuple[int, ...] | None
    describe: Callable[[], dict[str, Any] | None] = lambda: None
    log_requests: bool = False
    trace: Callable[[Any, str, int, int, float, dict[str, float]], None] | None = None
    load: Load = field(default_factory=Load)
    hopeless: Callable[[], bool] = lambda: False
    started: bool = False  # an engine was ready once
    draining: bool = False  # told to stop
    closed: bool = False  # takes no requests any more
    dimensions: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def phase(self) -> Phase:
        """Where the server is in its life; ready in `ready` only."""
        if self.draining:
            return "draining"
        if self.dispatcher.up:
            return "ready"
        return "restarting" if self.started else "starting"

    @property
    def answering(self) -> bool:
        """Whether embeddings are answered: also while draining, until nobody should send any more."""
        return self.dispatcher.up and not self.closed

    def facts(self) -> openapi.Facts | None:
        """What this server takes, for the OpenAPI document; None before an engine was ready."""
        if not self.started:
            return None
        sizes = self.matryoshka
        allowed = None if sizes is None else (*(d for d in sizes if d < self.dimensions), self.dimensions)
        return openapi.Facts(self.tokenizer.vocabulary_size, self.limits.max_inputs, self.dimensions, allowed)

    def unavailable(self) -> ApiError:
        """The 503 of this phase."""
        said = f"the server is {_SAID.get(self.phase, self.phase)}"
        return ApiError(503, said, code="not_ready", headers={"retry-after": "5"}, close=self.draining)

    def unknown_model(self, wanted: str) -> ApiError:
        """The 404 for another model's name."""
        message = f"there is no model {wanted!r} here; this server has {self.name!r}"
        return ApiError(404, message, code="model_not_found", param="model")

    def dimensions_for(self, wanted: int | None) -> int | None:
        """To how many dimensions vectors are cut; None for not at all. Raises `ApiError` 400 when the model was not trained for it."""
        sizes = self.matryoshka
        if wanted in (None, self.dimensions):
            return None
        if wanted is not None and wanted < self.dimensions and (sizes is None or wanted in sizes):
            return wanted
        allowed = [str(d) for d in sizes or () if d <= self.dimensions] or [str(self.dimensions)]
        possible = f"1 to {self.dimensions}" if sizes is None else ", ".join(allowed)
        message = f"{self.name} cannot give {wanted} dimensions, only {possible}"
        raise ApiError(400, message, code="invalid_dimensions", param="dimensions")


def create(state: State) -> ASGIApp:
    """The application, its one hot route before all others: what Starlette adds to it costs more than the rest. It answers from the first moment on; embeddings get 503 until the engine is ready."""

    async def models(_: Request) -> Response:
        entry = {"id": state.name, "object": "model", "created": state.created, "owned_by": "inferctl"}
        return _json({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        wanted = request.path_params["name"]
        if wanted != state.name and wanted not in state.aliases:
            raise state.unknown_model(wanted)
        return _json({"id": state.name, "object": "model", "created": state.created, "owned_by": "inferctl"})

    async def livez(_: Request) -> Response:
        return _text("the engine does not start", 503) if state.hopeless() else _text("ok")

    async def readyz(_: Request) -> Response:
        return _text("ok") if state.phase == "ready" else _text(state.phase, 503)

    async def metrics(_: Request) -> Response:
        return Response(state.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def info(_: Request) -> Response:
        document = state.describe()
        if document is None:
            raise state.unavailable()
        return _json({**document, "phase": state.phase})

    async def document(_: Request) -> Response:
        return _json(openapi.document(state.name, state.facts()))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(state.name))

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, ApiError):
            headers = error.headers | ({"connection": "close"} if error.close else {})
            return Response(error.body(), error.status, headers, "application/json")
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(getattr(error, "headers", None) or {})
        detail = str(error.detail) if isinstance(error, HTTPException) else "an internal error; the server's log has it"
        return Response(ApiError(status, detail).body(), status, headers, "application/json")

    embeddings = EmbeddingsEndpoint(state)
    others = Starlette(
        routes=[
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/info", info),
            Route("/openapi.json", document),
            Route("/docs", docs),
        ],
        exception_handlers={ApiError: failed, HTTPException: failed, Exception: failed},
    )
    others.router.redirect_slashes = False  # a POST that is redirected loses its body with many clients: better a 404

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        hot = scope["type"] == "http" and scope["path"] == "/v1/embeddings" and scope["method"] == "POST"
        await (embeddings if hot else others)(scope, receive, send)

    return route


def _text(line: str, status: int = 200) -> Response:
    return Response(f"{line}\n", status, media_type="text/plain")


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
