"""What the edge knows about a request: while it runs, and as one event at its end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.types import Scope

from inferctl.reading.space import HEADER
from inferctl.serve.work import Caller, RejectedError, Used
from inferctl.tenancy.access.budgets import BudgetUse
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.access.limits import Quotas
from inferctl.tenancy.metering.usage_event import UsageEvent

CLIENT_DISCONNECTED = 499
OTHER = "other"  # the name of paths that are no endpoint of a task
BY_MODEL = "by_model"  # of a path that is another endpoint for each model, until the model is known
_MAX_ID_LENGTH = 128
_TRACE = b"traceparent", b"tracestate"
_SPACE = HEADER.encode()
_CONTEXT, _NOTES = "inferctl.request", "inferctl.notes"  # keys of a scope, and of its `state`


@dataclass(slots=True)
class ConnectionNotes:
    """What the connection and the edge tell each other about one request.

    `rejection`: status and code, if the connection rejected the request while the edge had it. `disconnected`: whether
    the client gets no response. Then the connection calls `on_disconnect`. `paced`: the response waits for its client
    to read.
    """

    rejection: tuple[int, str | None] | None = None
    disconnected: bool = False
    on_disconnect: Callable[[], None] | None = None
    paced: bool = False

    @classmethod
    def of(cls, scope: Any) -> ConnectionNotes:
        """Return that of a request, also if nobody has asked for it yet."""
        state = scope["state"]
        found: ConnectionNotes | None = state.get(_NOTES)
        if found is None:
            found = state[_NOTES] = cls()
        return found


class Asked(NamedTuple):
    """What the path and the headers of a request say. `priority` and `content_type`: as the client sent them.

    `spaces`: the names of those that the client can use, comma separated; empty without the header: any.
    """

    endpoint: str = ""
    id: bytes = b""
    priority: bytes = b""
    content_type: bytes = b""
    content_length: int = 0
    cache_control: bytes = b""
    spaces: bytes = b""
    trace: Mapping[str, str] = {}

    @classmethod
    def of(cls, scope: Scope, endpoint: str) -> Asked:
        """Read the headers of a request."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        found = headers.get
        request_id = found(b"x-request-id", b"")
        if not 0 < len(request_id) <= _MAX_ID_LENGTH or not all(33 <= c <= 126 for c in request_id):
            request_id = b"%032x" % random.getrandbits(128)
        trace = dict[str, str]()
        if b"traceparent" in headers:
            trace = {name.decode(): headers[name].decode("latin-1") for name in _TRACE if name in headers}
        return cls(
            endpoint,
            request_id,
            found(b"x-priority", b"").strip().lower(),
            found(b"content-type", b""),
            int(found(b"content-length", b"0")),
            found(b"cache-control", b""),
            (b",".join(value for name, value in scope["headers"] if name == _SPACE) or b"(empty)")
            if _SPACE in headers
            else b"",
            trace,
        )


_NOBODY, _BULK = Caller(), Caller(bulk=True)


@dataclass(slots=True)
class RequestContext:
    """One request in progress: what is asked, by whom, and what came of it, which becomes its event.

    `number`: by which the backend knows it. `admitted`: whether the backend knows it, and waits for its end. `full`:
    why a full queue would reject it. `quotas`, `budget`: what remains of those of the key. `in_vain`: tokens that were
    tokenized, and not computed. `quotas_known`: so the response may begin before the end. `key`: of the caller, if the
    server has keys. `model`: which computes it; of a server with one, known at the end. `space`: the names of the
    spaces of its vectors.
    """

    asked: Asked
    number: int
    caller: Caller
    key: ApiKey | None = None
    started: float = field(default_factory=time.monotonic)
    admitted: bool = False
    full: RejectedError | None = None
    quotas_known: bool = False
    quotas: Quotas | None = None
    budget: BudgetUse | None = None
    in_vain: int = 0
    body_bytes: int = 0
    shared_bytes: int = 0  # bytes of the body that count in the share of the tenant
    model: str | None = None
    space: bytes = b""
    status: int = 0
    code: str | None = None
    inputs: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    engine_seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, scope: Scope, endpoint: str = "", number: int = 0) -> RequestContext:
        """Return the context of a request, and store it in its scope."""
        asked = Asked.of(scope, endpoint)
        context = scope[_CONTEXT] = cls(asked, number, _BULK if asked.priority == b"bulk" else _NOBODY)
        return context

    def may_use(self, *names: str) -> bool:
        """Return whether its key may use a model that has these names."""
        return self.key is None or self.key.models is None or not set(names).isdisjoint(self.key.models)

    def count(self, used: Used) -> None:
        """Take over what the request used."""
        self.input_tokens, self.cached_tokens, self.engine_seconds, self.quotas, self.budget = used

    def event(self) -> UsageEvent:
        """Return the event of this request, which ends now."""
        asked = self.asked
        return UsageEvent(
            asked.id.decode(),
            asked.endpoint,
            self.status,
            self.code,
            self.model,
            "bulk" if self.caller.bulk else asked.priority.decode("latin-1") or "interactive",
            self.inputs,
            self.input_tokens,
            self.output_tokens,
            self.body_bytes,
            time.monotonic() - self.started,
            self.phases,
            asked.trace,
            self.caller.id,
            self.cached_tokens,
            self.engine_seconds,
            asked.content_length,
            self.key.team if self.key else None,
            self.budget,
        )


def context_of(scope: Scope) -> RequestContext:
    """Return the context that the edge stored in the scope of a request."""
    context: RequestContext = scope[_CONTEXT]
    return context
