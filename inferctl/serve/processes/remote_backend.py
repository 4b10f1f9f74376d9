"""The backend in another process, as an API process sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from inferctl.reading.rows import unpack_rows
from inferctl.serve.backend.charges import done
from inferctl.serve.edge.pages import Page
from inferctl.serve.processes.link import Handlers, Link
from inferctl.serve.work import ENGINE_UNAVAILABLE, INTERNAL_ERROR, Caller, Outcome, RejectedError, Used, Work
from inferctl.tenancy.access.budgets import BudgetUse
from inferctl.tenancy.access.limits import NO_LIMITS

# For larger bodies, the backend is asked before they are read. A smaller one is tokenized in about the time that takes,
# so its charge is sent with what comes next.
_ASKED_BYTES = 16 * 1024
_OWES_NOTHING = -1


class RemoteBackend:
    """It is a `Backend`. Runs on the event loop. Each message about a request begins with its number."""

    def __init__(self) -> None:
        self.link: Link  # set by its owner
        self._lost = False  # the backend ended
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reports: dict[int, asyncio.Future[Used]] = {}
        self._owed: dict[int, tuple[Caller, int]] = {}  # requests, and bytes of bodies, that are not charged yet
        # Requests that the backend knows, and what they used if it has sent their outcome.
        self._known: dict[int, Used | None] = {}
        self._pages = 0
        self.handlers: Handlers = {
            "admitted": self._admitted,
            "outcome": self._outcome,
            "rejected": self._rejected,
            "used": self._used,
            "page": self._page,
        }

    def admit(
        self, number: int, caller: Caller, size: int, model: int | None = 0
    ) -> asyncio.Future[RejectedError | None]:
        """Charge a request. Part of `Backend`."""
        if size > _ASKED_BYTES:
            self._owed.pop(number, None)
            self._known[number] = None
            return self._ask("admit", number, tuple(caller), size, model)
        if caller.limits != NO_LIMITS or caller.budgets:
            self._owed[number] = caller, size
        return done(None)

    def submit(self, number: int, work: Work) -> asyncio.Future[Outcome]:
        """Send a request to the backend. Part of `Backend`."""
        caller, sequences, marks, directives, model = work
        _, size = self._owed.pop(number, (caller, _OWES_NOTHING))
        lengths = [len(sequence) for sequence in sequences]
        payload = [sequence.tobytes() for sequence in sequences]
        self._known[number] = None
        fields = tuple(caller), size, lengths, marks, directives.decode("latin-1"), model
        return self._ask("submit", number, *fields, payload=payload)

    def report(
        self, number: int, *, in_vain: int = 0, give_back: bool = False, wait: bool = True
    ) -> asyncio.Future[Used]:
        """End a request. Part of `Backend`."""
        self._waiting.pop(number, None)
        caller, size = self._owed.pop(number, (None, _OWES_NOTHING))
        if (used := self._known.get(number)) is not None:
            self.end(number, in_vain=in_vain, give_back=give_back)
            return done(used)
        if self._lost or (caller is None and number not in self._known):
            return done(Used())
        owed = None if caller is None else tuple(caller)
        self.link.send("report", number, in_vain, give_back, wait, owed, size)
        future = self._reports[number] = asyncio.get_running_loop().create_future()
        return future

    def end(self, number: int, *, in_vain: int = 0, give_back: bool = False) -> None:
        """End a request whose outcome is here. Part of `Backend`."""
        used = self._known.pop(number)
        if used is None or used.quotas is not None:  # else it was not charged, and ended with its outcome
            self.link.send("end", number, in_vain, give_back, soon=give_back)  # else the next message takes it along

    async def page(self, path: str) -> Page:
        """Return what the server answers at a path of `pages.PATHS`."""
        self._pages -= 1  # requests have the other numbers
        page: Page = await self._ask("page", self._pages, path)
        return page

    def lost(self) -> None:
        """Fail all requests: the backend ended."""
        self._lost = True
        for number in list(self._waiting):
            _resolve(self._waiting, number, _gone())
        for number in list(self._reports):
            _resolve(self._reports, number, Used())

    def _ask(self, kind: str, number: int, *fields: Any, payload: Sequence[bytes] = ()) -> asyncio.Future[Any]:
        """Send a message, and return the future of what answers it. Raises `RejectedError` if nothing will."""
        if self._lost:
            raise _gone()
        self.link.send(kind, number, *fields, payload=payload)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        return future

    def _admitted(self, number: int, full: tuple[str, str, float] | None) -> None:
        future = self._waiting.pop(number, None)
        if future is not None and not future.done():
            future.set_result(None if full is None else RejectedError(*full))

    def _outcome(self, number: int, used: Any, times: Any, count: int, width: int, body: bytes = b"") -> None:
        found = used_of(used)
        if number in self._waiting:
            self._known[number] = found
            rows, _ = unpack_rows(count, width, body, 0)
            _resolve(self._waiting, number, Outcome(rows, found, *times))
        elif found.quotas is None:  # it has ended with its outcome, so nothing else answers its report
            self._known.pop(number, None)
            _resolve(self._reports, number, found)

    def _rejected(self, number: int, reason: str, message: str, retry_after: float | None, used: Any) -> None:
        rejected = RejectedError(reason, message, retry_after, None if used is None else used_of(used))
        if (future := self._waiting.get(number)) is not None:
            if rejected.used is not None:
                # If its task is cancelled before it reads this, its report follows in its next step.
                self._known[number] = rejected.used
                future.add_done_callback(lambda _: self._known.pop(number, None))
            _resolve(self._waiting, number, rejected)
        elif rejected.used is not None or reason == INTERNAL_ERROR:  # else the report will say that
            # If it was on the way when its client left, the report finds nothing of the request any more.
            has_left = self._known.pop(number, rejected) is not rejected
            _resolve(self._reports, number, (has_left and rejected.used) or rejected)

    def _used(self, number: int, used: Any) -> None:
        self._known.pop(number, None)
        _resolve(self._reports, number, used_of(used))

    def _page(self, number: int, status: int, media_type: str, body: bytes = b"") -> None:
        _resolve(self._waiting, number, (status, body, media_type))


def _resolve(futures: dict[int, asyncio.Future[Any]], number: int, value: object) -> None:
    """Set the result of a future, unless its request has ended."""
    future = futures.pop(number, None)
    if future is None or future.done():
        return
    if isinstance(value, RejectedError):
        future.set_exception(value)
        future.exception()  # if its task is cancelled, nobody reads it
    else:
        future.set_result(value)


def _gone() -> RejectedError:
    return RejectedError(ENGINE_UNAVAILABLE, "the server ends because of an error", 1, Used())


def used_of(fields: Any) -> Used:
    """Return what a message says that a request used."""
    tokens, cached, seconds, quotas, budget = fields
    quotas = quotas and tuple(quota and tuple(quota) for quota in quotas)
    return Used(tokens, cached, seconds, quotas, budget and BudgetUse(*budget))
