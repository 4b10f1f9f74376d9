"""What the edge knows about a request: while it runs, and as one event at its end."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

log = logging.getLogger("inferctl.usage")

CLIENT_DISCONNECTED = 499
_MAX_ID_LENGTH = 128
_SCOPE_KEY = "inferctl.request"


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One finished request. Each request emits exactly one, also if it was rejected or its client disconnected.

    `status`: the HTTP status, or 499 if the client disconnected before its response. A 200 means that the response was
    given to the socket. `code`: the code of the error, None for a success. `endpoint`: its last path segment, empty if
    the request was rejected before it was parsed. `seconds`: from the last byte of the request to the last byte of the
    response; `phases`: the parts of them. `input_tokens` counts the tokens that the model processed.
    `trace`: the W3C trace context of the client.
    """

    request_id: str
    endpoint: str
    status: int
    code: str | None = None
    model: str | None = None
    priority: str = "interactive"
    inputs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    body_bytes: int = 0
    seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    trace: Mapping[str, str] = field(default_factory=dict)


class RequestContext:
    """One request in progress. The edge reads the headers; the application fills in the model and the counts."""

    __slots__ = (
        "body_bytes",
        "code",
        "content_length",
        "content_type",
        "endpoint",
        "id",
        "input_tokens",
        "inputs",
        "model",
        "output_tokens",
        "phases",
        "priority",
        "started",
        "status",
        "trace",
    )

    def __init__(self, scope: Scope) -> None:
        self.id = self.priority = self.content_type = b""
        self.content_length = 0
        self.trace: dict[str, str] = {}
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                self.id = value
            elif name == b"x-priority":
                self.priority = value.strip().lower()
            elif name == b"content-type":
                self.content_type = value
            elif name == b"content-length":
                self.content_length = int(value)
            elif name in (b"traceparent", b"tracestate"):
                self.trace[name.decode()] = value.decode("latin-1")
        if not (0 < len(self.id) <= _MAX_ID_LENGTH and all(33 <= character <= 126 for character in self.id)):
            self.id = b"%032x" % random.getrandbits(128)
        self.endpoint = "other"
        self.model: str | None = None
        self.code: str | None = None
        self.status = self.inputs = self.input_tokens = self.output_tokens = self.body_bytes = 0
        self.phases: dict[str, float] = {}
        self.started = time.monotonic()
        scope[_SCOPE_KEY] = self

    def event(self) -> UsageEvent:
        """Return the event of this request, which ends now."""
        return UsageEvent(
            self.id.decode(),
            self.endpoint,
            self.status,
            self.code,
            self.model,
            self.priority.decode("latin-1") or "interactive",
            self.inputs,
            self.input_tokens,
            self.output_tokens,
            self.body_bytes,
            time.monotonic() - self.started,
            self.phases,
            self.trace,
        )


def emitter(sinks: Sequence[Callable[[UsageEvent], None]]) -> Callable[[UsageEvent], None]:
    """Return a function that gives an event to each sink, and logs the errors of sinks."""

    def emit(event: UsageEvent) -> None:
        for sink in sinks:
            try:
                sink(event)
            except Exception:
                log.exception("a usage event was not recorded")

    return emit


def context_of(scope: Scope) -> RequestContext:
    """Return the context that the edge stored in the scope of a request."""
    context: RequestContext = scope[_SCOPE_KEY]
    return context
