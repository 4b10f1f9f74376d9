"""Error responses, in OpenAI's envelope or the shape of another API."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import orjson

from inferctl.serve.work import ENGINE_UNAVAILABLE, INTERNAL_ERROR, LIMIT_EXCEEDED, RejectedError
from inferctl.tenancy.access import budgets
from inferctl.tenancy.metering.recorder import UNAVAILABLE

_MAX_MESSAGE_LENGTH = 1000
_TEI_TYPES = {"context_length_exceeded": "tokenizer", "empty_input": "empty", "text_too_long": "tokenizer"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OF_KEYS = (LIMIT_EXCEEDED, budgets.EXCEEDED, budgets.PENDING, budgets.UNAVAILABLE)
# The status of a `reason`. All others say that the server is at capacity. That is not a 503, because proxies stop using
# a server that returns those.
_STATUS = {
    ENGINE_UNAVAILABLE: 503,
    UNAVAILABLE: 503,
    budgets.UNAVAILABLE: 503,
    "engine_failed": 500,
    "non_finite": 500,
    INTERNAL_ERROR: 500,
}


class ApiError(Exception):
    """An error response. `param`: the field that causes the error."""

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
        # Messages quote values of the request, which can be as long as its body.
        self.message = message if len(message) <= _MAX_MESSAGE_LENGTH else f"{message[:_MAX_MESSAGE_LENGTH]}..."
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """Return the error with the name that another API has for the field, if it has one."""
        name = names.get(self.param or "")
        if not name:
            return self
        message = re.sub(
            rf"^{self.param}\b|`{self.param}`", lambda found: found[0].replace(str(self.param), name), self.message
        )
        return ApiError(self.status, message, code=self.code, param=name, headers=self.headers)

    def body(self) -> bytes:
        """Return the envelope as JSON."""
        error = {"message": self.message, "type": _error_type(self.status), "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


def wrong_method(method: str, allowed: str) -> ApiError:
    """Return the error of a path that does not have this method, but the `allowed` ones."""
    message = f"the method {method} is not allowed here; use {allowed}"
    return ApiError(405, message, code="method_not_allowed", headers={"allow": allowed})


def tei_body(error: ApiError) -> bytes:
    """Return the body of an error in the shape of text-embeddings-inference: `error` and `error_type`.

    The types are those of `ErrorType` in its `router/src/lib.rs`.
    """
    kind = _TEI_TYPES.get(error.code or "", "validation")
    if error.status == 429:
        kind = "overloaded"
    elif error.status >= 500:
        kind = "unhealthy" if error.status == 503 else "backend"
    return orjson.dumps({"error": error.message, "error_type": kind})


def cohere_body(error: ApiError) -> bytes:
    """Return the body of an error in the shape of Cohere's API: `message`."""
    return orjson.dumps({"message": error.message})


def voyage_body(error: ApiError) -> bytes:
    """Return the body of an error in the shape of Voyage's API: `detail`."""
    return orjson.dumps({"detail": error.message})


def anthropic_body(error: ApiError) -> bytes:
    """Return the body of an error in the shape of Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}})


def at_capacity(reason: str, code: str, seconds: int = 1) -> ApiError:
    """Return a 429 with `Retry-After`."""
    message = f"the server is at capacity: {reason}; retry after {seconds} s"
    return ApiError(429, message, code=code, headers={"retry-after": str(seconds)})


def rejection(error: RejectedError) -> ApiError:
    """Return the response to a request that is not computed."""
    code, message, seconds = error.reason, error.message, error.retry_after
    if code in _OF_KEYS:  # OpenAI's clients obey `retry-after-ms` and `x-should-retry`
        headers = {"x-should-retry": "false"}
        if seconds is not None:
            headers = {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(1000 * seconds))}
        return ApiError(_STATUS.get(code, 429), message, code=code, headers=headers)
    if code not in _STATUS:
        return at_capacity(message, code, max(1, math.ceil(seconds or 0)))
    headers = {} if seconds is None else {"retry-after": str(math.ceil(seconds))}
    return ApiError(_STATUS[code], message, code=code, headers=headers)


def key_share(what: str) -> ApiError:
    """Return the 429 of a key that has its share of what all keys can have."""
    return at_capacity(f"this key has many {what}, and other keys need room", "key_share", 1)


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
