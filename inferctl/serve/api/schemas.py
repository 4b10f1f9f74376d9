"""What the requests and responses of all endpoints share: parsing, errors, usage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

from inferctl.reading.rows import Vectors
from inferctl.serve.edge.errors import ApiError

# How much of a response is converted to JSON at a time: this many rows, of this many numbers in all. They take 0.6 ms.
_PART_ROWS, _PART_NUMBERS = 64, 24_576
# The types of the `PydanticCustomError`s of the schemas, which are the codes of the responses.
_OWN_ERRORS = {"empty_input", "invalid_token", "invalid_type", "missing_field", "too_many_inputs", "unequal_lengths"}


Unsupported = Mapping[str, tuple[object, ...]]


class ModelRequest(BaseModel):
    """A request that may name the model. Unknown fields are ignored, because some clients send their own."""

    model_config = ConfigDict(extra="ignore")

    # Fields of other servers that would change the response, with the values that ask for what this server does.
    unsupported: ClassVar[Unsupported] = {}

    model: StrictStr | None = Field(None, description="Name of the served model, as in `GET /v1/models`; optional.")


def _whole(value: object) -> object:
    """Return 5.0 as 5: it is an integer in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[StrictStr, Field(min_length=1)]
Count = Annotated[StrictInt, Field(ge=1), BeforeValidator(_whole)]
Request = TypeVar("Request", bound=ModelRequest)


def limit_items(value: object, info: ValidationInfo) -> object:
    """Return a list unchanged. Raises `PydanticCustomError` if it has too many items, before they are validated."""
    limit = (info.context or {}).get("max_inputs")
    if isinstance(value, list) and limit is not None and len(value) > limit:
        detail = {"count": len(value), "limit": limit}
        raise PydanticCustomError(
            "too_many_inputs", f"{info.field_name} has {{count}} items; the limit is {{limit}}", detail
        )
    return value


def parts(rows: Vectors) -> list[slice]:
    """Return the bounds of consecutive parts of rows, each converted to JSON in one iteration of the event loop."""
    if len(rows) == 1:
        return [slice(0, 1)]
    step = max(1, min(_PART_ROWS, _PART_NUMBERS // rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def json_list(head: bytes, values: Iterable[Any], tail: bytes = b"]") -> Iterator[bytes]:
    """Yield JSON in parts, so that a large list never stops the event loop for long.

    `head` begins the list, each of `values` has some of its items, and `tail` ends it.
    """
    separator = head
    for each in values:
        yield separator + orjson.dumps(each, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        separator = b","
    yield tail if separator == b"," else head + tail


class Usage(BaseModel):
    """Number of processed tokens, with special tokens, without truncated tokens."""

    prompt_tokens: int
    total_tokens: int


class ErrorDetail(BaseModel):
    """The details of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class VoyageErrorResponse(BaseModel):
    """The body of error responses of endpoints with the shape of the APIs of Voyage and Jina."""

    detail: str


class CohereErrorResponse(BaseModel):
    """The body of error responses of endpoints with the shape of Cohere's API."""

    message: str


class TeiErrorResponse(BaseModel):
    """The body of error responses of endpoints with the shape of text-embeddings-inference."""

    error: str
    error_type: Literal["backend", "empty", "overloaded", "tokenizer", "unhealthy", "validation"]


def parse(kind: type[Request], raw: bytes, *, max_inputs: int) -> Request:
    """Return the parsed body of a request. Raises `ApiError` 400 with the name of the field."""
    try:
        body = orjson.loads(raw)
        if isinstance(body, dict) and not kind.unsupported.keys().isdisjoint(body):
            for name in sorted(kind.unsupported.keys() & body.keys()):
                if body[name] is not None and body[name] not in kind.unsupported[name]:
                    raise ApiError(400, f"{name} is not supported", code="unsupported_field", param=name)
        return kind.model_validate(body, context={"max_inputs": max_inputs})
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    except ValidationError as error:
        raise _bad_request(error) from None


def check_content_type(value: bytes) -> None:
    """Raise `ApiError` 415 for a content type other than JSON. An absent content type (b"") is accepted."""
    media = value.partition(b";")[0].strip().lower()
    if media and media != b"application/json" and not (media.startswith(b"application/") and media.endswith(b"+json")):
        message = "the body must be JSON, with the header `content-type: application/json`"
        raise ApiError(415, message, code="unsupported_media_type")


def _bad_request(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, field = first["type"], str(first["loc"][0]) if first["loc"] else None
    if kind in _OWN_ERRORS:
        return ApiError(400, first["msg"], code=kind, param=field)
    if field is None:
        return ApiError(400, "the body must be a JSON object", code="invalid_type")
    if kind == "missing":
        return ApiError(400, f"{field} is missing", code="missing_field", param=field)
    message = re.sub(r"^(Input|List) should", "must", first["msg"]).replace(" after validation", "")
    return ApiError(400, f"{field}: {message}", code="invalid_value", param=field)
