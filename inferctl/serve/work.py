"""Between front end and backend: who asks, what is asked, what came of it or why nothing did, and the calls."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol

from inferctl.config.budget import Budget
from inferctl.reading.rows import Rows, Tokens
from inferctl.tenancy.access.budgets import BudgetUse
from inferctl.tenancy.access.limits import NO_LIMITS, Limits, Quotas


class Caller(NamedTuple):
    """Who sends a request. `id`: of the key; None without keys, and for a client of an open page.

    `limits`, `budgets`: of the key. `tenant`: among whom the server is shared, None if there is one only. `bulk`: whether
    interactive requests go first.
    """

    id: str | None = None
    limits: Limits = NO_LIMITS
    tenant: str | None = None
    bulk: bool = False
    budgets: tuple[Budget, ...] = ()


class Work(NamedTuple):
    """The sequences of one request. `marks`: as in `Batch`. `directives`: the header Cache-Control, for the cache.

    `model`: its number among those of the server.
    """

    caller: Caller
    sequences: Sequence[Tokens]
    marks: Sequence[int] | None = None
    directives: bytes = b""
    model: int = 0


class Used(NamedTuple):
    """What a request used: its tokens, those of them that no engine computed, and its share of the engines' time (s).

    `quotas`: what remains of the limits of its key; None without limits. `budget`: the same of its budget.
    """

    tokens: int = 0
    cached: int = 0
    engine_seconds: float = 0.0
    quotas: Quotas | None = None
    budget: BudgetUse | None = None


class Outcome(NamedTuple):
    """The result of one request: its rows, which are finite, what it used, and its times (s)."""

    rows: Rows
    used: Used
    queue_seconds: float
    inference_seconds: float


class RejectedError(Exception):
    """Why a request is not computed. It knows no HTTP.

    `reason`: a stable code. `retry_after`: seconds; None if a retry does not help, or nobody knows when. `used`: what
    the request used, if it ended with this and its charge was given back; else `Backend.report` ends it.
    """

    def __init__(self, reason: str, message: str, retry_after: float | None = None, used: Used | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.retry_after, self.used = reason, message, retry_after, used


# Reasons that more than one part of the backend has.
LIMIT_EXCEEDED, ENGINE_UNAVAILABLE, INTERNAL_ERROR = "rate_limit_exceeded", "engine_unavailable", "internal_error"


class EdgeBackend(Protocol):
    """The part of the interface that the edge needs. A request has a `number` that no other one of the process has.

    Each request that was admitted ends with one of `report`, `end`, or a `RejectedError` that says what it used.
    """

    def admit(self, number: int, caller: Caller, size: int, model: int | None = 0) -> Awaitable[RejectedError | None]:
        """Charge a request, and the least that a body of `size` bytes costs. Raises `RejectedError`, maybe at once.

        Called before the body is read, and again when the size of a chunked body is known. Returns why a full queue
        would reject the request: that of the `model`, unless only the body says which one it is for (None). A backend
        may leave the charge to the next call for the request, which then raises.
        """

    def report(self, number: int, *, in_vain: int = 0, give_back: bool = False, wait: bool = True) -> Awaitable[Used]:
        """End a request without an outcome, and return what it used. If it is computed, that is cancelled.

        `in_vain`: tokens that were only tokenized. `give_back`: it failed, so it costs only what engines computed.
        `wait`: return when they compute nothing more for it. If that is cancelled, call it again.
        """

    def end(self, number: int, *, in_vain: int = 0, give_back: bool = False) -> None:
        """End a request of which all is known, as after its outcome."""


class Backend(EdgeBackend, Protocol):
    """Limits of keys, queue, cache and engines. Everything that must be exact for the whole server is decided here."""

    def submit(self, number: int, work: Work) -> Awaitable[Outcome]:
        """Charge the tokens of a request, and compute it. Raises `RejectedError`, maybe at once.

        If the result is cancelled, so is the request.
        """
