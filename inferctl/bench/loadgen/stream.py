"""Parse the event stream of a generation server while it arrives, and record the time of each event with tokens.

An event stream is text: lines `data: JSON`, an empty line after each event, `data: [DONE]` at the end. Chunks of HTTP
and reads from the socket may split it anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from inferctl.bench.loadgen.recorder import HTTP_ERROR, OK, STREAM_ERROR, UNFINISHED

# The cached tokens of a prompt if the server does not report them.
NOT_REPORTED = 2**32 - 1
# How a response ended, as its `finish_reason`; OTHER is any other reason, such as a tool call.
NO_FINISH, STOP, LENGTH, OTHER = range(4)
_FINISH = {"stop": STOP, "length": LENGTH}
# Parts of `delta` that contain output: content, two names of the reasoning channel, calls of tools.
_CHANNELS = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call")
AddEvent = Callable[[int, int, int, int], None]


class TokenStream:
    """The stream of one request. `add_event(time_ns, index, tokens, phase)` records each event with tokens.

    `output_tokens` and `prompt_tokens` are those of the server's usage; 0 if it reports none. `cached_tokens` are the
    tokens of the prompt that came from a cache; NOT_REPORTED if the usage does not have them. `counted` is whether
    usage came with each event. Without it, an event counts as one token: many servers report usage only with the finish
    reason. The time of an event is that of the read that completed it.
    """

    __slots__ = (
        "_add_event",
        "_data",
        "_index",
        "_phase",
        "_rest",
        "_uncounted",
        "cached_tokens",
        "counted",
        "done",
        "failed",
        "finish",
        "output_tokens",
        "prompt_tokens",
    )

    def __init__(self, add_event: AddEvent, index: int, phase: int) -> None:
        self._add_event, self._index, self._phase = add_event, index, phase
        self._rest = self._data = b""
        self.output_tokens = self.prompt_tokens = 0
        self.cached_tokens = NOT_REPORTED
        self.finish = NO_FINISH
        self.counted = self.done = self.failed = self._uncounted = False

    def feed(self, part: bytes | bytearray, now_ns: int) -> None:
        """Parse the next bytes of the body, which were read at `now_ns`."""
        # Lines end at \n only: JSON may contain U+2028 and other characters that `splitlines` splits at.
        *lines, rest = (self._rest + part).split(b"\n")
        self._rest = rest
        for line in lines:
            if line.startswith(b"data:"):
                self._data = self._data + b"\n" + line[5:] if self._data else line[5:]
            elif self._data and line in (b"", b"\r"):
                data, self._data = self._data, b""
                self._dispatch(data.strip(), now_ns)

    def outcome(self, error: int) -> int:
        """Return the error code of a response whose code without regard to the stream is `error`.

        A stream without a finish reason or `[DONE]` is not complete, even if the server ended it in an orderly way.
        """
        if error != OK:
            # The rest of a stream that broke after an error event adds nothing to it.
            return STREAM_ERROR if self.failed and error != HTTP_ERROR else error
        if self.failed:
            return STREAM_ERROR
        return OK if self.done and self.finish else UNFINISHED

    def _dispatch(self, data: bytes, now_ns: int) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                self.failed = True
                return
            choices, usage = chunk.get("choices"), chunk.get("usage")
            tokens = int(bool(choices) and self._has_output(choices[0]))
            if usage:
                tokens = self._count(usage, tokens) if choices else 0
                self._keep(usage)
            else:
                self._uncounted |= bool(tokens)
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            self.failed = True
            return
        if tokens:
            self._add_event(now_ns, self._index, min(tokens, 65_535), self._phase)

    def _count(self, usage: Mapping[str, Any], tokens: int) -> int:
        """Return the tokens of an event: the increase of the usage, or `tokens` if earlier events had no usage."""
        self.counted = not self._uncounted
        return max(0, int(usage["completion_tokens"]) - self.output_tokens) if self.counted else tokens

    def _keep(self, usage: Mapping[str, Any]) -> None:
        self.output_tokens = int(usage["completion_tokens"])
        self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None:
            self.cached_tokens = int(cached)

    def _has_output(self, choice: Mapping[str, Any]) -> bool:
        """Return whether a choice has output on any channel; keep its finish reason."""
        if reason := choice.get("finish_reason"):
            self.finish = _FINISH.get(reason, OTHER)
        delta = choice.get("delta")
        if delta is None:
            return bool(choice.get("text"))
        return any(delta.get(channel) for channel in _CHANNELS)
