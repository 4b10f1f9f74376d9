"""The ASGI application of embeddings. `edge.middleware.Edge` is in front of it."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from inferctl.serve.edge.errors import ApiError
from inferctl.serve.embeddings import openapi
from inferctl.serve.embeddings.endpoint import EmbeddingsEndpoint

ENDPOINTS = {"/v1/embeddings": "embeddings"}


def create(embeddings: EmbeddingsEndpoint) -> ASGIApp:
    """Return the application. Starlette handles what is not performance-critical."""
    model = embeddings.model

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [entry]})

    async def one_model(request: Request) -> Response:
        model.check_name(request.path_params["name"])
        return _json(entry)

    async def document(_: Request) -> Response:
        return _json(openapi.document(model))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(model))

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        assert isinstance(error, ApiError)
        return Response(error.body(), error.status, error.headers, "application/json")

    entry = {"id": model.name, "object": "model", "created": model.created, "owned_by": "inferctl"}
    others = Starlette(
        routes=[
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/openapi.json", document),
            Route("/docs", docs),
        ],
        exception_handlers={HTTPException: failed, ApiError: failed},
    )
    # Many clients drop the body of a redirected POST. A 404 is clearer.
    others.router.redirect_slashes = False

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        is_embeddings = scope["path"] == "/v1/embeddings" and scope["method"] == "POST"
        await (embeddings if is_embeddings else others)(scope, receive, send)

    return route


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
