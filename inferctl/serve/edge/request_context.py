"""What the edge knows about a request: while it runs, and as one event at its end."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from starlette.types import Scope

from inferctl.tenancy.access.limits import Charge, Quota

log = logging.getLogger("inferctl.usage")

CLIENT_DISCONNECTED = 499
# If the connection rejects a request in progress, it stores (status, code) under this key of the scope's `state`.
REJECTION = "inferctl.rejection"
# What the connection calls if the client disconnects, or if it rejects a request in progress, is under this key of the
# scope's `state`. Afterwards, `DISCONNECTED` is a key of it.
ON_DISCONNECT, DISCONNECTED = "inferctl.on_disconnect", "inferctl.disconnected"
# Complete lines under this key of the scope's `state` join the headers of the response. uvicorn would check each header
# with two regular expressions: 8 headers of limits took 6 us, 3% of a small request.
HEADER_LINES = "inferctl.headers"
_MAX_ID_LENGTH = 128
_SCOPE_KEY = "inferctl.request"


class Use(Protocol):
    """What engines computed for a request that is not complete. `settled` returns when they compute no more."""

    tokens: int
    seconds: float

    async def settled(self) -> None: ...


class Usage(Protocol):
    """What the key of a request used."""

    def quotas(self, now: float) -> tuple[Quota | None, Quota | None]: ...


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One finished request. Each one emits exactly one event, also if it was rejected or its client disconnected.

    Probes emit none. `endpoint`: its name, `other` for a path without a task, empty if the connection rejected the
    request. `status`: the HTTP status, or 499 if the client disconnected before its response. A 200 means that the
    response was given to the connection, which resets a client that does not read it. `code`: the code of the error,
    None for a success; a stream that ended with an error event has the status 200 and a code. `seconds`: from the last
    byte of the request to the last byte of the response; `phases`: the parts of them. `input_tokens` counts the tokens
    that the model processed or a cache had, `cached_tokens` the latter, `output_tokens` those that it generated.
    `trace`: the W3C trace context of the client. `key_id`, `team`: of the API key, never the key itself.
    `engine_seconds`: the share of its batches' times, by tokens; 0 for generation, because vLLM does not report it.
    `content_length`: of the body, as the client declared it; `body_bytes` were read.
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
    key_id: str | None = None
    cached_tokens: int = 0
    engine_seconds: float = 0.0
    content_length: int = 0
    team: str | None = None


OTHER = "other"  # the name of paths that are no endpoint of a task


@dataclass(slots=True)
class RequestContext:
    """One request in progress. The edge reads the headers; the application fills in the model and the counts.

    `use`: what counts if the request does not complete, as when its client disconnects.

    `usage`: what the key used, None without limits; `charge`: what this request was charged. `tenant`: among whom the
    queue is shared; None for a client without a key, and if there is one key only.
    """

    endpoint: str
    id: bytes = b""
    priority: bytes = b""
    content_type: bytes = b""
    content_length: int = 0
    cache_control: bytes = b""
    trace: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    status: int = 0
    code: str | None = None
    inputs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    body_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    key_id: str | None = None
    cached_tokens: int = 0
    usage: Usage | None = None
    charge: Charge | None = None
    tenant: str | None = None
    shared_bytes: int = 0  # bytes of the body that count in the share of the tenant
    engine_seconds: float = 0.0
    use: Use | None = None
    team: str | None = None

    @classmethod
    def of(cls, scope: Scope, endpoint: str) -> RequestContext:
        """Return the context of a request, and store it in its scope."""
        context = scope[_SCOPE_KEY] = cls(endpoint)
        for name, value in scope["headers"]:
            if name == b"x-request-id" and 0 < len(value) <= _MAX_ID_LENGTH and all(33 <= c <= 126 for c in value):
                context.id = value
            elif name == b"x-priority":
                context.priority = value.strip().lower()
            elif name == b"content-type":
                context.content_type = value
            elif name == b"content-length":
                context.content_length = int(value)
            elif name == b"cache-control":
                context.cache_control = value
            elif name in (b"traceparent", b"tracestate"):
                context.trace[name.decode()] = value.decode("latin-1")
        context.id = context.id or b"%032x" % random.getrandbits(128)
        return context

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
            self.key_id,
            self.cached_tokens,
            self.engine_seconds,
            self.content_length,
            self.team,
        )


def to_all(sinks: Sequence[Callable[[UsageEvent], None]]) -> Callable[[UsageEvent], None]:
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
