"""What vLLM's APIs for generation do not share: how a stream ends, how it says that it failed, and the error body."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from inferctl.serve.edge import errors
from inferctl.serve.edge.errors import ApiError

# Path -> name in events. What they generate is counted.
ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
COUNT_TOKENS = "/v1/messages/count_tokens"
# What the tokenizer alone answers.
TOKENIZER = dict.fromkeys(("/tokenize", "/detokenize", COUNT_TOKENS), "tokenize")
NAMES = {**ENDPOINTS, **TOKENIZER}


@dataclass(frozen=True)
class Stream:
    """How the server-sent events of an API start: those at the end, errors, and those before the first token.

    `error_event(error, number)` returns the last events of a stream that fails after `number` events.
    """

    end: tuple[bytes, ...] = (b"data: [DONE]",)
    error: bytes = b'data: {"error"'
    early: tuple[bytes, ...] = ()

    def error_event(self, error: ApiError, number: int) -> bytes:
        return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


class _Responses(Stream):
    def error_event(self, error: ApiError, number: int) -> bytes:
        # OpenAI's clients raise an error if the event has `error`, else they return the event.
        found = {"type": "error", "sequence_number": number, "code": error.code, "message": error.message}
        found |= {"param": error.param, **orjson.loads(error.body())}
        return b"event: error\ndata: " + orjson.dumps(found) + b"\n\n"


class _Messages(Stream):
    def error_event(self, error: ApiError, number: int) -> bytes:
        return b"event: error\ndata: " + errors.anthropic_body(error) + b"\n\n"


_STREAMS = {
    "responses": _Responses(
        # vLLM 0.32 sends the first one also if the answer is cut off.
        (b"event: response.completed", b"event: response.incomplete"),
        b"event: error",
        # vLLM sends them before it asks its engine.
        (b"event: response.created", b"event: response.in_progress"),
    ),
    "messages": _Messages((b"event: message_stop",), b"event: error"),
}
_OPENAI = Stream()


def stream_of(endpoint: str) -> Stream:
    """Return how the streams of an endpoint look."""
    return _STREAMS.get(endpoint, _OPENAI)


def error_body(path: str, error: ApiError) -> bytes:
    """Return the body of an error response in the shape of the API that has the path."""
    return errors.anthropic_body(error) if f"{path}/".startswith("/v1/messages/") else error.body()
