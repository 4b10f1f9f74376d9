"""The API of OpenAI for embeddings, with the names of Voyage's and Jina's too, and what other APIs share with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import orjson
from pydantic import AliasChoices, BaseModel, Field, PlainValidator, StrictBool, StrictStr, ValidationInfo
from pydantic_core import PydanticCustomError
from starlette.types import Receive, Scope, Send

from inferctl.models.vector_format import VectorFormat
from inferctl.reading.outputs import Output
from inferctl.reading.rows import Tokens, Vectors
from inferctl.reading.space import HEADER
from inferctl.serve.api.embedding_outputs import (
    SeveralOutputs,
    SparseFormat,
    SparseOptions,
    chosen,
    held,
    json_rows,
    marked,
    token_vectors,
    unpacked,
)
from inferctl.serve.api.endpoint import TEXTS, VOYAGE, Endpoint
from inferctl.serve.api.inference import Inference, send_json
from inferctl.serve.api.schemas import Count, ModelRequest, Unsupported, Usage, json_list, limit_items, parts
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext

log = logging.getLogger("inferctl.prompts")

# More token ids than this are converted on another thread.
_INLINE_IDS = 16_384
# As in the longest body. A short body could otherwise mean minutes of tokenization.
_MAX_ADDED_CHARACTERS = 4 * 2**20
# Keys that get a line in the log.
_MAX_REMINDED = 1_000
_MAX_TOKEN_ID = 2**31 - 1
_MAX_PROMPT_CHARACTERS = 8192
_MAX_FLOAT16 = np.finfo(np.float16).max

_JinaType = Literal["float", "base64", "binary", "ubinary"]
Input = str | list[str] | list[int] | list[list[int]]
_Text = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]], Field(min_length=1)]
InputSchema = (
    _Text | Annotated[list[_Text], Field(min_length=1)] | _TokenIds | Annotated[list[_TokenIds], Field(min_length=1)]
)


def validate_input(value: Any, info: ValidationInfo) -> Input:
    """Return the input of a request. Raises `PydanticCustomError` for an invalid one.

    pydantic would try each type of list in turn and keep one error per item: 4 MiB of numbers took 17 s and 3 GB.
    """
    name = info.field_name or "input"
    if not isinstance(value, str | list):
        raise _wrong_type(name)
    if not value:
        raise _empty(name)
    if isinstance(value, str):
        return value
    kind = type(value[0])
    if kind not in (str, list):
        return _token_ids(value, name)
    limit_items(value, info)
    if set(map(type, value)) != {kind}:
        raise _wrong_type(name)
    if not all(value):
        raise _empty(f"{name}[{next(index for index, item in enumerate(value) if not item)}]")
    return [_token_ids(row, name) for row in value] if kind is list else value


def _token_ids(row: list[Any], name: str) -> list[int]:
    """Return token ids as integers. 5.0 is an integer in JSON Schema, so it is valid here."""
    kinds = set(map(type, row))
    if kinds != {int}:
        whole = list(map(int, row)) if kinds <= {int, float} else []
        if whole != row:
            raise _wrong_type(name)
        row = whole
    if min(row) < 0 or max(row) > _MAX_TOKEN_ID:
        raise PydanticCustomError("invalid_token", f"token ids must be from 0 to {_MAX_TOKEN_ID}")
    return row


def _empty(what: str) -> PydanticCustomError:
    return PydanticCustomError("empty_input", "{what} is empty", {"what": what})


def _wrong_type(name: str) -> PydanticCustomError:
    message = f"{name} must be a text, a list of texts, a list of token ids or a list of lists of token ids"
    return PydanticCustomError("invalid_type", message)


class VectorRequest(ModelRequest):
    """What the bodies of `POST /v1/embeddings` and `POST /pooling` share."""

    unsupported: ClassVar[Unsupported] = {  # of vLLM
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "truncate_prompt_tokens": (-1,),
        "add_special_tokens": (True,),
        "late_chunking": (False,),  # of Jina
        "return_multivector": (False,),
    }
    input: Annotated[Input, PlainValidator(validate_input, json_schema_input_type=InputSchema)] = Field(
        description="A text, a list of texts, one list of token ids, or a list of such lists."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`float` (default): a list of numbers. `base64`: their bytes, little-endian."
    )
    output_dtype: VectorFormat | None = Field(
        None,
        description="The numbers of the vectors: `float` (default, 32 bits), `float16`, `binary` and `ubinary` (signed "
        "and unsigned bytes, each of 8 dimensions).",
    )
    dimensions: Count | None = Field(
        None,
        validation_alias=AliasChoices("dimensions", "output_dimension"),
        description="Truncate the vectors to this many dimensions; only for models that are trained for it.",
    )
    user: StrictStr | None = Field(None, description="Ignored.")
    truncate: StrictBool | None = Field(
        None,
        validation_alias=AliasChoices("truncate", "truncation"),
        description="Truncate long inputs (true) or respond with 400 (false). Default: the server's setting.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="`right` (default): long inputs lose their end. `left`: their start, with the prompt."
    )
    normalized: StrictBool | None = Field(
        None,
        validation_alias=AliasChoices("normalized", "use_activation"),  # of Jina and vLLM
        description="True: vectors of length one. False: of the length that the model gives them.",
    )
    embedding_type: _JinaType | Annotated[list[_JinaType], Field(min_length=1, max_length=1)] | None = Field(
        None, description="As in Jina's API: `output_dtype`, or `base64` for `encoding_format`. It replaces both."
    )
    prompt: Annotated[StrictStr, Field(max_length=_MAX_PROMPT_CHARACTERS)] | None = Field(
        None, description="A text before each input, instead of a prompt of the model. Not for token ids."
    )
    prompt_name: StrictStr | None = Field(
        None, description="The name of a prompt of the model, as in `GET /info`. Ignored with `prompt`."
    )
    input_type: StrictStr | None = Field(
        None,
        validation_alias=AliasChoices("input_type", "task"),
        description="What the inputs are: the name of a prompt, or a word of Cohere, Voyage or Jina, such as `query` "
        "and `document`. Ignored with `prompt` and `prompt_name`.",
    )

    @property
    def items(self) -> list[str] | list[list[int]]:
        """The inputs as a list of texts or of token ids."""
        single = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if single else self.input  # type: ignore[return-value]


class EmbeddingRequest(VectorRequest):
    """The body of `POST /v1/embeddings`."""

    outputs: Annotated[list[Output], Field(min_length=1, max_length=3)] | None = Field(
        None,
        description="What to return for each input: `dense` (default, in `embedding`), `sparse` (weights of tokens, in "
        "`sparse_embedding`), `tokens` (one vector for each token, in `token_embeddings`). Those that the model has "
        "are in `GET /info`.",
    )
    sparse_format: SparseFormat | None = Field(
        None,
        description="`indices` (default): lists of token ids and of weights, as Qdrant takes them. `tokens`: an object "
        "of weights by token, as OpenSearch, Elasticsearch and Vespa do. `pgvector`: the text of a sparsevec.",
    )
    top_k: Count | None = Field(None, description="Return only the largest sparse weights.")
    min_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Return only sparse weights that are at least this large."
    )


class Embedding(BaseModel):
    """The outputs of one input. Vectors are base64 texts if the request has `encoding_format: base64`."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[int] | str | None = None
    sparse_embedding: dict[str, list[int] | list[float] | float] | str | None = None
    token_embeddings: list[list[float] | list[int] | str] | None = None


