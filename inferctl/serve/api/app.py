"""The ASGI application of the encoder tasks. `edge.middleware.Edge` is in front of it."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from inferctl.config.spec import Task
from inferctl.serve.api import openapi
from inferctl.serve.api.embedding_schemas import EmbeddingRequest, EmbeddingResponse
from inferctl.serve.api.embeddings import EmbeddingsEndpoint
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.openapi import Operation
from inferctl.serve.api.rerank import RerankEndpoint, ScoreEndpoint
from inferctl.serve.api.rerank_schemas import RerankRequest, RerankResponse, ScoreRequest, ScoreResponse
from inferctl.serve.edge.errors import ApiError

# The paths of the tasks, and their names in usage events. Cohere's clients use /v2/rerank, Jina's /v1/rerank.
ENDPOINTS = {
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v2/rerank": "rerank",
    "/rerank": "rerank",
    "/v1/score": "score",
}
_NAMES: dict[Task, tuple[str, ...]] = {"embed": ("embeddings",), "rerank": ("rerank", "score")}
_EMBED = [
    Operation(
        "/v1/embeddings",
        "Compute the embeddings of texts: one vector per input, in order.",
        EmbeddingRequest,
        EmbeddingResponse,
        {"input": ["first text", "second text"]},
    )
]
_RERANK = [
    Operation(
        "/v1/rerank",
        "Order documents by their relevance to a query.",
        RerankRequest,
        RerankResponse,
        {"query": "a question", "documents": ["first text", "second text"]},
    ),
    Operation(
        "/v1/score",
        "Compute the relevance of pairs of texts, in order.",
        ScoreRequest,
        ScoreResponse,
        {"text_1": "a question", "text_2": ["first text", "second text"]},
    ),
]


def served(task: Task) -> list[str]:
    """Return the paths that a server of this task has."""
    return [path for path, name in ENDPOINTS.items() if name in _NAMES[task]]


def create(inference: Inference) -> ASGIApp:
    """Return the application. Starlette handles what is not performance-critical."""
    model = inference.model

    async def unsupported(*_: object) -> None:
        message = f"model {model.name!r} does not support this endpoint; its task is {model.task}"
        raise ApiError(404, message, code="unsupported_task")

    supported: dict[str, ASGIApp] = {"embeddings": EmbeddingsEndpoint(inference)}
    if model.task == "rerank":
        supported = {"rerank": RerankEndpoint(inference), "score": ScoreEndpoint(inference)}
    operations = _RERANK if model.task == "rerank" else _EMBED
    endpoints = {path: supported.get(name, unsupported) for path, name in ENDPOINTS.items()}

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [entry]})

    async def one_model(request: Request) -> Response:
        model.check_name(request.path_params["name"])
        return _json(entry)

    async def document(_: Request) -> Response:
        return _json(openapi.document(model, operations))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(model, operations))

    async def failed(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        assert isinstance(error, ApiError)
        return Response(error.body(), error.status, error.headers, "application/json")

    entry = {"id": model.name, "object": "model", "created": model.created, "owned_by": "inferctl"}
    others = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
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
        endpoint = endpoints.get(scope["path"]) if scope["method"] == "POST" else None
        await (endpoint or others)(scope, receive, send)

    return route


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
