"""The ASGI application of the encoder tasks. `edge.middleware.Edge` is in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from inferctl.serve.api.classify import ClassifyEndpoint, PredictEndpoint
from inferctl.serve.api.classify_schemas import ClassifyRequest, ClassifyResponse, PredictRequest, PredictResponse
from inferctl.serve.api.embedding_schemas import EmbeddingRequest, EmbeddingResponse
from inferctl.serve.api.embeddings import EmbeddingsEndpoint
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.openapi import Operation
from inferctl.serve.api.rerank import RerankEndpoint, ScoreEndpoint
from inferctl.serve.api.rerank_schemas import RerankRequest, RerankResponse, ScoreRequest, ScoreResponse
from inferctl.serve.api.schemas import TeiErrorResponse
from inferctl.serve.edge.errors import ApiError, tei_body


@dataclass(frozen=True)
class Endpoint:
    """What one task answers at some paths, of which `operation` documents the first.

    `name`: in usage events and the scopes of keys. `application`: makes it, once for a server. `error_body`: the shape
    of its errors.
    """

    name: str
    task: Task
    operation: Operation
    application: Callable[[Inference], ASGIApp]
    aliases: tuple[str, ...] = ()
    error_body: Callable[[ApiError], bytes] = ApiError.body

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return self.operation.path, *self.aliases


_ALL = (
    Endpoint(
        "embeddings",
        "embed",
        Operation(
            "/v1/embeddings",
            "Compute the embeddings of texts: one vector per input, in order.",
            EmbeddingRequest,
            EmbeddingResponse,
            {"input": ["first text", "second text"]},
        ),
        EmbeddingsEndpoint,
    ),
    Endpoint(
        "rerank",
        "rerank",
        Operation(
            "/v1/rerank",
            "Order documents by their relevance to a query.",
            RerankRequest,
            RerankResponse,
            {"query": "a question", "documents": ["first text", "second text"]},
        ),
        RerankEndpoint,
        ("/v2/rerank", "/rerank"),  # of Cohere's clients and of Jina's first
    ),
    Endpoint(
        "score",
        "rerank",
        Operation(
            "/v1/score",
            "Compute the relevance of pairs of texts, in order.",
            ScoreRequest,
            ScoreResponse,
            {"text_1": "a question", "text_2": ["first text", "second text"]},
        ),
        ScoreEndpoint,
    ),
    Endpoint(
        "classify",
        "classify",
        Operation(
            "/classify",
            "Compute the scores of all labels for texts, in order.",
            ClassifyRequest,
            ClassifyResponse,
            {"input": ["first text", "second text"]},
        ),
        ClassifyEndpoint,
    ),
    Endpoint(
        "predict",
        "classify",
        Operation(
            "/predict",
            "Order the labels of texts or pairs of texts by their scores.",
            PredictRequest,
            PredictResponse,
            {"inputs": [["a text"], ["first text of a pair", "second text"]]},
            TeiErrorResponse,
        ),
        PredictEndpoint,
        error_body=tei_body,
    ),
)
ENDPOINTS = {path: endpoint.name for endpoint in _ALL for path in endpoint.paths}
ERROR_BODIES = {path: endpoint.error_body for endpoint in _ALL for path in endpoint.paths}


def served(task: Task) -> list[str]:
    """Return the paths that a server of this task has."""
    return [path for endpoint in _ALL if endpoint.task == task for path in endpoint.paths]


def create(inference: Inference) -> ASGIApp:
    """Return the application. Starlette handles what is not performance-critical."""
    model = inference.model

    async def unsupported(*_: object) -> None:
        message = f"model {model.name!r} does not support this endpoint; its task is {model.task}"
        raise ApiError(404, message, code="unsupported_task")

    operations = [endpoint.operation for endpoint in _ALL if endpoint.task == model.task]
    endpoints: dict[str, ASGIApp] = {}
    for each in _ALL:
        application = each.application(inference) if each.task == model.task else unsupported
        endpoints |= dict.fromkeys(each.paths, application)

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
