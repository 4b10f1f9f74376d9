"""Reads what a generation used from vLLM's responses, and gives the client what it asked for.

With `--enable-force-include-usage`, vLLM puts `usage` into every event of a stream. So the count is exact for a client
that leaves in mid-stream too. A client that did not ask for it gets the stream without it.
"""

from __future__ import annotations

import re
import time
from typing import Any

import orjson

from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.generate.vllm_request import VllmRequest

# `usage` of an event. Quotes inside JSON strings are escaped, so no text of the model can match.
# Details of the tokens of media are two levels deeper.
_DETAILS = rb"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
_USAGE = re.compile(rb',"usage":(null|\{[^{}]*(?:%s[^{}]*)*\})' % _DETAILS)
_INDEX = re.compile(rb'"index":(\d+)')
_PREFIX = b"data: "
_ERROR = b'data: {"error"'
DONE = b"data: [DONE]\n\n"


class StreamMeter:
    """One stream of server-sent events.

    `done`: the stream ended properly. `error`: it has an error event. `complete`: the usage of each prompt was counted.
    """

    __slots__ = (
        "_choices",
        "_context",
        "_continuous",
        "_final",
        "_prompts",
        "_usages",
        "_wanted",
        "complete",
        "done",
        "error",
        "events",
    )

    def __init__(self, context: RequestContext, request: VllmRequest) -> None:
        self._prompts, self._choices = request.prompts, request.choices  # of each prompt
        self._context = context
        self._wanted, self._continuous = request.usage, request.continuous_usage
        self._usages: dict[bytes, bytes] = {}  # index of the choice -> its last usage
        self._final = b""  # usage of all choices
        self.events = 0
        self.done = self.complete = False
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
        if self._final:
            self.complete = True
            _count(self._context, orjson.loads(self._final) or {})
            return
        usages = {int(index or 0): orjson.loads(usage) or {} for index, usage in self._usages.items()}
        prompts = {index // self._choices: usage.get("prompt_tokens", 0) for index, usage in usages.items()}
        self.complete = len(prompts) == self._prompts
        self._context.input_tokens = sum(prompts.values())
        self._context.output_tokens = sum(usage.get("completion_tokens", 0) for usage in usages.values())


def count_body(context: RequestContext, body: bytes) -> None:
    """Write the tokens of a complete response to the context."""
    found = _USAGE.findall(body)
    usage = orjson.loads(found[-1]) if found else None
    if usage:
        _count(context, usage)


def _count(context: RequestContext, usage: dict[str, Any]) -> None:
    context.input_tokens = usage.get("prompt_tokens", 0)
    context.output_tokens = usage.get("completion_tokens", 0) or 0
    details = usage.get("prompt_tokens_details") or {}
    context.cached_tokens = details.get("cached_tokens") or 0
