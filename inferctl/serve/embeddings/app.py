"""The HTTP application: Starlette routes over a `Dispatcher`. Probes, metrics and info do not use the queue."""

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

from inferctl.serve.edge.limits import InFlightLimits
from inferctl.serve.embeddings import openapi
from inferctl.serve.embeddings.endpoint import EmbeddingsEndpoint
from inferctl.serve.embeddings.schemas import ApiError
from inferctl.serve.metrics import CONTENT_TYPE, Metrics
from inferctl.serve.scheduling.dispatcher import Dispatcher
from inferctl.serve.tokenizer_pool import TokenizerPool

Phase = Literal["starting", "ready", "restarting", "draining"]
_PHASE_MESSAGES = {"restarting": "restarting its engine", "draining": "shutting down"}


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one request. `max_body_bytes` is the size of the raw body."""

    max_inputs: int
    max_input_tokens: int
    max_queue_tokens: int
    truncate: bool
    max_body_bytes: int = 32 * 1024 * 1024


@dataclass
class State:
    """The state that the routes share.

    `describe()` returns the document of `GET /info`, None until an engine was ready.
    `trace(headers, request id, status, tokens, seconds, seconds by phase)` is called after each request.
    """

    name: str
    aliases: frozenset[str]
    limits: RequestLimits
    tokenizer: TokenizerPool
    dispatcher: Dispatcher
    metrics: Metrics
    matryoshka: tuple[int, ...] | None
    describe: Callable[[], dict[str, Any] | None] = lambda: None
    log_requests: bool = False
    trace: Callable[[Any, str, int, int, float, dict[str, float]], None] | None = None
    in_flight: InFlightLimits = field(default_factory=InFlightLimits)
    crash_looping: Callable[[], bool] = lambda: False
    started: bool = False  # an engine was ready once
    draining: bool = False  # received a signal to stop
    closed: bool = False  # accepts no more requests
    dimensions: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def phase(self) -> Phase:
        """The phase of the server, as `GET /readyz` reports it."""
        if self.draining:
            return "draining"
        if self.dispatcher.ready:
            return "ready"
        return "restarting" if self.started else "starting"

    @property
    def accepts_requests(self) -> bool:
        """Whether the server accepts requests for embeddings, also while draining until the grace period ends."""
        return self.dispatcher.ready and not self.closed

    def schema_limits(self) -> openapi.SchemaLimits | None:
        """Return the limits for the OpenAPI document; None before an engine was ready."""
        if not self.started:
            return None
        sizes = self.matryoshka
        allowed = None if sizes is None else (*(d for d in sizes if d < self.dimensions), self.dimensions)
        return openapi.SchemaLimits(self.tokenizer.vocabulary_size, self.limits.max_inputs, self.dimensions, allowed)

    def unavailable(self) -> ApiError:
        """Return the 503 of this phase."""
        message = f"the server is {_PHASE_MESSAGES.get(self.phase, self.phase)}"
        return ApiError(503, message, code="not_ready", headers={"retry-after": "5"}, close=self.draining)

    def unknown_model(self, wanted: str) -> ApiError:
        """Return the 404 for another model's name."""
        message = f"model {wanted!r} not found; this server serves {self.name!r}"
        return ApiError(404, message, code="model_not_found", param="model")

    def dimensions_for(self, wanted: int | None) -> int | None:
        """Return to how many dimensions vectors are truncated; None for full vectors.

        Raises `ApiError` 400 if the model was not trained for `wanted`.
        """
        sizes = self.matryoshka
        if wanted in (None, self.dimensions):
            return None
        if wanted is not None and wanted < self.dimensions and (sizes is None or wanted in sizes):
            return wanted
        allowed = [str(d) for d in sizes or () if d <= self.dimensions] or [str(self.dimensions)]
        possible = f"1 to {self.dimensions}" if sizes is None else " or ".join(allowed)
        message = f"`dimensions` of model {self.name!r} must be {possible}, got {wanted}"
        raise ApiError(400, message, code="invalid_dimensions", param="dimensions")


def create(state: State) -> ASGIApp:
    """Return the ASGI application. Requests for embeddings get 503 until the engine is ready.

    `POST /v1/embeddings` is routed before Starlette, whose overhead is larger than the rest of the work per request.
    """

    async def models(_: Request) -> Response:
        entry = {"id": state.name, "object": "model", "created": state.created, "owned_by": "inferctl"}
        return _json({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        wanted = request.path_params["name"]
        if wanted != state.name and wanted not in state.aliases:
            raise state.unknown_model(wanted)
        return _json({"id": state.name, "object": "model", "created": state.created, "owned_by": "inferctl"})

    async def livez(_: Request) -> Response:
        return _text("the engine fails to start", 503) if state.crash_looping() else _text("ok")

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
        return _json(openapi.document(state.name, state.schema_limits()))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(state.name))

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, ApiError):
            headers = error.headers | ({"connection": "close"} if error.close else {})
            return Response(error.body(), error.status, headers, "application/json")
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(getattr(error, "headers", None) or {})
        detail = str(error.detail) if isinstance(error, HTTPException) else "internal error; see the server log"
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
    # Many clients drop the body of a redirected POST. A 404 is clearer.
    others.router.redirect_slashes = False

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        is_embeddings = scope["type"] == "http" and scope["path"] == "/v1/embeddings" and scope["method"] == "POST"
        await (embeddings if is_embeddings else others)(scope, receive, send)

    return route


def _text(line: str, status: int = 200) -> Response:
    return Response(f"{line}\n", status, media_type="text/plain")


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
