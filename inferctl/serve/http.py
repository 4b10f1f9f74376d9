"""The wire: OpenAI's request and response shapes for embeddings, its error envelope, bytes in and bytes out."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

from inferctl.serve.types import Vectors

_LARGEST_ID = 2**31 - 1
_LONGEST_MESSAGE = 1000

Input = str | list[str] | list[int] | list[list[int]]
_Text = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_LARGEST_ID)]], Field(min_length=1)]
_Described = (
    _Text | Annotated[list[_Text], Field(min_length=1)] | _TokenIds | Annotated[list[_TokenIds], Field(min_length=1)]
)


class ApiError(Exception):
    """An answer other than 200, in OpenAI's envelope. `param` names the field at fault; `close`: the connection is of no use after this."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        # Messages quote what was sent, which may be as long as a body.
        self.message = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."
        self.status, self.code, self.param, self.headers, self.close = status, code, param, dict(headers or {}), close

    def body(self) -> bytes:
        """The envelope as JSON."""
        error = {"message": self.message, "type": _error_type(self.status), "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def _checked(value: Any, info: ValidationInfo) -> Input:
    """The input, checked by hand: pydantic tries each kind of list in turn and keeps an error per item, which made 4 MiB of numbers cost 17 s and 3 GB."""
    if not isinstance(value, str | list):
        raise _wrong_type()
    if not value:
        raise _empty("input")
    if isinstance(value, str):
        return value
    kind, limit = type(value[0]), (info.context or {}).get("max_inputs")
    if kind in (str, list) and limit is not None and len(value) > limit:
        detail = {"count": len(value), "limit": limit}
        raise PydanticCustomError("too_many_inputs", "input has {count} items, at most {limit} are taken", detail)
    if kind not in (str, list):
        return _ids(value)
    if set(map(type, value)) != {kind}:
        raise _wrong_type()
    if not all(value):
        raise _empty(f"input[{next(index for index, item in enumerate(value) if not item)}]")
    return [_ids(row) for row in value] if kind is list else value


def _ids(row: list[Any]) -> list[int]:
    """Token ids; 5.0 is an integer to JSON Schema, so it is one here."""
    kinds = set(map(type, row))
    if kinds != {int}:
        whole = list(map(int, row)) if kinds <= {int, float} else []
        if whole != row:
            raise _wrong_type()
        row = whole
    if min(row) < 0 or max(row) > _LARGEST_ID:
        raise PydanticCustomError("invalid_token", "token ids go from 0 to the size of the model's vocabulary")
    return row


def _empty(what: str) -> PydanticCustomError:
    return PydanticCustomError("empty_input", "{what} is empty", {"what": what})


def _wrong_type() -> PydanticCustomError:
    message = "input must be a text, a list of texts, a list of token ids, or a list of lists of token ids"
    return PydanticCustomError("invalid_type", message)


class EmbeddingRequest(BaseModel):
    """Body of `POST /v1/embeddings`. Unknown fields are ignored, as clients send their own."""

    model_config = ConfigDict(extra="ignore")

    input: Annotated[Input, PlainValidator(_checked, json_schema_input_type=_Described)] = Field(
        description="A text, a list of texts, one list of token ids, or a list of such lists."
    )
    model: StrictStr | None = Field(
        None, description="Name of the served model, as in `GET /v1/models`; may be left out."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="`float`: a list of numbers (the default). `base64`: little-endian float32."
    )
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Cut the vectors to this size; only for models trained for it."
    )
    user: StrictStr | None = Field(None, description="Accepted and not used.")
    truncate: StrictBool | None = Field(
        None,
        description="Whether to cut inputs that are too long (true) or answer 400 (false); the server's setting otherwise.",
    )


class Embedding(BaseModel):
    """One vector; `embedding` is base64 text when the request asked for it."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were computed: special tokens count, tokens cut off do not."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer other than 200."""

    error: ErrorDetail


def parse(raw: bytes, *, max_inputs: int) -> EmbeddingRequest:
    """A request body. Raises `ApiError` 400 naming the field."""
    try:
        return EmbeddingRequest.model_validate(orjson.loads(raw), context={"max_inputs": max_inputs})
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    except ValidationError as error:
        raise _bad_request(error) from None


def check_content_type(value: bytes) -> None:
    """Raises `ApiError` 415 when a body is said to be something other than JSON; one of which nothing is said (b"") may be JSON."""
    if value == b"application/json":
        return
    media = value.partition(b";")[0].strip().lower()
    if media and media != b"application/json" and not (media.startswith(b"application/") and media.endswith(b"+json")):
        message = "the body must be JSON, sent with `content-type: application/json`"
        raise ApiError(415, message, code="unsupported_media_type")


def is_single(value: Input) -> bool:
    """Whether the input is one text or one list of token ids."""
    return isinstance(value, str) or bool(value and isinstance(value[0], int))


def embeddings(vectors: Vectors, encoding: str | None, model: str, tokens: int) -> bytes:
    """The JSON of a successful answer."""
    rows: Iterable[Any] = vectors
    if encoding == "base64":
        rows = (base64.b64encode(row).decode() for row in vectors.astype("<f4", copy=False))
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _bad_request(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, field = first["type"], str(first["loc"][0]) if first["loc"] else None
    if field is None:
        return ApiError(400, "the body must be a JSON object", code="invalid_type")
    if kind == "missing":
        return ApiError(400, f"{field} is missing", code="missing_field", param=field)
    if field == "input":
        return ApiError(400, first["msg"], code=kind, param=field)
    return ApiError(
        400, f"{field}: {first['msg'].replace('Input should be', 'must be')}", code="invalid_value", param=field
    )


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
