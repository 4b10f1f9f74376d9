"""The APIs for classifiers: `POST /classify` of vLLM, and `POST /predict` of text-embeddings-inference.

Sources: `vllm/entrypoints/pooling/classify/protocol.py` of the former, `PredictRequest` and `PredictResponse` in
`router/src/http/types.rs` of the latter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import numpy as np
import orjson
from pydantic import BaseModel, Field, PlainValidator, RootModel, StrictBool, ValidationInfo
from pydantic_core import PydanticCustomError
from starlette.types import Receive, Scope, Send

from inferctl.reading.rows import Tokens, Vectors
from inferctl.serve.api import embeddings, endpoint
from inferctl.serve.api.embeddings import PoolingResponse
from inferctl.serve.api.endpoint import TEI, TEXTS, Endpoint
from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.api.schemas import ModelRequest, Text, Unsupported, Usage, json_list, limit_items, parts
from inferctl.serve.edge.request_context import context_of
from inferctl.serve.text.text_parts import InputError

# A text, or a pair of texts.
Item = tuple[str] | tuple[str, str]
_TRUNCATE = Field(
    None, description="Truncate long inputs (true) or respond with 400 (false). Default: the server's setting."
)
_TextsSchema = Text | Annotated[list[Text], Field(min_length=1)]
_TextOrPair = Annotated[list[Text], Field(min_length=1, max_length=2)]
_InputsSchema = Text | _TextOrPair | Annotated[list[_TextOrPair], Field(min_length=1)]


def _validate_texts(value: Any, info: ValidationInfo) -> list[Item]:
    """Return one text or a list of texts as items. Raises `PydanticCustomError` for anything else."""
    listed = [value] if isinstance(value, str) else limit_items(value, info)
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise PydanticCustomError("invalid_type", "input must be a text or a list of texts")
    return [_item([text], "input") for text in listed] or _raise_empty("input")


def _validate_inputs(value: Any, info: ValidationInfo) -> list[Item] | Item:
    """Return one item, or a list of items. Raises `PydanticCustomError` for anything else."""
    if isinstance(value, str):
        return _item([value], "inputs")
    if isinstance(value, list) and value and isinstance(value[0], str):
        return _item(value, "inputs")
    if not isinstance(limit_items(value, info), list):
        raise _wrong_type()
    return [_item(each, "inputs") for each in value] or _raise_empty("inputs")


def _item(texts: Any, field: str) -> Item:
    if not isinstance(texts, list) or not 0 < len(texts) < 3 or not all(isinstance(text, str) for text in texts):
        raise _wrong_type()
    if not all(texts):
        _raise_empty(f"a text of {field}")
    return (texts[0],) if len(texts) == 1 else (texts[0], texts[1])


def _raise_empty(what: str) -> NoReturn:
    raise PydanticCustomError("empty_input", "{what} is empty", {"what": what})


def _wrong_type() -> PydanticCustomError:
    message = "inputs must be a text, a pair [text, text], or a list of [text] and [text, text]"
    return PydanticCustomError("invalid_type", message)


class ClassifyRequest(ModelRequest):
    """The body of `POST /classify`."""

    unsupported: ClassVar[Unsupported] = {
        "truncate_prompt_tokens": (-1,),
        "add_special_tokens": (True,),
        "task": ("classify",),  # this and the next of /pooling
        "encoding_format": ("float",),
    }
    input: Annotated[list[Item], PlainValidator(_validate_texts, json_schema_input_type=_TextsSchema)] = Field(
        description="A text, or a list of texts."
    )
    use_activation: StrictBool | None = Field(
        None, description="False: return the logits of the model instead of probabilities."
    )
    truncate: StrictBool | None = _TRUNCATE


class PredictRequest(ModelRequest):
    """The body of `POST /predict`."""

    inputs: Annotated[list[Item] | Item, PlainValidator(_validate_inputs, json_schema_input_type=_InputsSchema)] = (
        Field(description="A text, a pair of texts as a list of two, or a list of lists of one or two texts.")
    )
    raw_scores: StrictBool = Field(False, description="True: return the logits of the model instead of probabilities.")
    truncate: StrictBool | None = _TRUNCATE
    truncation_direction: Literal["Right", "right"] | None = Field(None, description="Long inputs lose their end.")

    @property
    def items(self) -> list[Item]:
        """The texts and pairs."""
        return [self.inputs] if isinstance(self.inputs, tuple) else self.inputs


class Classification(BaseModel):
    """The scores of one input, in the order of the model's labels. `label` is that of the highest score."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(BaseModel):
    """The successful response of `POST /classify`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage


class Prediction(BaseModel):
    """The score of one label."""

    score: float
    label: str


class PredictResponse(RootModel[list[Prediction] | list[list[Prediction]]]):
    """The successful response of `POST /predict`: the labels by score for one input, or such a list for each."""


async def classify(inference: Inference, scope: Scope, receive: Receive, send: Send, *, pooling: bool = False) -> None:
    """The application of `POST /classify`, and of `POST /pooling`: the scores of all labels for each text."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, ClassifyRequest))
    logits = await _logits(inference, scope, request.input, request.truncate, "input")
    scores = logits if request.use_activation is False else inference.model.activation(logits)
    model, tokens, id_ = inference.model, context.input_tokens, context.asked.id.decode()
    if pooling:
        parts = embeddings.response(scores, "float", model.name, tokens, pooling=id_)
    else:
        parts = classify_response(scores, model.labels, id_, model.name, tokens)
    await send_json(send, parts, context)


