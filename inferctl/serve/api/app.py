"""The ASGI application of the encoder tasks. `edge.edge.Edge` is in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferctl.batching.fairness import Shares
from inferctl.serve.api import classify, cohere, embeddings, openapi, rerank, schemas, tei, tokenize
from inferctl.serve.api.endpoint import Endpoint
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.served_model import ServedModel, unknown_model
from inferctl.serve.edge.access import check_endpoint
from inferctl.serve.edge.errors import ApiError, at_capacity, cohere_body, voyage_body, wrong_method
from inferctl.serve.edge.request_context import BY_MODEL, RequestContext, context_of

_APIS = (tokenize, embeddings, tei, cohere, rerank, classify)
_OWN = tuple(endpoint for api in _APIS for endpoint in api.ENDPOINTS)
# A model with vectors of tokens ranks documents by MaxSim, at the paths of rerankers.
ALL = (*_OWN, *(replace(each, task="embed", output="tokens", aliases=()) for each in _OWN if each.name == "rerank"))

_SHAPES = {path: endpoint.errors[0] for endpoint in ALL for path in endpoint.paths}
_PREFIXES = {"/voyage/": voyage_body, "/jina/": voyage_body, "/v2/": cohere_body}


def endpoints(models: Iterable[ServedModel]) -> dict[str, list[tuple[ServedModel, Endpoint]]]:
    """Return what the models of a server have at each path."""
    found: dict[str, list[tuple[ServedModel, Endpoint]]] = {}
    for model in models:
        for endpoint in ALL:
            for path in endpoint.paths if endpoint.serves(model.task, model.trained) else ():
                found.setdefault(path, []).append((model, endpoint))
    return found


def names(models: Sequence[ServedModel]) -> dict[str, str]:
    """Return the names of all paths of tasks. A path of several tasks has the name in those of the server."""
    found = {path: endpoint.name for endpoint in ALL for path in endpoint.paths}
    for path, at in endpoints(models).items():
        different = {endpoint.name for _, endpoint in at}
        found[path] = different.pop() if len(different) == 1 else BY_MODEL
    return found


def owners(models: Sequence[ServedModel]) -> dict[str, int | None]:
    """Return the number of the model that has a path, None for several."""
    return {path: at[0][0].number if len(at) == 1 else None for path, at in endpoints(models).items()}


def error_body(path: str, error: ApiError) -> bytes:
    """Return the body of an error at a path, also at one that no API has. The tasks of a path have the same shape."""
    others = (shape for prefix, shape in _PREFIXES.items() if path.startswith(prefix))
    shape: Callable[[ApiError], bytes] = _SHAPES.get(path) or next(others, ApiError.body)
    return shape(error)


class _Target(NamedTuple):
    """What one model has at a path."""

    inference: Inference
    endpoint: Endpoint
    application: ASGIApp


@dataclass(frozen=True)
class _ByModel:
    """The application of a path of a server with several models, or of one that its model does not have.

    A key sees the models that it may use, as if the server had only these. Of several that have the path, the body
    names one. `shares`: of the requests in flight. Those of a model whose engine hangs leave room for other models.
    """

    models: Sequence[ServedModel]
    targets: Sequence[_Target]
    shares: Shares

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the endpoint of the right model respond. Raises `ApiError`, which the edge sends."""
        context = context_of(scope)
        models = visible(self.models, context)
        targets = [each for each in self.targets if any(each.inference.model is model for model in models)]
        if not targets:
            raise _unsupported(scope["path"], models)
        target = targets[0]
        if len(self.targets) > 1:
            _, (raw, target) = await target.inference.receive(scope, receive, partial(_choose, targets))
            receive = partial(_received, raw)
        context.model = name = target.inference.model.name
        context.asked = context.asked._replace(endpoint=target.endpoint.name)
        check_endpoint(scope, context)
        if not self.shares.take(name):
            message = f"the model {name!r} has many requests in flight, and other models need room"
            raise at_capacity(message, "too_many_requests", 1)
        try:
            await target.application(scope, receive, send)
        finally:
            self.shares.release(name)


def visible(models: Iterable[ServedModel], context: RequestContext) -> list[ServedModel]:
    """Return the models that the key of a request may use."""
    return [model for model in models if context.may_use(model.name, model.source)]


def _choose(targets: Sequence[_Target], raw: bytes) -> tuple[bytes, _Target]:
    """Return a body, and the target that it names. Raises `ApiError`."""
    wanted = schemas.parse(schemas.ModelRequest, raw, max_inputs=0).model
    found = [each for each in targets if each.inference.model.has_name(wanted)]
    if len(found) != 1:
        raise unknown_model(
            wanted if not found else None, [name for each in targets for name in each.inference.model.names]
        )
    return raw, found[0]


async def _received(raw: bytes) -> Message:
    return {"type": "http.request", "body": raw}


def _unsupported(path: str, models: Iterable[ServedModel]) -> ApiError:
    needs = " or ".join(each.needs for each in ALL if path in each.paths)
    has = "; ".join(
        f"model {model.name!r} is for {model.task}"
        + (f" with the output {', '.join(model.trained)}" if model.task == "embed" else "")
        for model in models
    )
    return ApiError(404, f"this endpoint requires a model for {needs}; {has}", code="unsupported_task")


def create(name: str, inferences: Sequence[Inference], max_requests: int) -> ASGIApp:
    """Return the application of a server, by the number of its models, which share `max_requests` in flight.

    Starlette handles what is not performance-critical.
    """
    served = [inference.model for inference in inferences]
    at = endpoints(served)
    applications: dict[str, ASGIApp] = {}
    shares = Shares(max_requests)
    for path in _SHAPES:
        targets = [
            _Target(inferences[model.number], endpoint, endpoint.application(inferences[model.number]))
            for model, endpoint in at.get(path, ())
        ]
        direct = len(served) == 1 and targets
        applications[path] = targets[0].application if direct else _ByModel(served, targets, shares)

    async def models(request: Request) -> Response:
        data = [entry(model, name) for model in visible(served, context_of(request.scope)) for name in model.names]
        return _json({"object": "list", "data": data})

    async def one_model(request: Request) -> Response:
        wanted, known = request.path_params["name"], visible(served, context_of(request.scope))
        for model in known:
            if wanted and model.has_name(wanted):
                return _json(entry(model, wanted if wanted in model.aliases else model.name))
        raise unknown_model(wanted, [name for model in known for name in model.names])

    async def document(_: Request) -> Response:
        return _json(openapi.document(name, at))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(name, at))

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            if error.status_code == 404:
                error = ApiError(404, absent, code="not_found")
            else:  # 405, the only other one of the router
                methods = (error.headers or {})["Allow"].split(", ")
                error = wrong_method(request.method, ", ".join(sorted(methods)))
        assert isinstance(error, ApiError)
        return Response(error_body(request.url.path, error), error.status, error.headers, "application/json")

    def entry(model: ServedModel, name: str) -> dict[str, Any]:
        alias = {} if name == model.name else {"root": model.name}
        spaces = {output: each.name for output, each in model.spaces.items()}
        found = {"id": name, "object": "model", "created": model.created, "owned_by": "inferctl", **alias}
        return found | ({"spaces": spaces} if spaces else {})

    own = dict.fromkeys(endpoint.path for found in at.values() for _, endpoint in found)
    absent = f"no such endpoint; POST to {', '.join(own)}; GET /v1/models or /docs"

    others = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in applications.items()),
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
        endpoint = applications.get(scope["path"]) if scope["method"] == "POST" else None
        await (endpoint or others)(scope, receive, send)

    return route


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
