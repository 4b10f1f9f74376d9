"""Reads what a generation used from vLLM's responses, and gives the client what it asked for.

With `--enable-force-include-usage`, vLLM puts `usage` into every event of a stream. So the count is exact for a client
that leaves in mid-stream too. A client that did not ask for it gets the stream without it.
"""

from __future__ import annotations

import re
import time
from typing import Any

import orjson

from inferctl.serve.edge.usage import RequestContext

# `usage` of an event. Quotes inside JSON strings are escaped, so no text of the model can match.
_USAGE = re.compile(rb',"usage":(null|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_INDEX = re.compile(rb'"index":(\d+)')
_PREFIX = b"data: "
_PROMPT_BYTES_PER_TOKEN, _ANSWER_TOKENS = 4, 1024
_ERROR = b'data: {"error"'
DONE = b"data: [DONE]\n\n"


class StreamMeter:
    """One stream of server-sent events. `request`: `stream_options` and `n` of the request, if it has them.

    `done`: the stream ended properly. `error`: it has an error event.
    """

    __slots__ = ("_choices", "_context", "_continuous", "_final", "_usages", "_wanted", "done", "error", "events")

    def __init__(self, context: RequestContext, request: dict[str, Any]) -> None:
        options, choices = request.get("stream_options"), request.get("n")
        asked = options if isinstance(options, dict) else {}
        self._choices = choices if isinstance(choices, int) and choices > 0 else 1  # of each prompt
        self._context = context
        self._wanted = bool(asked.get("include_usage"))
        self._continuous = self._wanted and bool(asked.get("continuous_usage_stats"))
        self._usages: dict[bytes, bytes] = {}  # index of the choice -> its last usage
        self._final = b""  # usage of all choices
        self.events = 0
        self.done = False
        self.error: bytes | None = None

    def pass_on(self, events: bytes) -> bytes:
        """Return the events as the client gets them. vLLM sends complete events."""
        if events.count(b"\n\n") == 1:
            return self._event(events)
        return b"".join(self._event(event + b"\n\n") for event in events.split(b"\n\n") if event)

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(_PREFIX):
            return event
        if event == DONE:
            self.done = True
            return event
        if event.startswith(_ERROR):
            self.error = event[len(_PREFIX) :].strip()
            return event
        self.events += 1
        if self.events == 1:
            self._context.phases["first_token"] = time.monotonic() - self._context.started
        found = _USAGE.search(event)
        if found is None:
            return event
        if b'"choices":[]' in event:
            self._final = found[1]
            return event if self._wanted else b""
        index = _INDEX.search(event)
        self._usages[index[1] if index else b""] = found[1]
        return event if self._continuous else event[: found.start()] + event[found.end() :]

    def count(self) -> None:
        """Write the tokens of the prompt and of all choices to the context."""
        found = {b"0": self._final} if self._final else self._usages
        usages = {int(index or 0): orjson.loads(usage) or {} for index, usage in found.items()}
        prompts = {index // self._choices: usage.get("prompt_tokens", 0) for index, usage in usages.items()}
        self._context.input_tokens = sum(prompts.values())
        self._context.output_tokens = sum(usage.get("completion_tokens", 0) for usage in usages.values())


def count_body(context: RequestContext, body: bytes) -> None:
    """Write the tokens of a complete response to the context."""
    found = _USAGE.findall(body)
    usage = orjson.loads(found[-1]) if found else None
    if usage:
        context.input_tokens = usage.get("prompt_tokens", 0)
        context.output_tokens = usage.get("completion_tokens", 0) or 0


def expected_tokens(body: bytes, context: int) -> tuple[int, int]:
    """Return the estimated tokens of the prompts of a request, and the largest number that its answers can have.

    A prompt has about 4 bytes per token. Without a limit, an answer counts with `_ANSWER_TOKENS`. `context`: the
    largest one, in tokens.
    """
    prompt_tokens = -(-len(body) // _PROMPT_BYTES_PER_TOKEN)
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return prompt_tokens, 0  # vLLM rejects it
    if not isinstance(request, dict):
        return prompt_tokens, 0
    limit, choices, prompts = request.get("max_completion_tokens"), request.get("n"), request.get("prompt")
    limit = request.get("max_tokens") if limit is None else limit
    answer = limit if isinstance(limit, int) and limit >= 0 else _ANSWER_TOKENS
    answers = choices if isinstance(choices, int) and choices > 0 else 1
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        answers *= len(prompts)
    return prompt_tokens, answers * min(answer, context)


def request_options(body: bytes) -> dict[str, Any]:
    """Return `stream_options` and `n` of the JSON body of a request; empty if it has neither."""
    if b'"stream_options"' not in body and b'"n"' not in body:
        return {}
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return {key: request.get(key) for key in ("stream_options", "n")} if isinstance(request, dict) else {}