async def predict(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /predict`: the labels of each text or pair, the highest score first."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, PredictRequest))
    logits = await _logits(inference, scope, request.items, request.truncate, "inputs")
    scores = logits if request.raw_scores else inference.model.activation(logits)
    several = isinstance(request.inputs, list)
    await send_json(send, predict_response(scores, inference.model.labels, several=several), context)


async def _logits(
    inference: Inference, scope: Scope, items: Sequence[Item], truncate: bool | None, field: str
) -> Vectors:
    """Return the logits of each item: float32, [items, labels]. `field`: of the request, for errors."""
    tenant, tokenizer = context_of(scope).caller.tenant, inference.tokenizer
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

    return np.asarray(await inference.run(scope, tokenize))


def classify_response(scores: Vectors, labels: Sequence[str], id_: str, model: str, tokens: int) -> Iterator[bytes]:
    """Yield the JSON of a successful response in parts."""
    head = {"id": id_, "object": "list", "created": int(time.time()), "model": model}

    def entries(part: slice) -> list[dict[str, Any]]:
        return [
            {"index": index, "label": labels[int(row.argmax())], "probs": row, "num_classes": len(row)}
            for index, row in enumerate(scores[part], part.start)
        ]

    tail = b"]," + orjson.dumps({"usage": {"prompt_tokens": tokens, "total_tokens": tokens}})[1:]
    return json_list(orjson.dumps(head)[:-1] + b',"data":[', map(entries, parts(scores)), tail)


def predict_response(scores: Vectors, labels: Sequence[str], *, several: bool) -> Iterator[bytes]:
    """Yield the JSON of a successful response in parts. `several`: whether the request had a list of inputs."""

    def entries(part: slice) -> list[list[dict[str, Any]]]:
        rows = scores[part]
        # A stable sort, so labels with equal scores keep their order.
        orders = np.argsort(-rows, axis=1, kind="stable")
        return [
            [{"score": row[number], "label": labels[number]} for number in order]
            for row, order in zip(rows, orders.tolist(), strict=True)
        ]

    head, tail = (b"[", b"]") if several else (b"", b"")
    return json_list(head, map(entries, parts(scores)), tail)


ENDPOINTS = (
    Endpoint(
        "classify",
        "classify",
        "/classify",
        "Compute the scores of all labels for texts, in order.",
        (ClassifyRequest, ClassifyResponse),
        {"input": TEXTS},
        endpoint.application(classify),
    ),
    Endpoint(
        "classify",
        "classify",
        "/pooling",
        embeddings.POOLING,
        (ClassifyRequest, PoolingResponse),
        {"input": TEXTS},
        endpoint.application(classify, pooling=True),
    ),
    Endpoint(
        "predict",
        "classify",
        "/predict",
        "Order the labels of texts or pairs of texts by their scores.",
        (PredictRequest, PredictResponse),
        {"inputs": [["a text"], ["first text of a pair", "second text"]]},
        endpoint.application(predict),
        TEI,
        ("/",),
    ),
)