class EmbeddingResponse(BaseModel):
    """The successful response of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class PoolingRequest(VectorRequest):
    """The body of `POST /pooling`: vLLM's, of which the `task` says what to return."""

    unsupported: ClassVar[Unsupported] = {
        **VectorRequest.unsupported,
        **dict.fromkeys(sorted(EmbeddingRequest.model_fields.keys() - VectorRequest.model_fields.keys()), ()),
    }
    task: Literal["embed", "token_embed"] | None = Field(
        None, description="`embed` (default): a vector for each input. `token_embed`: one for each token."
    )
    input_type: StrictStr | None = Field(None, description="As in `/v1/embeddings`.")


class Pooled(BaseModel):
    """One vector, or the scores of all labels."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | list[int] | str | list[list[float] | list[int] | str]


class PoolingResponse(BaseModel):
    """The successful response of `POST /pooling`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


class EmbeddingApi(Protocol):
    """The shape of an API for embeddings. `names`: what it calls fields of OpenAI's. `request`: its requests."""

    @property
    def names(self) -> Mapping[str, str]: ...

    @property
    def request(self) -> type[ModelRequest]: ...

    def embedding(self, request: Any, model: ServedModel) -> EmbeddingRequest:
        """Return a request in the shape of OpenAI's. Raises `ApiError` 400 for what the model does not support."""

    def response(self, request: Any, found: Any, model: ServedModel, context: RequestContext) -> Iterable[bytes]:
        """Return the JSON of a successful response in parts. Raises `ApiError` before the first part.

        `found`: `Vectors`, or `SeveralOutputs` if `embedding` returned a request for others than dense vectors.
        """


