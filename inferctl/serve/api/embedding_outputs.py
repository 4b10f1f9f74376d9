"""Sparse weights and vectors of tokens in requests and responses, in the shapes that vector stores take."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from starlette.types import Scope

from inferctl.models import vector_format
from inferctl.models.vector_format import VectorFormat
from inferctl.reading.outputs import FORMS, Form, Ids, Output, Outputs, Role, add_similarities, mark, top, unpack
from inferctl.reading.rows import Rows, Tokens, Vectors
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.schemas import json_list
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge.errors import ApiError, at_capacity
from inferctl.serve.text.text_parts import InputError

SparseFormat: TypeAlias = Literal["indices", "tokens", "pgvector"]

# Numbers of the vectors of all tokens of a response: 64 MiB, which a client that does not read keeps in memory.
_MAX_TOKEN_NUMBERS = 2**24
# Numbers that are converted to JSON at a time, so that none stops the event loop for long.
_PART_NUMBERS = 16_384
# MaxSim of more products than this is computed on another thread.
_INLINE_PRODUCTS = 2_000_000
# Requests take turns on it. Those of a threads' pool that others use too would keep large bodies from being parsed.
_executor = ThreadPoolExecutor(1, "similarity")


class SeveralOutputs(NamedTuple):
    """The outputs of each input. `names`: those of the request; `token(id)`: the text of a token."""

    names: Sequence[Output]
    rows: Sequence[Outputs]
    token: Callable[[int], str | None]


def chosen(model: ServedModel, wanted: Sequence[Output] | None) -> tuple[Output, ...]:
    """Return the outputs of a request, that of the model if it names none. Raises `ApiError` 400 for others."""
    if wanted is None:
        return model.outputs[:1]
    names = tuple(dict.fromkeys(wanted))
    if missing := [name for name in names if name not in model.outputs]:
        message = f"model {model.name!r} has no {missing[0]} output: it has {', '.join(model.outputs)}"
        raise ApiError(400, message, code="invalid_output", param="outputs")
    return names


def marked(
    model: ServedModel, sequences: Sequence[Tokens], outputs: Sequence[Output], role: Role
) -> tuple[Sequence[Tokens], list[int] | None]:
    """Return the sequences of a request, queries with the tokens that follow them, and their marks.

    The marks are None for dense vectors of a model without other ones. Raises `ApiError` 400 for too many vectors.
    """
    if outputs == ("dense",) and model.outputs[1:] in ((), ("tokens",)):
        return sequences, None
    form = Form(sum(FORMS[name] for name in outputs)) | (Form.QUERY if role == "query" else Form(0))
    expanded, marks = [], []
    for sequence in sequences:
        ids, attended = model.tokens.expand(sequence) if role == "query" and model.tokens else (sequence, 0)
        expanded.append(ids)
        marks.append(mark(form, attended))
    if Form.TOKENS in form and (numbers := sum(map(len, expanded)) * model.token_dimensions) > _MAX_TOKEN_NUMBERS:
        message = f"the vectors of all tokens have {numbers} numbers; the limit of a request is {_MAX_TOKEN_NUMBERS}"
        raise ApiError(400, message, code="too_many_tokens")
    return expanded, marks


def unpacked(model: ServedModel, rows: Rows, outputs: Sequence[Output]) -> list[Outputs]:
    """Return the outputs in the rows of a request."""
    form = Form(sum(FORMS[name] for name in outputs))
    return [unpack(row, form, model.dimensions, model.token_dimensions) for row in rows]


@contextmanager
def held(model: ServedModel, numbers: int) -> Iterator[None]:
    """Count the numbers of a response while it is sent. Raises `ApiError` 429 if others hold too many.

    Without a limit, clients that read slowly would fill the memory. A single response is always sent.
    """
    if model.held_numbers and model.held_numbers + numbers > model.max_held_numbers:
        raise at_capacity("other large responses wait to be read", "responses_full", 1)
    model.held_numbers += numbers
    try:
        yield
    finally:
        model.held_numbers -= numbers


@dataclass(frozen=True)
class SparseOptions:
    """How the weights of a response look. `top_k`: the most of an input. `least`: the smallest that is returned."""

    format: SparseFormat = "indices"
    top_k: int | None = None
    least: float | None = None

    def shape(self, ids: Ids, weights: Vectors, size: int, token: Callable[[int], str | None]) -> Any:
        """Return the weights of an input for JSON. `size`: of the vocabulary; `token(id)`: the text of one of it."""
        ids, weights = top(ids, weights, self.top_k, self.least)
        if self.format == "indices":
            return {"indices": ids, "values": np.ascontiguousarray(weights)}
        if self.format == "tokens":
            pairs = zip(ids.tolist(), weights, strict=True)
            return {token(number) or str(number): weight for number, weight in pairs}
        pairs = zip((ids + 1).tolist(), weights, strict=True)
        return f"{{{','.join(f'{number}:{weight!s}' for number, weight in pairs)}}}/{size}"


def json_rows(vectors: Vectors, encoding: str | None, wanted: VectorFormat) -> Any:
    """Return vectors in a format, as JSON has them: rows of numbers, or base64 texts of their little-endian bytes."""
    rows = vector_format.convert(vectors, wanted)
    if encoding != "base64":
        return np.ascontiguousarray(rows)
    return [base64.b64encode(row).decode() for row in np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))]


def token_vectors(vectors: Vectors, encoding: str | None = None, wanted: VectorFormat = "float") -> Iterator[bytes]:
    """Yield the JSON of the vectors of the tokens of an input in parts: lists, or one base64 text for each token."""
    step = max(1, _PART_NUMBERS // max(1, vectors.shape[1]))
    starts = range(0, len(vectors), step)
    return json_list(b"[", (json_rows(vectors[start : start + step], encoding, wanted) for start in starts))


async def max_similarities(
    inference: Inference,
    scope: Scope,
    query: str,
    documents: list[str],
    *,
    truncate: bool,
    tenant: str | None,
    most: int | None = None,
) -> Vectors:
    """Return the MaxSim of a query and each document, of which `most` tokens count: float32, [documents]."""
    model = inference.model

    async def tokenize() -> tuple[list[Tokens], list[int] | None]:
        ids, marks = list[Tokens](), list[int]()
        given: dict[Role, list[str]] = {"query": [query], "document": documents}
        for role, texts in given.items():
            options, allowed = model.text_options(role), truncate
            if most is not None and role == "document":
                limit = most + sum(inference.tokenizer.special_ends)
                if limit <= (options["limit"] or inference.tokenizer.max_tokens):  # the client asks to truncate
                    options["limit"], allowed = limit, True
            prompt = model.prompts.select(input_type=role)
            try:
                found = await inference.tokenizer.encode(
                    texts, truncate=allowed, tenant=tenant, prompt=prompt, **options
                )
            except InputError as error:
                index, field = (None, "query") if role == "query" else (error.index, "documents")
                raise InputError(index, error.code, error.problem, field) from None
            sequences, numbers = marked(model, found, ("tokens",), role)
            ids += sequences
            marks += numbers or []
        return ids, marks

    rows = await inference.run(scope, tokenize)
    first, *others = [row.reshape(-1, model.token_dimensions) for row in rows]
    scores = np.zeros(len(others), dtype=np.float32)
    parts = add_similarities(scores, first, others)

    async def compute() -> None:
        while not await asyncio.get_running_loop().run_in_executor(_executor, next, parts, True):
            pass

    if first.size * sum(map(len, others)) > _INLINE_PRODUCTS:
        await inference.unless_disconnected(compute, scope)
    for _ in parts:
        pass
    if model.tokens is not None and model.tokens.mean:
        scores /= max(1, len(first))
    if not (finite := np.isfinite(scores)).all():
        raise ApiError(500, f"the score of document {finite.argmin()} is NaN or infinity", code="non_finite")
    return scores
