"""The ASGI application of the encoder tasks. `edge.middleware.Edge` is in front of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import orjson
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from inferctl.config.spec import Task
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Output
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.api import openapi
from inferctl.serve.api.classify import classify, predict
from inferctl.serve.api.classify_schemas import ClassifyRequest, ClassifyResponse, PredictRequest, PredictResponse
from inferctl.serve.api.cohere import CohereEmbed, CohereEmbedRequest, CohereEmbedResponse
from inferctl.serve.api.embedding_schemas import (
    EmbeddingRequest,
    EmbeddingResponse,
    OpenAi,
    PoolingRequest,
    PoolingResponse,
)
from inferctl.serve.api.embeddings import EmbeddingApi, EmbeddingsEndpoint
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.openapi import Operation
from inferctl.serve.api.rerank import rerank, score, tei_rerank, voyage_rerank
from inferctl.serve.api.rerank_schemas import (
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
    TeiRerankRequest,
    TeiRerankResponse,
    VoyageRerankRequest,
    VoyageRerankResponse,
)
from inferctl.serve.api.schemas import CohereErrorResponse, ErrorResponse, TeiErrorResponse, VoyageErrorResponse
from inferctl.serve.api.tei import (
    EmbedAllResponse,
    EmbedRequest,
    EmbedResponse,
    EmbedSparseResponse,
    SimilarityRequest,
    SimilarityResponse,
    TeiEmbed,
    TeiOptions,
    TeiOutput,
    TeiSimilarity,
)
from inferctl.serve.api.tokenize import TokenizeRequest, TokenizeResponse, tokenize
from inferctl.serve.edge.errors import ApiError, cohere_body, tei_body, voyage_body, wrong_method

_Shape: TypeAlias = tuple[Callable[[ApiError], bytes], type[BaseModel]]
_OPENAI: _Shape = ApiError.body, ErrorResponse
_TEI: _Shape = tei_body, TeiErrorResponse
_COHERE: _Shape = cohere_body, CohereErrorResponse
_VOYAGE: _Shape = voyage_body, VoyageErrorResponse  # that of Jina too


@dataclass(frozen=True)
class Endpoint:
    """What one task answers at `path` and at its `aliases`.

    `name`: in usage events and the scopes of keys. `bodies`: the models of its requests and responses. `application`:
    makes it, once for a server. `errors`: what makes the body of an error, and its model. `output`: the one that a
    model must have been trained for.
    """

    name: str
    task: Task
    path: str
    summary: str
    bodies: tuple[type[BaseModel], type[BaseModel]]
    example: dict[str, Any]
    application: Callable[[Inference], ASGIApp]
    errors: _Shape = _OPENAI
    aliases: tuple[str, ...] = ()
    output: Output | None = None

    def serves(self, task: Task, trained: Sequence[Output]) -> bool:
        """Return whether a server has it. `trained`: the outputs that an embedding model was trained for."""
        return self.task == task and (self.output is None or self.output in trained)

    @property
    def needs(self) -> str:
        """For which task a model must be, and its output, for an error."""
        return f"{self.task} with the output {self.output}" if self.output else self.task

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return self.path, *self.aliases

    @property
    def operations(self) -> list[Operation]:
        """What the OpenAPI document says about each path."""
        return [Operation(path, self.summary, *self.bodies, self.example, self.errors[1]) for path in self.paths]


_TASKS: tuple[Task, ...] = ("embed", "rerank", "classify")
_VERSIONS: tuple[Literal[1, 2], ...] = (2, 1)  # of Cohere's API
_POOLING = "Compute embeddings, or the scores of all labels: as vLLM does for one `task`."
_TEXTS = ["first text", "second text"]
_INPUT, _INPUTS = {"input": _TEXTS}, {"inputs": _TEXTS}


def _of(function: Callable[..., Awaitable[None]]) -> Callable[[Inference], ASGIApp]:
    """Return what makes the application of a function of `Inference` and the three arguments of ASGI."""
    return lambda inference: partial(function, inference)


def _embed(
    path: str, summary: str, bodies: tuple[type[BaseModel], type[BaseModel]], api: EmbeddingApi, **others: Any
) -> Endpoint:
    application = partial(EmbeddingsEndpoint, api=api)
    return Endpoint("embeddings", "embed", path, summary, bodies, application=application, **others)


def _tei_embed(
    path: str, summary: str, bodies: tuple[type[BaseModel], type[BaseModel]], api: EmbeddingApi, **others: Any
) -> Endpoint:
    summary = f"Compute {summary}, as text-embeddings-inference does."
    return _embed(path, summary, bodies, api, **{"example": _INPUTS} | others, errors=_TEI)


def _rerank(path: str, summary: str = "", errors: _Shape = _OPENAI) -> Endpoint:
    summary = f"Order documents by their relevance to a query{summary}."
    example = {"query": "a question", "documents": _TEXTS}
    return Endpoint("rerank", "rerank", path, summary, (RerankRequest, RerankResponse), example, _of(rerank), errors)


_OWN = (
    *(
        Endpoint(
            "tokenize",
            task,
            "/tokenize",
            "Return the tokens of texts, as text-embeddings-inference does, or with `prompt` as vLLM does.",
            (TokenizeRequest, TokenizeResponse),
            _INPUTS,
            _of(tokenize),
            _TEI,
        )
        for task in _TASKS
    ),
    _embed(
        "/v1/embeddings",
        "Compute the embeddings of texts: one vector per input, in order.",
        (EmbeddingRequest, EmbeddingResponse),
        OpenAi(),
        example=_INPUT,
    ),
    _tei_embed(
        "/embed",
        "the embeddings of texts",
        (EmbedRequest, EmbedResponse),
        TeiEmbed(),
        aliases=("/",),
        output="dense",
    ),
    _tei_embed(
        "/embed_sparse",
        "the sparse weights of texts",
        (TeiOptions, EmbedSparseResponse),
        TeiOutput("sparse"),
        output="sparse",
    ),
    _tei_embed("/embed_all", "one vector for each token of texts", (TeiOptions, EmbedAllResponse), TeiOutput("tokens")),
    _tei_embed(
        "/similarity",
        "the cosines of a text and others",
        (SimilarityRequest, SimilarityResponse),
        TeiSimilarity(),
        example={"inputs": {"source_sentence": "a text", "sentences": _TEXTS}},
        output="dense",
    ),
    _embed(
        "/voyage/embeddings",
        "Compute the embeddings of texts: as /v1/embeddings, with the errors of Voyage and Jina.",
        (EmbeddingRequest, EmbeddingResponse),
        OpenAi(),
        example={**_INPUT, "output_dtype": "float"},
        aliases=("/jina/v1/embeddings",),
        errors=_VOYAGE,
    ),
    *(
        _embed(
            f"/v{version}/embed",
            f"Compute embeddings in one or several number formats, as version {version} of Cohere's API.",
            (CohereEmbedRequest, CohereEmbedResponse),
            CohereEmbed(version),
            example={"texts": _TEXTS, "embedding_types": ["float"]},
            errors=_COHERE,
            output="dense",
        )
        for version in _VERSIONS
    ),
    _embed(
        "/pooling",
        _POOLING,
        (PoolingRequest, PoolingResponse),
        OpenAi(request=PoolingRequest, pooling=True),
        example=_INPUT,
    ),
    _rerank("/v1/rerank"),
    Endpoint(
        "rerank",
        "rerank",
        "/rerank",
        "Order texts by their relevance to a query, as text-embeddings-inference does; `documents` as /v1/rerank.",
        (TeiRerankRequest, TeiRerankResponse),
        {"query": "a question", "texts": _TEXTS},
        _of(tei_rerank),
        _TEI,
        ("/",),
    ),
    Endpoint(
        "rerank",
        "rerank",
        "/voyage/rerank",
        "Order documents by their relevance to a query, as Voyage does.",
        (VoyageRerankRequest, VoyageRerankResponse),
        {"query": "a question", "documents": _TEXTS},
        _of(voyage_rerank),
        _VOYAGE,
    ),
    _rerank("/jina/v1/rerank", ", with the errors of Jina", _VOYAGE),
    _rerank("/v2/rerank", ", with the errors of Cohere", _COHERE),
    Endpoint(
        "score",
        "rerank",
        "/v1/score",
        "Compute the relevance of pairs of texts, in order.",
        (ScoreRequest, ScoreResponse),
        {"text_1": "a question", "text_2": _TEXTS},
        _of(score),
        aliases=("/score",),  # of vLLM, too
    ),
    Endpoint(
        "classify",
        "classify",
        "/classify",
        "Compute the scores of all labels for texts, in order.",
        (ClassifyRequest, ClassifyResponse),
        _INPUT,
        _of(classify),
    ),
    Endpoint(
        "classify",
        "classify",
        "/pooling",
        _POOLING,
        (ClassifyRequest, PoolingResponse),
        _INPUT,
        _of(partial(classify, pooling=True)),
    ),
    Endpoint(
        "predict",
        "classify",
        "/predict",
        "Order the labels of texts or pairs of texts by their scores.",
        (PredictRequest, PredictResponse),
        {"inputs": [["a text"], ["first text of a pair", "second text"]]},
        _of(predict),
        _TEI,
        ("/",),
    ),
)


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
    operations = [operation for endpoint in own for operation in endpoint.operations]
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
        return _json(openapi.document(model, operations))

    async def docs(_: Request) -> Response:
        return HTMLResponse(openapi.page(model, operations))

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