@dataclass(frozen=True)
class EmbeddingsEndpoint:
    """The application of an endpoint for embeddings."""

    inference: Inference
    api: EmbeddingApi
    reminded: set[str] = field(default_factory=set, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to one request. Raises `ApiError`, which the edge sends."""
        try:
            await self._respond(scope, receive, send)
        except ApiError as error:
            raise error.renamed(self.api.names) from None

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        context, (given, request, prompt) = await self.inference.receive(scope, receive, self._parse)
        model = self.inference.model
        if model.prompts.unused and isinstance(request.items[0], str):
            named = request.prompt is not None or request.prompt_name is not None
            if prompt is None or (not named and model.prompts.misses_query(request.input_type)):
                self._remind(context.caller.id)
        names = chosen(model, request.outputs)
        dimensions = model.dimensions_for(request.dimensions) if "dense" in names else None
        # What cannot be returned is rejected before anything is computed.
        if "dense" in names and model.normalized and request.normalized is False:
            message = f"model {model.name!r} normalizes its vectors: `normalized` must be true"
            raise ApiError(400, message, code="invalid_value", param="normalized")
        normalized = None if model.normalized else request.normalized
        set_space(context, model.space_names(names, dimensions, normalized))
        rows = await self.inference.run(scope, partial(self._tokenize, request, prompt, names, context.caller.tenant))
        if names == ("dense",):
            vectors = np.stack(rows) if isinstance(rows, list) else rows
            vectors = _with_dimensions(vectors, dimensions, normalized)
            await send_json(send, self.api.response(given, vectors, model, context), context)
            return
        found = unpacked(model, rows, names)
        if "dense" in names:
            shaped = (_with_dimensions(each.dense[None], dimensions, normalized)[0] for each in found)
            found = [each._replace(dense=vector) for each, vector in zip(found, shaped, strict=True)]
        several = SeveralOutputs(names, found, self.inference.tokenizer.own_tokenizer().id_to_token)
        with held(model, sum(each.size for each in found)):
            await send_json(send, self.api.response(given, several, model, context), context)

    def _parse(self, raw: bytes) -> tuple[ModelRequest, EmbeddingRequest, str | None]:
        """Return the request, also in OpenAI's shape, and its prompt, None if it selects none.

        Raises `ApiError` 400 or 404.
        """
        given = self.inference.parse(self.api.request, raw)
        request = self.api.embedding(given, self.inference.model)
        return given, request, self._prompt(request)

    def _prompt(self, request: EmbeddingRequest) -> str | None:
        model = self.inference.model
        for index, row in enumerate(() if isinstance(request.items[0], str) else request.items):
            if (largest := max(row)) >= model.vocabulary_size:
                limit = model.vocabulary_size - 1
                message = (
                    f"input[{index}] has token id {largest}; the largest of this model is {limit}: send texts, "
                    "or ids of this model's tokenizer (OpenAIEmbeddings of LangChain: check_embedding_ctx_length=False)"
                )
                raise ApiError(400, message, code="invalid_token", param="input")
        if request.prompt is request.prompt_name is request.input_type is None:
            return None
        if not isinstance(request.items[0], str):
            message = "a prompt precedes texts: send texts, or token ids without prompt, prompt_name and input_type"
            raise ApiError(400, message, code="prompt_without_text", param="input")
        prompt = model.prompt_for(request.prompt, request.prompt_name, request.input_type)
        if (length := len(prompt) * len(request.items)) > _MAX_ADDED_CHARACTERS:
            message = f"the prompt has {length} characters in all inputs; the limit is {_MAX_ADDED_CHARACTERS}"
            raise ApiError(400, message, code="prompt_too_long", param="input")
        return prompt

    def _remind(self, key_id: str | None) -> None:
        """Log once for a key that it uses none of the prompts. Without keys, the line at the start is all."""
        if key_id is None or key_id in self.reminded or len(self.reminded) >= _MAX_REMINDED:
            return
        self.reminded.add(key_id)
        names = ", ".join(self.inference.model.prompts.names)
        log.warning(
            "key %s sends texts without a prompt; the model has %s: send its name as `prompt_name`", key_id, names
        )

    async def _tokenize(
        self, request: EmbeddingRequest, prompt: str | None, names: Sequence[Output], tenant: str | None
    ) -> tuple[Sequence[Tokens], list[int] | None]:
        model = self.inference.model
        truncate = model.truncate if request.truncate is None else request.truncate
        role = model.prompts.role(request.prompt_name, request.input_type)
        items: Any = request.items
        left = request.truncation_side == "left"
        if isinstance(items[0], str):
            found = await self.inference.tokenizer.encode(
                items, truncate=truncate, tenant=tenant, prompt=prompt, left=left, **model.text_options(role)
            )
            return marked(model, found, names, role)
        call = partial(self.inference.tokenizer.truncate, items, truncate=truncate, left=left)
        large = sum(map(len, items)) > _INLINE_IDS
        return marked(model, await asyncio.to_thread(call) if large else call(), names, role)


def _with_dimensions(vectors: Vectors, dimensions: int | None, normalized: bool | None) -> Vectors:
    """Return the first `dimensions` values of each vector, scaled to length one; None returns all, unchanged.

    `normalized`: whether to scale them, in place of that rule.
    """
    head = vectors if dimensions is None else np.ascontiguousarray(vectors[:, :dimensions])
    if not (dimensions is not None if normalized is None else normalized):
        return head
    scaled: Vectors = head / np.maximum(np.linalg.norm(head, axis=1, keepdims=True), np.float32(1e-12))
    return scaled


def set_space(context: RequestContext, names: bytes) -> None:
    """Note the spaces of the vectors of a request. Raises `ApiError` 412 if its client does not know one of them."""
    context.space = names
    if not (names and context.asked.spaces):
        return
    known = [name.strip() for name in context.asked.spaces.decode("latin-1").split(",")]
    spaces = names.decode()
    if any(name not in known for name in spaces.split(", ")):
        message = f"the vectors are of the space {spaces}, not of {', '.join(known)}; GET /info has its definition"
        raise ApiError(412, message, code="other_space", param=HEADER, headers={HEADER: spaces})


@dataclass(frozen=True)
class OpenAi:
    """It is an `EmbeddingApi`. `pooling`: whether responses are those of `POST /pooling`."""

    names: ClassVar[Mapping[str, str]] = {}
    request: type[ModelRequest] = EmbeddingRequest
    pooling: bool = False

    def embedding(self, request: EmbeddingRequest | PoolingRequest, _: ServedModel) -> EmbeddingRequest:
        """Return the request without `embedding_type`, and with the outputs of vLLM's task. Part of `EmbeddingApi`."""
        kind = request.embedding_type[0] if isinstance(request.embedding_type, list) else request.embedding_type
        if kind is not None:
            request.encoding_format = "base64" if kind == "base64" else "float"
            request.output_dtype = "float" if kind == "base64" else kind
        if isinstance(request, PoolingRequest):
            outputs: list[Output] = ["tokens" if request.task == "token_embed" else "dense"]
            return EmbeddingRequest.model_construct(outputs=outputs, **vars(request))
        return request

    def response(
        self, request: VectorRequest, found: Vectors | SeveralOutputs, model: ServedModel, context: RequestContext
    ) -> Iterator[bytes]:
        """Return the JSON of a response. Part of `EmbeddingApi`."""
        if isinstance(found, SeveralOutputs):
            return self._several(request, found, model, context)
        wanted = request.output_dtype or "float"
        check_range(found, wanted)
        pooling = context.asked.id.decode() if self.pooling else None
        return response(found, request.encoding_format, model.name, context.input_tokens, wanted, pooling)

    def _several(
        self, request: VectorRequest, found: SeveralOutputs, model: ServedModel, context: RequestContext
    ) -> Iterator[bytes]:
        names, rows, token = found
        wanted, encoding = request.output_dtype or "float", request.encoding_format
        sparse = SparseOptions()
        if isinstance(request, EmbeddingRequest):
            sparse = SparseOptions(request.sparse_format or "indices", request.top_k, request.min_weight)
        for each in rows:
            check_range(each.dense, wanted)
            check_range(each.tokens, wanted)
        separator = b'{"object":"list","data":['
        for index, outputs in enumerate(rows):
            entry: dict[str, Any] = {"object": "pooling" if self.pooling else "embedding", "index": index}
            if "dense" in names:
                (entry["embedding"],) = json_rows(outputs.dense[None], encoding, wanted)
            if "sparse" in names:
                entry["sparse_embedding"] = sparse.shape(outputs.ids, outputs.weights, model.vocabulary_size, token)
            head = separator + orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY)
            if "tokens" in names:
                yield head[:-1] + (b',"data":' if self.pooling else b',"token_embeddings":')
                yield from token_vectors(outputs.tokens, encoding, wanted)
                head = b"}"
            yield head
            separator = b","
        usage = {"prompt_tokens": context.input_tokens, "total_tokens": context.input_tokens}
        rest = {"id": context.asked.id.decode(), "created": int(time.time())} if self.pooling else {}
        yield b"]," + orjson.dumps({**rest, "model": model.name, "usage": usage})[1:]


