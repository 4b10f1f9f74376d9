"""Endpoints for classifiers: `POST /classify` (the shape of vLLM), `POST /predict` (of text-embeddings-inference)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from starlette.types import Receive, Scope, Send

from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.api import classify_schemas, embedding_schemas
from inferctl.serve.api.classify_schemas import ClassifyRequest, Item, PredictRequest
from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.edge.request_context import context_of
from inferctl.serve.text.text_parts import InputError


async def classify(inference: Inference, scope: Scope, receive: Receive, send: Send, *, pooling: bool = False) -> None:
    """The application of `POST /classify`, and of `POST /pooling`: the scores of all labels for each text."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, ClassifyRequest))
    logits = await _logits(inference, scope, request.input, request.truncate, "input")
    scores = logits if request.use_activation is False else inference.model.activation(logits)
    model, tokens, id_ = inference.model, context.input_tokens, context.id.decode()
    if pooling:
        parts = embedding_schemas.response(scores, "float", model.name, tokens, pooling=id_)
    else:
        parts = classify_schemas.classify_response(scores, model.labels, id_, model.name, tokens)
    await send_json(send, parts, context)


async def predict(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /predict`: the labels of each text or pair, the highest score first."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, PredictRequest))
    logits = await _logits(inference, scope, request.items, request.truncate, "inputs")
    scores = logits if request.raw_scores else inference.model.activation(logits)
    several = isinstance(request.inputs, list)
    await send_json(send, classify_schemas.predict_response(scores, inference.model.labels, several=several), context)


async def _logits(
    inference: Inference, scope: Scope, items: Sequence[Item], truncate: bool | None, field: str
) -> Vectors:
    """Return the logits of each item: float32, [items, labels]. `field`: of the request, for errors."""
    tenant, tokenizer = context_of(scope).tenant, inference.tokenizer
    allowed = inference.model.truncate if truncate is None else truncate

    async def tokenize() -> tuple[list[Tokens], list[int] | None]:
        texts = [index for index, item in enumerate(items) if len(item) == 1]
        pairs = [index for index, item in enumerate(items) if len(item) == 2]
        part = texts
        try:
            found = await tokenizer.encode([items[index][0] for index in texts], truncate=allowed, tenant=tenant)
            if not pairs:
                return found, None
            part = pairs
            firsts, seconds = ([items[index][side] for index in pairs] for side in (0, -1))
            encoded = await tokenizer.encode_pairs(firsts, seconds, truncate=allowed, tenant=tenant)
        except InputError as error:
            raise InputError(part[error.index or 0], error.code, error.problem, field) from None
        # A text has no second segment.
        by_index = dict(zip(texts, ((ids, len(ids)) for ids in found), strict=True)) | dict(
            zip(pairs, encoded, strict=True)
        )
        both = [by_index[index] for index in range(len(items))]
        return [ids for ids, _ in both], [start for _, start in both]

    return await inference.run_equal(scope, tokenize)
