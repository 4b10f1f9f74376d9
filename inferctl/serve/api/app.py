"""The ASGI application of the encoder tasks. `edge.middleware.Edge` is in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

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
from inferctl.serve.api.cohere import CohereEmbed, CohereEmbedRequest, CohereEmbedResponse
from inferctl.serve.api.embedding_schemas import (
    EmbeddingRequest,
    EmbeddingResponse,
    OpenAi,
    PoolingRequest,
    PoolingResponse,
)
from inferctl.serve.api.embeddings import EmbeddingsEndpoint
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.openapi import Operation
from inferctl.serve.api.rerank import RerankEndpoint, ScoreEndpoint, TeiRerankEndpoint, VoyageRerankEndpoint
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
from inferctl.serve.api.schemas import CohereErrorResponse, TeiErrorResponse, VoyageErrorResponse
from inferctl.serve.api.tei import (
    EmbedAllResponse,
    EmbedRequest,
    EmbedResponse,
    EmbedSparseResponse,
    SimilarityRequest,
    SimilarityResponse,
    TeiEmbed,
    TeiEmbedAll,
    TeiEmbedSparse,
    TeiOptions,
    TeiSimilarity,
)
from inferctl.serve.api.tokenize import TokenizeEndpoint, TokenizeRequest, TokenizeResponse
from inferctl.serve.edge.errors import ApiError, cohere_body, tei_body, voyage_body
from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.outputs import Output
from inferctl.serve.task_config import TaskConfig


@dataclass(frozen=True)
class Endpoint:
    """What one task answers at the path of `operation` and at its `aliases`.

    `name`: in usage events and the scopes of keys. `application`: makes it, once for a server. `error_body`: the shape
    of its errors. `output`: the one that a model must have been trained for.
    """

    name: str
    task: Task
    operation: Operation
    application: Callable[[Inference], ASGIApp]
    aliases: tuple[str, ...] = ()
    error_body: Callable[[ApiError], bytes] = ApiError.body
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
        return self.operation.path, *self.aliases


_TASKS: tuple[Task, ...] = ("embed", "rerank", "classify")
_COHERE: tuple[Literal[1, 2], ...] = (2, 1)
_POOLING = "Compute embeddings, or the scores of all labels: as vLLM does for one `task`."
_OWN = (
    *(
        Endpoint(
            "tokenize",
            task,
            Operation(
                "/tokenize",
                "Return the tokens of texts, as text-embeddings-inference does, or with `prompt` as vLLM does.",
                TokenizeRequest,
                TokenizeResponse,
                {"inputs": ["first text", "second text"]},
                TeiErrorResponse,
            ),
            TokenizeEndpoint,
            error_body=tei_body,
        )
        for task in _TASKS
    ),
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
        "embeddings",
        "embed",
        Operation(
            "/embed",
            "Compute the embeddings of texts, as text-embeddings-inference does.",
            EmbedRequest,
            EmbedResponse,
            {"inputs": ["first text", "second text"]},
            TeiErrorResponse,
        ),
        partial(EmbeddingsEndpoint, api=TeiEmbed()),
        ("/",),
        tei_body,
        "dense",
    ),
    Endpoint(
        "embeddings",
        "embed",
        Operation(
            "/embed_sparse",
            "Compute the sparse weights of texts, as text-embeddings-inference does.",
            TeiOptions,
            EmbedSparseResponse,
            {"inputs": ["first text", "second text"]},
            TeiErrorResponse,
        ),
        partial(EmbeddingsEndpoint, api=TeiEmbedSparse()),
        error_body=tei_body,
        output="sparse",
    ),
    Endpoint(
        "embeddings",
        "embed",
        Operation(
            "/embed_all",
            "Compute one vector for each token of texts, as text-embeddings-inference does.",
            TeiOptions,
            EmbedAllResponse,
            {"inputs": ["first text", "second text"]},
            TeiErrorResponse,
        ),
        partial(EmbeddingsEndpoint, api=TeiEmbedAll()),
        error_body=tei_body,
    ),
    Endpoint(
        "embeddings",
        "embed",
        Operation(
            "/similarity",
            "Compute the cosines of a text and others, as text-embeddings-inference does.",
            SimilarityRequest,
            SimilarityResponse,
            {"inputs": {"source_sentence": "a text", "sentences": ["first text", "second text"]}},
            TeiErrorResponse,
        ),
        partial(EmbeddingsEndpoint, api=TeiSimilarity()),
        error_body=tei_body,
        output="dense",
    ),
    Endpoint(
        "embeddings",
        "embed",
        Operation(
            "/voyage/embeddings",
            "Compute the embeddings of texts: as /v1/embeddings, with the errors of Voyage and Jina.",
            EmbeddingRequest,
            EmbeddingResponse,
            {"input": ["first text", "second text"], "output_dtype": "float"},
            VoyageErrorResponse,
        ),
        EmbeddingsEndpoint,
        ("/jina/v1/embeddings",),
        error_body=voyage_body,
    ),
    *(
        Endpoint(
            "embeddings",
            "embed",
            Operation(
                f"/v{version}/embed",
                f"Compute embeddings in one or several number formats, as version {version} of Cohere's API.",
                CohereEmbedRequest,
                CohereEmbedResponse,
                {"texts": ["first text", "second text"], "embedding_types": ["float"]},
                CohereErrorResponse,
            ),
            partial(EmbeddingsEndpoint, api=CohereEmbed(version)),
            error_body=cohere_body,
            output="dense",
        )
        for version in _COHERE
    ),
    Endpoint(
        "embeddings",
        "embed",
        Operation("/pooling", _POOLING, PoolingRequest, PoolingResponse, {"input": ["first text", "second text"]}),
        partial(EmbeddingsEndpoint, api=OpenAi(request=PoolingRequest, pooling=True)),
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
    ),
    Endpoint(
        "rerank",
        "rerank",
        Operation(
            "/rerank",
            "Order texts by their relevance to a query, as text-embeddings-inference does; `documents` as /v1/rerank.",
            TeiRerankRequest,
            TeiRerankResponse,
            {"query": "a question", "texts": ["first text", "second text"]},
            TeiErrorResponse,
        ),
        TeiRerankEndpoint,
        ("/",),
        tei_body,
    ),
    Endpoint(
        "rerank",
        "rerank",
        Operation(
            "/voyage/rerank",
            "Order documents by their relevance to a query, as Voyage does.",
            VoyageRerankRequest,
            VoyageRerankResponse,
            {"query": "a question", "documents": ["first text", "second text"]},
            VoyageErrorResponse,
        ),
        VoyageRerankEndpoint,
        error_body=voyage_body,
    ),
    Endpoint(
        "rerank",
        "rerank",
        Operation(
            "/jina/v1/rerank",
            "Order documents by their relevance to a query, with the errors of Jina.",
            RerankRequest,
            RerankResponse,
            {"query": "a question", "documents": ["first text", "second text"]},
            VoyageErrorResponse,
        ),
        RerankEndpoint,
        error_body=voyage_body,
    ),
    Endpoint(
        "rerank",
        "rerank",
        Operation(
            "/v2/rerank",
            "Order documents by their relevance to a query, with the errors of Cohere.",
            RerankRequest,
            RerankResponse,
            {"query": "a question", "documents": ["first text", "second text"]},
            CohereErrorResponse,
        ),
        RerankEndpoint,
        error_body=cohere_body,
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
        ("/score",),  # of vLLM, too
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
        "classify",
        "classify",
        Operation("/pooling", _POOLING, ClassifyRequest, PoolingResponse, {"input": ["first text", "second text"]}),
        partial(ClassifyEndpoint, pooling=True),
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
        ("/",),
        tei_body,
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
    shapes = {path: endpoint.error_body for endpoint in _of_task_last(task) for path in endpoint.paths}
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
    operations = [replace(endpoint.operation, path=path) for endpoint in own for path in endpoint.paths]
    endpoints: dict[str, ASGIApp] = {}
    for each in sorted(ALL, key=lambda endpoint: endpoint.serves(model.task, model.trained)):
        application = each.application(inference) if each in own else unsupported
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

    body_of = error_body(model.task)

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        assert isinstance(error, ApiError)
        return Response(body_of(request.url.path, error), error.status, error.headers, "application/json")

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
