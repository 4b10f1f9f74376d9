"""Reads what a generation used from vLLM's responses, and gives the client what it asked for.

With `--enable-force-include-usage`, vLLM puts `usage` into every event of a stream. So the count is exact for a client
that leaves in mid-stream too. A client that did not ask for it gets the stream without it.
"""

from __future__ import annotations

import re
import time

import orjson

from inferctl.serve.edge.usage import RequestContext

# `usage` of an event. Quotes inside JSON strings are escaped, so no text of the model can match.
_USAGE = re.compile(rb',"usage":(null|\{(?:[^{}]|\{[^{}]*\})*\})')
_INDEX = re.compile(rb'"index":(\d+)')
_PREFIX = b"data: "
_ERROR = b'data: {"error"'
DONE = b"data: [DONE]\n\n"


class StreamMeter:
    """One stream of server-sent events. `options`: `stream_options` of the request.

    `done`: the stream ended properly. `error`: it has an error event.
    """

    __slots__ = ("_context", "_continuous", "_final", "_usages", "_wanted", "done", "error", "events")

    def __init__(self, context: RequestContext, options: object) -> None:
        asked = options if isinstance(options, dict) else {}
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
        usages = [orjson.loads(usage) or {} for usage in ([self._final] if self._final else self._usages.values())]
        if usages:
            self._context.input_tokens = usages[0].get("prompt_tokens", 0)
            self._context.output_tokens = sum(usage.get("completion_tokens", 0) for usage in usages)


def count_body(context: RequestContext, body: bytes) -> None:
    """Write the tokens of a complete response to the context."""
    found = _USAGE.findall(body)
    usage = orjson.loads(found[-1]) if found else None
    if usage:
        context.input_tokens = usage.get("prompt_tokens", 0)
        context.output_tokens = usage.get("completion_tokens", 0) or 0


def stream_options(body: bytes) -> object:
    """Return `stream_options` of the JSON body of a request; None without."""
    if b"stream_options" not in body:
        return None
    try:
        return orjson.loads(body).get("stream_options")
    except (orjson.JSONDecodeError, AttributeError):
        return None
