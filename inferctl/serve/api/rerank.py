"""Endpoints for rerankers and, except `/v1/score`, models with vectors of tokens, in the shapes of several APIs.

`POST /v1/rerank`: Cohere and Jina. `/rerank`: also text-embeddings-inference. `/voyage/rerank`: Voyage. `/v1/score`:
vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.types import Receive, Scope, Send

from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.api import outputs
from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.api.rerank_schemas import RerankRequest, ScoreRequest, TeiRerankRequest, VoyageRerankRequest
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext, context_of


async def rerank(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /v1/rerank`: documents in the order of their relevance to a query."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, RerankRequest))
    await _rerank(inference, scope, send, context, request)


async def tei_rerank(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /rerank`: as `POST /v1/rerank`, or with `texts` as text-embeddings-inference."""
    context, request = await inference.receive(scope, receive, partial(_parse_tei, inference))
    if isinstance(request, RerankRequest):
        await _rerank(inference, scope, send, context, request)
        return
    try:
        logits = await _logits(inference, scope, request.query, request.texts, request.truncate)
    except ApiError as error:
        raise error.renamed({"documents": "texts"}) from None
    raw = request.raw_scores or inference.model.task == "embed"
    scores = logits if raw else inference.model.activation(logits)
    results: list[dict[str, Any]] = [{"index": index, "score": float(scores[index])} for index in _order(scores)]
    if request.return_text:
        results = [entry | {"text": request.texts[entry["index"]]} for entry in results]
    await send_json(send, [orjson.dumps(results)], context)


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


async def voyage_rerank(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /voyage/rerank`: documents in the order of their relevance to a query."""
    context, given = await inference.receive(scope, receive, partial(inference.parse, VoyageRerankRequest))
    request = given.rerank
    results = await _results(inference, scope, request)
    if request.return_documents:
        results = [entry | {"document": request.texts[entry["index"]]} for entry in results]
    await _respond(send, context, inference.model.name, {"object": "list"}, {"data": results})


async def score(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /v1/score`: one score per pair of texts, in order."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, ScoreRequest))
    scores = await _scores(inference, scope, *request.pairs, request.truncate, instruction=request.instruction)
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores.tolist())]
    await _respond(send, context, inference.model.name, {"object": "list"}, {"data": data})


async def _rerank(
    inference: Inference, scope: Scope, send: Send, context: RequestContext, request: RerankRequest
) -> None:
    results = await _results(inference, scope, request)
    if request.return_documents:
        results = [entry | {"document": {"text": request.texts[entry["index"]]}} for entry in results]
    await _respond(send, context, inference.model.name, {"id": context.id.decode()}, {"results": results})


async def _results(inference: Inference, scope: Scope, request: RerankRequest) -> list[dict[str, Any]]:
    """Return the index and the score of the most relevant documents."""
    options = {"most": request.max_tokens_per_doc, "instruction": request.instruction}
    scores = await _scores(inference, scope, request.query, request.texts, request.truncate, **options)
    return [{"index": index, "relevance_score": float(scores[index])} for index in _order(scores)[: request.top_n]]


def _order(scores: Vectors) -> list[int]:
    """Return the indices of scores, the highest first. Equal scores keep their order."""
    return list(np.argsort(-scores, kind="stable").tolist())


async def _scores(
    inference: Inference,
    scope: Scope,
    first: str | list[str],
    second: list[str],
    truncate: bool | None,
    **options: Any,
) -> Vectors:
    """Return the score of each pair: float32, [pairs]. `first`: one text, or as many as `second`."""
    logits = await _logits(inference, scope, first, second, truncate, **options)
    return logits if inference.model.task == "embed" else inference.model.activation(logits)


async def _logits(
    inference: Inference,
    scope: Scope,
    first: str | list[str],
    second: list[str],
    truncate: bool | None,
    most: int | None = None,
    instruction: str | None = None,
) -> Vectors:
    """Return the logit of each pair: float32, [pairs]. `most`: tokens of a second text.

    For a model with vectors of tokens, it is their MaxSim.
    """
    tenant = context_of(scope).tenant
    allowed = inference.model.truncate if truncate is None else truncate
    inference.model.check_instruction(instruction)
    if inference.model.task == "embed":
        assert isinstance(first, str)
        return await outputs.max_similarities(
            inference, scope, first, second, truncate=allowed, tenant=tenant, most=most
        )

    async def tokenize() -> tuple[list[Tokens], list[int]]:
        encode = partial(inference.tokenizer.encode_pairs, truncate=allowed, tenant=tenant)
        pairs = await encode(first, second, most=most, prompt=instruction, enough=inference.model.max_tokens)
        return [ids for ids, _ in pairs], [start for _, start in pairs]

    logits = await inference.run_equal(scope, tokenize)
    return logits[:, 0]


async def _respond(
    send: Send, context: RequestContext, model: str, head: dict[str, str], results: dict[str, Sequence[Any]]
) -> None:
    usage = {"prompt_tokens": context.input_tokens, "total_tokens": context.input_tokens}
    await send_json(send, [orjson.dumps({**head, "model": model, **results, "usage": usage})], context)
