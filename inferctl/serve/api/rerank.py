"""The APIs for rerankers and, except `/v1/score`, models with vectors of tokens.

`POST /v1/rerank`: Cohere and Jina. `/rerank`: also text-embeddings-inference. `/voyage/rerank`: Voyage. `/v1/score`:
vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, StrictBool, StrictStr, model_validator
from pydantic_core import PydanticCustomError
from starlette.types import Receive, Scope, Send

from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.api import embedding_outputs, endpoint
from inferctl.serve.api.endpoint import COHERE, OPENAI, TEI, TEXTS, VOYAGE, Endpoint, Shape
from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.api.schemas import Count, ModelRequest, Text, Usage, limit_items
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext, context_of

# The number of a document in the request, and its score; the best one first.
Ranks: TypeAlias = list[tuple[int, float]]
_SHORTEN = "Truncate long pairs (true) or respond with 400 (false). Default: the server's setting."
_MOST = "Return only this many results. Default: all."
_TRUNCATE = Field(None, description=_SHORTEN)
_INSTRUCTION = Field(
    None, description="What makes a document relevant, for a language model that reads it. Default: that of the model."
)
_QUERY = Field(description="The text that the documents are compared with.")
_RETURN = Field(None, description="Return the text of each document too.")


class Document(BaseModel):
    """A document to rank. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    text: StrictStr


_Documents = Annotated[list[StrictStr | Document], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]
_Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]
_MaybeEmptyTexts = Annotated[list[StrictStr], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]


class _DocumentsRequest(ModelRequest):
    raw_scores: ClassVar[bool] = False
    query: Text = _QUERY
    documents: _Documents = Field(description="The documents: texts, or objects with a `text`.")
    return_documents: StrictBool | None = _RETURN

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RerankRequest(_DocumentsRequest):
    """The body of `POST /v1/rerank`."""

    top_n: Count | None = Field(None, description=_MOST)
    truncate: StrictBool | None = _TRUNCATE
    max_tokens_per_doc: Count | None = Field(
        None, description="Truncate each document to this many tokens, before pairs are truncated to the model's limit."
    )
    instruction: Text | None = _INSTRUCTION

    def response(self, ranks: Ranks, model: str, context: RequestContext) -> Any:
        """Return the body of the response."""
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in ranks]
        if self.return_documents:
            texts = self.texts
            results = [entry | {"document": {"text": texts[entry["index"]]}} for entry in results]
        return {"id": context.asked.id.decode(), "model": model, "results": results, "usage": _usage(context)}


class VoyageRerankRequest(_DocumentsRequest):
    """The body of `POST /voyage/rerank`."""

    max_tokens_per_doc: ClassVar[None] = None
    instruction: ClassVar[None] = None
    top_n: Count | None = Field(None, validation_alias="top_k", description=_MOST)
    truncate: StrictBool | None = Field(None, validation_alias="truncation", description=_SHORTEN)

    def response(self, ranks: Ranks, model: str, context: RequestContext) -> Any:
        """Return the body of the response."""
        data: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in ranks]
        if self.return_documents:
            texts = self.texts
            data = [entry | {"document": texts[entry["index"]]} for entry in data]
        return {"object": "list", "model": model, "data": data, "usage": _usage(context)}


class TeiRerankRequest(ModelRequest):
    """The body of `POST /rerank` in the shape of text-embeddings-inference, which has `texts`."""

    max_tokens_per_doc: ClassVar[None] = None
    instruction: ClassVar[None] = None
    top_n: ClassVar[None] = None
    query: Text = Field(description="The text that the others are compared with.")
    texts: _MaybeEmptyTexts = Field(description="The texts to rank.")
    raw_scores: StrictBool = Field(False, description="True: return the logits of the model.")
    return_text: StrictBool = Field(False, description="Return each text too.")
    truncate: StrictBool | None = _TRUNCATE
    truncation_direction: Literal["Right", "right"] | None = Field(None, description="Long pairs lose their end.")

    def response(self, ranks: Ranks, *_: object) -> Any:
        """Return the body of the response."""
        results: list[dict[str, Any]] = [{"index": index, "score": score} for index, score in ranks]
        return [entry | {"text": self.texts[entry["index"]]} for entry in results] if self.return_text else results


class ScoreRequest(ModelRequest):
    """The body of `POST /v1/score`: one text with several, or two lists of the same length."""

    text_1: Text | _Texts = Field(description="A text, or a list of texts.")
    text_2: Text | _MaybeEmptyTexts = Field(description="A text, or a list of as many texts as `text_1` has.")
    truncate: StrictBool | None = _TRUNCATE
    instruction: Text | None = _INSTRUCTION

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        first, second = _listed(self.text_1), _listed(self.text_2)
        if len(first) != len(second) and len(first) > 1:
            detail = {"first": len(first), "second": len(second)}
            message = "text_1 has {first} texts and text_2 has {second}; text_1 must have 1, or as many as text_2"
            raise PydanticCustomError("unequal_lengths", message, detail)
        return self

    @property
    def pairs(self) -> tuple[str | list[str], list[str]]:
        """One first text for all second texts, or one for each; and the second texts."""
        first, second = _listed(self.text_1), _listed(self.text_2)
        return (first[0] if len(first) == 1 else first), second


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _usage(context: RequestContext) -> dict[str, int]:
    return {"prompt_tokens": context.input_tokens, "total_tokens": context.input_tokens}


class RerankResult(BaseModel):
    """One document, by its index in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankResponse(BaseModel):
    """The successful response of `POST /v1/rerank`: the results with the highest scores first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage


