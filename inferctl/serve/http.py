"""The wire: OpenAI's request and response shapes for embeddings, its error envelope, bytes in and bytes out."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from inferctl.serve.types import Vectors

TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Input = StrictStr | list[StrictStr] | list[TokenId] | list[list[TokenId]]


class ApiError(Exception):
    """An answer other than 200, in OpenAI's envelope. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = (
            status,
            message,
            code,
            param,
            dict(headers or {}),
        )

    def body(self) -> bytes:
        """The envelope as JSON."""
        error = {"message": self.message, "type": _error_type(self.status), "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


class EmbeddingRequest(BaseModel):
    """Body of `POST /v1/embeddings`. Unknown fields are ignored, as clients send their own."""

    model_config = ConfigDict(extra="ignore")

    input: Input = Field(description="A text, a list of texts, one list of token ids, or a list of such lists.")
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
    truncate: bool | None = Field(
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
        request = EmbeddingRequest.model_validate_json(raw)
    except ValidationError as error:
        raise _bad_request(error) from None
    count = 1 if is_single(request.input) else len(request.input)
    if count > max_inputs:
        raise ApiError(
            400, f"input has {count} items, at most {max_inputs} are taken", code="too_many_inputs", param="input"
        )
    if not request.input:
        raise ApiError(400, "input is empty", code="empty_input", param="input")
    if not isinstance(request.input, str):
        for index, item in enumerate(request.input):
            if not isinstance(item, int) and not item:
                raise ApiError(400, f"input[{index}] is empty", code="empty_input", param="input")
    return request


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
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if field is None:
        return ApiError(400, "the body must be a JSON object", code="invalid_type")
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing", code="missing_field", param=field)
    if field == "input":
        message = "input must be a text, a list of texts, a list of token ids, or a list of lists of token ids"
        return ApiError(400, message, code="invalid_type", param=field)
    return ApiError(
        400, f"{field}: {first['msg'].replace('Input should be', 'must be')}", code="invalid_value", param=field
    )


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
