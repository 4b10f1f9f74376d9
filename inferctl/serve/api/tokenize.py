"""`POST /tokenize`: the tokens of texts, in the shape of text-embeddings-inference, or with `prompt` in that of vLLM.

Sources: `TokenizeRequest` and `SimpleToken` in `router/src/http/types.rs` of the former, version 1.9;
`TokenizeCompletionRequest` and `TokenizeResponse` of the latter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar, Self

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, StrictBool, StrictStr, model_validator
from pydantic_core import PydanticCustomError
from starlette.types import Receive, Scope, Send

from inferctl.reading.task_config import HEADS
from inferctl.serve.api import endpoint
from inferctl.serve.api.embedding_outputs import held
from inferctl.serve.api.endpoint import TEI, TEXTS, Endpoint
from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.api.schemas import ModelRequest, Unsupported, json_list, limit_items
from inferctl.serve.text.tokenizer_pool import Token

# How many tokens are converted to JSON at a time.
_PART_TOKENS = 4096
# A token keeps as much memory as so many numbers of other responses.
_TOKEN_NUMBERS = 32


class TokenizeRequest(ModelRequest):
    """The body of `POST /tokenize`."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [name]} for name in ("inputs", "prompt")]})
    unsupported: ClassVar[Unsupported] = {"return_token_strs": (False,), "messages": ()}  # of vLLM
    inputs: (
        StrictStr | Annotated[list[StrictStr], Field(min_length=1, fail_fast=True), BeforeValidator(limit_items)]
    ) = Field([], description="A text, or a list of texts. The response has the tokens of each.")
    prompt: StrictStr = Field(
        "", description="A text, instead of `inputs`. The response has its token ids, as in vLLM."
    )
    add_special_tokens: StrictBool = Field(True, description="Whether to add the special tokens of the model.")
    prompt_name: StrictStr | None = Field(
        None, description="The name of a prompt of the model, as in `GET /info`, before each of `inputs`."
    )

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if not self.model_fields_set & {"inputs", "prompt"}:
            raise PydanticCustomError("missing_field", "inputs is missing")
        return self


class TokenIds(BaseModel):
    """The response to a `prompt`."""

    count: int
    max_model_len: int
    tokens: list[int]


class TokenizeResponse(RootModel[list[list[Token]] | TokenIds]):
    """The successful response of `POST /tokenize`: the tokens of each of `inputs`, or the ids of those of `prompt`."""


async def tokenize(inference: Inference, scope: Scope, receive: Receive, send: Send) -> None:
    """The application of `POST /tokenize`. Nothing is truncated."""
    context, request = await inference.receive(scope, receive, partial(inference.parse, TokenizeRequest))
    of_vllm, given, prompt = "inputs" not in request.model_fields_set, request.inputs, None
    if request.prompt_name is not None:
        prompt = inference.model.prompt_for(None, request.prompt_name, None)
    call = partial(
        inference.tokenizer.tokens,
        [request.prompt] if of_vllm else [given] if isinstance(given, str) else given,
        add_special_tokens=request.add_special_tokens,
        prompt="" if of_vllm else prompt,
        tenant=context.caller.tenant,
    )
    found = await inference.tokens(scope, call)
    with held(inference.model, _TOKEN_NUMBERS * sum(map(len, found))):
        parts = _response(found)
        if of_vllm:
            ids = [token.id for token in found[0]]
            body = TokenIds(count=len(ids), max_model_len=inference.tokenizer.max_tokens, tokens=ids)
            parts = iter([orjson.dumps(body.model_dump())])
        await send_json(send, parts, context)


def _response(found: list[list[Token]]) -> Iterator[bytes]:
    """Yield the JSON of the tokens of texts in parts."""
    for number, row in enumerate(found):
        starts = range(0, len(row), _PART_TOKENS)
        yield from json_list(b",[" if number else b"[[", (row[start : start + _PART_TOKENS] for start in starts))
    yield b"]"


ENDPOINTS = tuple(
    Endpoint(
        "tokenize",
        task,
        "/tokenize",
        "Return the tokens of texts, as text-embeddings-inference does, or with `prompt` as vLLM does.",
        (TokenizeRequest, TokenizeResponse),
        {"inputs": TEXTS},
        endpoint.application(tokenize),
        TEI,
    )
    for task in HEADS
)