class TeiRank(BaseModel):
    """One text, by its index in the request."""

    index: int
    score: float
    text: str | None = None


class TeiRerankResponse(RootModel[list[TeiRank]]):
    """The successful response of `POST /rerank` with `texts`: the highest scores first."""


class VoyageRerankResult(BaseModel):
    """One document, by its index in the request."""

    index: int
    relevance_score: float
    document: str | None = None


class VoyageRerankResponse(BaseModel):
    """The successful response of `POST /voyage/rerank`: the results with the highest scores first."""

    object: Literal["list"] = "list"
    data: list[VoyageRerankResult]
    model: str
    usage: Usage


class Score(BaseModel):
    """The score of one pair."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    """The successful response of `POST /v1/score`."""

    object: Literal["list"] = "list"
    model: str
    data: list[Score]
    usage: Usage


async def rank(
    inference: Inference,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    parse: Callable[[Inference, bytes], RerankRequest | VoyageRerankRequest | TeiRerankRequest],
) -> None:
    """The application of all endpoints that order documents by their relevance to a query."""
    context, request = await inference.receive(scope, receive, partial(parse, inference))
    try:
        scores = await _scores(
            inference,
            scope,
            request.query,
            request.texts,
            request.truncate,
            most=request.max_tokens_per_doc,
            instruction=request.instruction,
            raw=request.raw_scores,
        )
    except ApiError as error:
        raise error.renamed({"documents": "texts"} if isinstance(request, TeiRerankRequest) else {}) from None
    order = np.argsort(-scores, kind="stable")[: request.top_n].tolist()  # equal scores keep their order
    ranks = [(index, float(scores[index])) for index in order]
    await send_json(send, [orjson.dumps(request.response(ranks, inference.model.name, context))], context)


def _parse_tei(inference: Inference, raw: bytes) -> RerankRequest | TeiRerankRequest:
    try:
        return inference.parse(RerankRequest, raw)
    except ApiError as error:
        if (error.code, error.param) != ("missing_field", "documents"):
            raise
        without_documents = error
    try:
        return inference.parse(TeiRerankRequest, raw)
    except ApiError as error:
        raise (without_documents if error.code == "missing_field" else error) from None


async def score(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /v1/score`: one score per pair of texts, in order."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, ScoreRequest))
    scores = await _scores(inference, scope, *request.pairs, request.truncate, instruction=request.instruction)
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores.tolist())]
    body = {"object": "list", "model": inference.model.name, "data": data, "usage": _usage(context)}
    await send_json(send, [orjson.dumps(body)], context)


async def _scores(
    inference: Inference,
    scope: Scope,
    first: str | list[str],
    second: list[str],
    truncate: bool | None,
    *,
    most: int | None = None,
    instruction: str | None = None,
    raw: bool = False,
) -> Vectors:
    """Return the score of each pair, its logit if `raw`: float32, [pairs]. `most`: tokens of a second text.

    `first`: one text, or as many as `second`. For a model with vectors of tokens, the scores are their MaxSim.
    """
    model, tenant = inference.model, context_of(scope).caller.tenant
    allowed = model.truncate if truncate is None else truncate
    model.check_instruction(instruction)
    if model.task == "embed":
        assert isinstance(first, str)
        return await embedding_outputs.max_similarities(
            inference, scope, first, second, truncate=allowed, tenant=tenant, most=most
        )

    async def tokenize() -> tuple[list[Tokens], list[int]]:
        encode = partial(inference.tokenizer.encode_pairs, truncate=allowed, tenant=tenant)
        pairs = await encode(first, second, most=most, prompt=instruction, enough=model.max_tokens)
        return [ids for ids, _ in pairs], [start for _, start in pairs]

    logits = np.asarray(await inference.run(scope, tokenize))[:, 0]
    return logits if raw else model.activation(logits)


def _as(kind: type[RerankRequest | VoyageRerankRequest]) -> Any:
    return endpoint.application(rank, parse=lambda inference, raw: inference.parse(kind, raw))


def _rerank(path: str, summary: str = "", errors: Shape = OPENAI) -> Endpoint:
    summary = f"Order documents by their relevance to a query{summary}."
    bodies = RerankRequest, RerankResponse
    return Endpoint("rerank", "rerank", path, summary, bodies, _EXAMPLE, _as(RerankRequest), errors)


_EXAMPLE = {"query": "a question", "documents": TEXTS}
ENDPOINTS = (
    _rerank("/v1/rerank"),
    Endpoint(
        "rerank",
        "rerank",
        "/rerank",
        "Order texts by their relevance to a query, as text-embeddings-inference does; `documents` as /v1/rerank.",
        (TeiRerankRequest, TeiRerankResponse),
        {"query": "a question", "texts": TEXTS},
        endpoint.application(rank, parse=_parse_tei),
        TEI,
        ("/",),
    ),
    Endpoint(
        "rerank",
        "rerank",
        "/voyage/rerank",
        "Order documents by their relevance to a query, as Voyage does.",
        (VoyageRerankRequest, VoyageRerankResponse),
        _EXAMPLE,
        _as(VoyageRerankRequest),
        VOYAGE,
    ),
    _rerank("/jina/v1/rerank", ", with the errors of Jina", VOYAGE),
    _rerank("/v2/rerank", ", with the errors of Cohere", COHERE),
    Endpoint(
        "score",
        "rerank",
        "/v1/score",
        "Compute the relevance of pairs of texts, in order.",
        (ScoreRequest, ScoreResponse),
        {"text_1": "a question", "text_2": TEXTS},
        endpoint.application(score),
        aliases=("/score",),  # of vLLM, too
    ),
)