def check_range(vectors: Vectors, wanted: VectorFormat) -> None:
    """Raise `ApiError` 400 if vectors have a number that a format does not have."""
    if wanted == "float16" and vectors.size and np.abs(vectors).max() > _MAX_FLOAT16:
        raise ApiError(400, "a vector has a number beyond float16", code="out_of_range", param="output_dtype")


def response(
    vectors: Vectors,
    encoding: str | None,
    model: str,
    tokens: int,
    wanted: VectorFormat = "float",
    pooling: str | None = None,
) -> Iterator[bytes]:
    """Yield the JSON of a successful response in parts.

    `pooling`: the id of a response of `POST /pooling`.
    """
    kind, key, head = "embedding", "embedding", b'{"object":"list","data":['
    if pooling is not None:
        kind, key = "pooling", "data"
        head = orjson.dumps({"id": pooling, "created": int(time.time())})[:-1] + b"," + head[1:]

    def entries(part: slice) -> list[dict[str, Any]]:
        rows = json_rows(vectors[part], encoding, wanted)
        return [{"object": kind, "index": index, key: row} for index, row in enumerate(rows, part.start)]

    rest = {"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return json_list(head, map(entries, parts(vectors)), b"]," + orjson.dumps(rest)[1:])


def embed(path: str, summary: str, response: type[BaseModel], api: EmbeddingApi, **others: Any) -> Endpoint:
    """Return an endpoint for embeddings. `response`: the model of its responses."""
    application = partial(EmbeddingsEndpoint, api=api)
    return Endpoint("embeddings", "embed", path, summary, (api.request, response), application=application, **others)


POOLING = "Compute embeddings, or the scores of all labels: as vLLM does for one `task`."
ENDPOINTS = (
    embed(
        "/v1/embeddings",
        "Compute the embeddings of texts: one vector per input, in order.",
        EmbeddingResponse,
        OpenAi(),
        example={"input": TEXTS},
    ),
    embed(
        "/voyage/embeddings",
        "Compute the embeddings of texts: as /v1/embeddings, with the errors of Voyage and Jina.",
        EmbeddingResponse,
        OpenAi(),
        example={"input": TEXTS, "output_dtype": "float"},
        aliases=("/jina/v1/embeddings",),
        errors=VOYAGE,
    ),
    embed("/pooling", POOLING, PoolingResponse, OpenAi(PoolingRequest, pooling=True), example={"input": TEXTS}),
)
