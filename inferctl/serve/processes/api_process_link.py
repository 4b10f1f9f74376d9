"""The backend's side of one API process: passes its requests on to the backend, and answers them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np

from inferctl.config.budget import Budget
from inferctl.reading.rows import row_buffers
from inferctl.serve.backend.local_backend import Job, LocalBackend
from inferctl.serve.edge.pages import Page
from inferctl.serve.processes.link import Buffer, Handlers, Link, frame
from inferctl.serve.work import INTERNAL_ERROR, Caller, RejectedError, Used, Work

log = logging.getLogger("inferctl.api_processes")

# Results above this size, and those of a process that has not read so much, are sent in parts, and their bytes bounded.
_LARGE_BYTES, _MOST_BUFFERED = 1 << 20, 1 << 22
_INTERNAL = RejectedError(INTERNAL_ERROR, "internal error; see the server log")
# Each API process numbers its requests from 0. In the backend, those of each link have numbers of their own.
_FIRST_NUMBERS = itertools.count(0, 1 << 40)


class ApiProcessLink:
    """Passes the requests of one API process on to the backend. `page(path)` answers for the whole server.

    `handlers` take the messages that are not about requests. `most_unsent`: bytes of large results that may wait until
    the API process reads them.
    """

    def __init__(
        self,
        backend: LocalBackend,
        page: Callable[[str], Awaitable[Page]],
        handlers: Handlers,
        on_lost: Callable[[], None],
        most_unsent: int,
    ) -> None:
        self._backend, self._page, self._on_lost, self._most_unsent = backend, page, on_lost, most_unsent
        self._first = next(_FIRST_NUMBERS)
        self._jobs: dict[int, Job | None] = {}  # of requests that have not ended; None if nobody waits for it
        self._pages: set[asyncio.Task[None]] = set()
        own: dict[str, Callable[..., None]] = {
            "admit": self._admit,
            "submit": self._submit,
            "report": self._report,
            "end": self._end,
            "page": self._start_page,
        }
        answered = {kind: partial(self._answer, handler) for kind, handler in own.items()}
        self.messages = Link({**answered, **handlers}, self._lost)

    @property
    def in_flight(self) -> int:
        """How many requests the backend computes for the API process."""
        return sum(job is not None and not job.future.done() for job in self._jobs.values())

    def _admit(self, number: int, caller: Any, size: int, model: int | None) -> None:
        self._jobs[number] = None
        full = self._backend.admit(self._first + number, caller_of(caller), size, model).result()
        self.messages.send("admitted", number, full and (full.reason, full.message, full.retry_after))

    def _submit(
        self,
        number: int,
        caller: Any,
        size: int,
        lengths: list[int],
        marks: Any,
        directives: str,
        model: int,
        body: bytes,
    ) -> None:
        """Start a request, after it was charged for a body of `size` bytes, unless that is negative.

        There is no task for it: that would take a fifth of its time here.
        """
        self._jobs[number] = None
        tokens = np.frombuffer(body, dtype="<i4")
        sequences = [tokens] if len(lengths) == 1 else np.split(tokens, np.cumsum(lengths)[:-1])
        work = Work(caller_of(caller), sequences, marks, directives.encode("latin-1"), model)
        if size >= 0:
            self._backend.charge(self._first + number, work.caller, size)
        job = self._jobs[number] = self._backend.submit(self._first + number, work)
        job.future.add_done_callback(partial(self._answer, self._done, number, job))

    def _done(self, number: int, job: Job, _: object) -> None:
        """Send the outcome of a request, unless its report came before."""
        if self._jobs.get(number) is job:
            outcome = job.outcome()
            count, width, rows = row_buffers(outcome.rows)
            times = outcome.queue_seconds, outcome.inference_seconds
            ended = None
            if outcome.used.quotas is None:  # it was not charged, so nothing more has to be known of it
                ended = outcome.used
                del self._jobs[number]
                self._backend.end(self._first + number)
            self._send(frame("outcome", number, tuple(outcome.used), times, count, width, payload=rows), ended)

    def _send(self, parts: list[Buffer], ended: Used | None) -> None:
        """Send a result. Raises `RejectedError` if too many wait; a single one is always sent.

        `ended`: what a request used that has ended with this result, because it was not charged.
        """
        size, link = sum(map(len, parts)), self.messages
        if size <= _LARGE_BYTES and link.buffered <= _MOST_BUFFERED:
            link.send_frame(parts)
        elif link.large_bytes and link.large_bytes + size > self._most_unsent:
            raise RejectedError("responses_full", "other large responses wait to be sent", 1, ended)
        else:
            link.send_large(parts)

    def _answer(self, handler: Callable[..., None], number: int, *fields: Any) -> None:
        """Call a handler, and say if it rejects the request. No error may end the link, with all other requests."""
        try:
            handler(number, *fields)
        except RejectedError as error:
            self._reject(number, error)
        except Exception:
            log.exception("a request of an API process")
            self._reject(number, _INTERNAL)

    def _reject(self, number: int, error: RejectedError) -> None:
        if error.used is not None:
            self._jobs.pop(number, None)
        used = None if error.used is None else tuple(error.used)
        self.messages.send("rejected", number, error.reason, error.message, error.retry_after, used)

    def _report(self, number: int, in_vain: int, give_back: bool, wait: bool, caller: Any, size: int) -> None:
        """End a request, after it was charged for a body of `size` bytes, unless that is negative."""
        if size >= 0:
            self._backend.charge(self._first + number, caller_of(caller), size)
        elif number not in self._jobs:  # it has ended, and the message that says so is on its way
            return
        self._jobs[number] = None  # until it has ended: this can be called again, without `wait`
        report = self._backend.report(self._first + number, in_vain=in_vain, give_back=give_back, wait=wait)
        if report.done():
            self._reported(number, report)
        else:
            report.add_done_callback(partial(self._reported, number))

    def _reported(self, number: int, report: asyncio.Future[Used]) -> None:
        self._jobs.pop(number, None)
        self.messages.send("used", number, tuple(report.result()))

    def _end(self, number: int, in_vain: int, give_back: bool) -> None:
        """End a request whose outcome was sent."""
        self._jobs.pop(number, None)
        self._backend.end(self._first + number, in_vain=in_vain, give_back=give_back)

    def _start_page(self, number: int, path: str) -> None:
        task = asyncio.get_running_loop().create_task(self._answer_page(number, path))
        self._pages.add(task)
        task.add_done_callback(self._pages.discard)

    async def _answer_page(self, number: int, path: str) -> None:
        try:
            status, content, media_type = await self._page(path)
        except Exception:
            log.exception("the page %s", path)
            self._reject(number, _INTERNAL)
        else:
            self.messages.send("page", number, status, media_type, payload=[content])

    def _lost(self) -> None:
        for number in list(self._jobs):  # what they were charged stays
            self._jobs.pop(number)
            self._backend.report(self._first + number, wait=False)
        self._on_lost()


def caller_of(fields: Any) -> Caller:
    """Return the caller that a message names."""
    key_id, (requests, tokens), tenant, bulk, budgets = fields
    return Caller(key_id, (requests, tokens), tenant, bulk, tuple(Budget(*budget) for budget in budgets))
