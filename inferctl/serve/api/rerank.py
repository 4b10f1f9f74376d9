"""`POST /v1/rerank` (the shape of Cohere and Jina) and `POST /v1/score` (the shape of vLLM), for cross-encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import orjson
from starlette.types import Receive, Scope, Send

from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.api.rerank_schemas import RerankRequest, ScoreRequest
from inferctl.serve.edge.request_context import RequestContext, context_of
from inferctl.serve.engine_process.engine_protocol import Tokens, Vectors


@dataclass(frozen=True)
class RerankEndpoint:
    """The application of `POST /v1/rerank`: documents in the order of their relevance to a query."""

    inference: Inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request. Raises `ApiError`, which the edge sends."""
        inference = self.inference
        context = await inference.admit(scope)
        request = await inference.parsed_body(context, receive, partial(inference.parse, RerankRequest))
        scores = await _scores(inference, scope, request.query, request.texts, request.truncate)
        # A stable sort, so documents with equal scores keep their order.
        order = np.argsort(-scores, kind="stable")[: request.top_n].tolist()
        results = [{"index": index, "relevance_score": float(scores[index])} for index in order]
        if request.return_documents:
            results = [{**entry, "document": {"text": request.texts[entry["index"]]}} for entry in results]
        await _respond(send, context, inference.model.name, {"id": context.id.decode()}, {"results": results})


@dataclass(frozen=True)
class ScoreEndpoint:
    """The application of `POST /v1/score`: one score per pair of texts, in order."""

    inference: Inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request. Raises `ApiError`, which the edge sends."""
        inference = self.inference
        context = await inference.admit(scope)
        request = await inference.parsed_body(context, receive, partial(inference.parse, ScoreRequest))
        scores = await _scores(inference, scope, *request.pairs, request.truncate)
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores.tolist())]
        await _respond(send, context, inference.model.name, {"object": "list"}, {"data": data})


async def _scores(
    inference: Inference,
    scope: Scope,
    first: str | list[str],
    second: list[str],
    truncate: bool | None,
) -> Vectors:
    """Return the score of each pair: float32, [pairs]. `first`: one text, or as many as `second`."""

    tenant = context_of(scope).tenant

    async def tokenize() -> tuple[list[Tokens], list[int]]:
        allowed = inference.model.truncate if truncate is None else truncate
        pairs = await inference.tokenizer.encode_pairs(first, second, truncate=allowed, tenant=tenant)
        return [ids for ids, _ in pairs], [start for _, start in pairs]

    logits = await inference.run(scope, tokenize)
    return inference.model.activation(logits[:, 0])


async def _respond(
    send: Send, context: RequestContext, model: str, head: dict[str, str], results: dict[str, Sequence[Any]]
) -> None:
    usage = {"prompt_tokens": context.input_tokens, "total_tokens": context.input_tokens}
    await send_json(send, [orjson.dumps({**head, "model": model, **results, "usage": usage})], context)
