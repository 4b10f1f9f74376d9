"""The ASGI application of the encoder tasks. `edge.edge.Edge` is in front of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from inferctl.config.spec import Task
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.api import classify, cohere, embeddings, openapi, rerank, tei, tokenize
from inferctl.serve.api.endpoint import Endpoint
from inferctl.serve.api.inference import Inference
from inferctl.serve.edge.errors import ApiError, cohere_body, voyage_body, wrong_method

_APIS = (tokenize, embeddings, tei, cohere, rerank, classify)
_OWN = tuple(endpoint for api in _APIS for endpoint in api.ENDPOINTS)
# A model with vectors of tokens ranks documents by MaxSim, at the paths of rerankers.
ALL = (*_OWN, *(replace(each, task="embed", output="tokens", aliases=()) for each in _OWN if each.name == "rerank"))


def served(config: TaskConfig) -> list[str]:
    """Return the paths that a server has."""
    trained = config.trained if isinstance(config, EmbeddingConfig) else ()
    return [path for endpoint in ALL if endpoint.serves(config.task, trained) for path in endpoint.paths]


def names(task: Task) -> dict[str, str]:
    """Return the names of all paths of tasks. A path of several tasks has the name in this one."""
    return {path: endpoint.name for endpoint in _of_task_last(task) for path in endpoint.paths}


def error_body(task: Task) -> Callable[[str, ApiError], bytes]:
    """Return the function that makes the body of an error at a path, also at one that no API has."""
    shapes = {path: endpoint.errors[0] for endpoint in _of_task_last(task) for path in endpoint.paths}
    prefixes = {"/voyage/": voyage_body, "/jina/": voyage_body, "/v2/": cohere_body}

    def body(path: str, error: ApiError) -> bytes:
        shape = shapes.get(path)
        if shape is None:
            shape = next((shape for prefix, shape in prefixes.items() if path.startswith(prefix)), ApiError.body)
        return shape(error)

    return body


def _of_task_last(task: Task) -> list[Endpoint]:
    return sorted(ALL, key=lambda endpoint: endpoint.task == task)


def create(inference: Inference) -> ASGIApp:
    """Return the application. Starlette handles what is not performance-critical."""
    model = inference.model

    async def unsupported(scope: Scope, *_: object) -> None:
        needs = " or ".join(each.needs for each in ALL if scope["path"] in each.paths)
        has = f" with the output {', '.join(model.trained)}" if model.task == "embed" else ""
        message = f"this endpoint requires a model for {needs}; model {model.name!r} is for {model.task}{has}"
        raise ApiError(404, message, code="unsupported_task")

    own = [endpoint for endpoint in ALL if endpoint.serves(model.task, model.trained)]
    endpoints: dict[str, ASGIApp] = {}
    for each in sorted(ALL, key=lambda endpoint: endpoint.serves(model.task, model.trained)):
        application = each.application(inference) if each in own else unsupported
        endpoints |= dict.fromkeys(each.paths, application)

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [entry(name) for name in model.names]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        model.check_name(name)
        return _json(entry(name if name in model.aliases else model.name))

    async def document(_: Request) -> Response:
        return _json(openapi.document(model, own))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(model, own))

    body_of = error_body(model.task)

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            if error.status_code == 404:
                error = ApiError(404, absent, code="not_found")
            else:  # 405, the only other one of the router
                methods = (error.headers or {})["Allow"].split(", ")
                error = wrong_method(request.method, ", ".join(sorted(methods)))
        assert isinstance(error, ApiError)
        return Response(body_of(request.url.path, error), error.status, error.headers, "application/json")

    def entry(name: str) -> dict[str, Any]:
        alias = {} if name == model.name else {"root": model.name}
        return {"id": name, "object": "model", "created": model.created, "owned_by": "inferctl", **alias}

    absent = f"no such endpoint; POST to {', '.join(each.path for each in own)}; GET /v1/models or /docs"

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
