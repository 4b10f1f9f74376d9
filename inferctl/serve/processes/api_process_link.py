"""The backend's side of one API process: runs its requests, and knows what it holds."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from inferctl.serve.backend.local import LocalBackend
from inferctl.serve.edge.access import limit_exceeded
from inferctl.serve.edge.errors import ApiError, at_capacity
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.processes import frames
from inferctl.serve.processes.frames import Kind, Link, Quotas, Reply, Submission
from inferctl.serve.scheduling.dispatcher import RequestResult
from inferctl.tenancy.access.key_file import limits_alone
from inferctl.tenancy.access.limits import LimitError

log = logging.getLogger("inferctl.api_processes")

# Results above this size, and those of a process that has not read so much, are sent in parts, and their bytes bounded.
_LARGE_BYTES, _MOST_BUFFERED = 1 << 20, 1 << 22
_INTERNAL = ApiError(500, "internal error; see the server log", code="internal_error")


class ApiProcessLink:
    """Runs the requests of one API process. `page(path)` answers for the whole server.

    `on_control(kind, numbers)` gets the frames about connections and life, `on_stats` the content of STATS frames.
    `most_unsent`: bytes of large results that may wait until the API process reads them.
    """

    def __init__(
        self,
        backend: LocalBackend,
        page: Callable[[str], Awaitable[Page]],
        on_control: Callable[[Kind, tuple[int, ...]], None],
        on_stats: Callable[[Any], None],
        on_lost: Callable[[], None],
        most_unsent: int,
    ) -> None:
        self._most_unsent = most_unsent
        self._backend, self._page = backend, page
        self._on_control, self._on_stats, self._on_lost = on_control, on_stats, on_lost
        self._computing: dict[int, asyncio.Future[RequestResult]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._charged: dict[int, RequestContext] = {}  # until the API process says how they ended
        self.fatal: tuple[str, str | None] | None = None  # why the process could not start, and a hint
        self.link = Link(self._on_frame, self._lost)

    @property
    def in_flight(self) -> int:
        """How many requests the backend computes for the API process."""
        return len(self._computing)

    def _on_frame(self, kind: Kind, body: bytes) -> None:
        if kind is Kind.SUBMIT:
            self._submit(frames.unpack_submit(body))
        elif kind is Kind.ADMIT:
            self._admit(*json.loads(body))
        elif kind is Kind.CANCEL:
            (number,) = frames.unpack_numbers(body)
            if future := self._computing.get(number):
                future.cancel()
            # Else its RESULT or REJECT is sent, or will be.
        elif kind is Kind.CLOSE:
            self._close(*frames.unpack_numbers(body))
        elif kind is Kind.CHARGE:
            self._charge(*json.loads(body))
        elif kind is Kind.PAGE:
            number, path = json.loads(body)
            self._start(number, self._answer(number, path))
        elif kind is Kind.STATS:
            self._on_stats(json.loads(body))
        elif kind is Kind.FATAL:
            self.fatal = tuple(json.loads(body))
        else:
            self._on_control(kind, frames.unpack_numbers(body))

    def _start(self, number: int, work: Any) -> None:
        task = self._tasks[number] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    def _context(self, number: int, key_id: str | None, bulk: bool, shared: bool) -> RequestContext:
        """Return the context of a request of a key: the one that was charged, if it was."""
        context = self._charged.get(number) or RequestContext("")
        context.priority = b"bulk" if bulk else b""
        context.key_id = key_id or None
        context.tenant = context.key_id if shared else None
        return context

    def _submit(self, submission: Submission) -> None:
        """Start a request. There is no task for it: that would take a fifth of its time here."""
        context = self._context(submission.id, submission.key_id, submission.bulk, submission.shared)
        context.cache_control = submission.directives
        try:
            future = self._backend.start(context, submission.sequences, submission.marks)
        except (ApiError, LimitError) as error:
            self._reject(submission.id, context, error)
            return
        except Exception:  # it must not end the link, with all other requests
            log.exception("a request of an API process")
            self._reject(submission.id, context, _INTERNAL)
            return
        self._computing[submission.id] = future
        tokens = sum(map(len, submission.sequences))
        future.add_done_callback(partial(self._done, submission.id, context, tokens))

    def _done(self, number: int, context: RequestContext, tokens: int, future: asyncio.Future[RequestResult]) -> None:
        """Send the result of a request."""
        del self._computing[number]
        if future.cancelled():
            self._start(number, self._end(number, context))
            return
        try:
            result = self._backend.finish(context, future, tokens)
            reply = Reply(number, result, context.cached_tokens, context.engine_seconds, _quotas(context))
            self._send_result(frames.pack_result(reply))
        except ApiError as error:
            self._start(number, self._fail(number, context, error))
        except Exception:
            log.exception("a request of an API process")
            self._start(number, self._fail(number, context, _INTERNAL))

    def _send_result(self, frame: Sequence[frames.Buffer]) -> None:
        """Send a result. Raises `ApiError` if too many wait; a single one is always sent."""
        size, link = sum(map(len, frame)), self.link
        if size <= _LARGE_BYTES and link.buffered <= _MOST_BUFFERED:
            link.send(b"".join(frame))
        elif link.large_bytes and link.large_bytes + size > self._most_unsent:
            raise at_capacity("other large responses wait to be sent", "responses_full", 1)
        else:
            link.send_large(frame)

    async def _fail(self, number: int, context: RequestContext, error: ApiError) -> None:
        """Send the error of a request when engines compute nothing more for it."""
        if context.use is not None:
            await context.use.settled()
            context.input_tokens, context.engine_seconds = context.use.tokens, context.use.seconds
        self._reject(number, context, error)

    def _reject(self, number: int, context: RequestContext, error: ApiError | LimitError) -> None:
        if isinstance(error, LimitError):
            error = limit_exceeded(error)
        tokens, cached = context.input_tokens, context.cached_tokens
        computed = tokens, cached, context.engine_seconds
        self.link.send(frames.pack_reject(number, error, _quotas(context), computed))

    async def _end(self, number: int, context: RequestContext) -> None:
        """Say what engines computed for a request whose client left, or whose API process ended."""
        tokens, seconds = 0, 0.0
        if (use := context.use) is not None:
            await use.settled()
            tokens, seconds = use.tokens, use.seconds
        self.link.send(frames.pack_json(Kind.ENDED, [number, tokens, seconds]))

    def _admit(self, number: int, key_id: str | None, bulk: bool, shared: bool) -> None:
        context = self._context(number, key_id, bulk, shared)
        self._answer_with(number, context, lambda: self._backend.check_queue(context))

    def _charge(self, number: int, key: Sequence[Any], size: int) -> None:
        """Charge a request, if it was not yet, and the least that its body costs."""
        context = self._charged.get(number) or RequestContext("")

        def charge() -> None:
            if context.charge is None:
                self._backend.charge(limits_alone(*key), context)
            if context.charge is not None:
                self._charged[number] = context
                context.charge.charge_body(size, time.time())

        self._answer_with(number, context, charge)

    def _close(self, number: int, give_back: int, computed: int, in_vain: int) -> None:
        if (context := self._charged.pop(number, None)) and context.charge is not None:
            context.charge.in_vain(in_vain, time.time())
            context.charge.close(give_back=bool(give_back), computed=computed)

    def _answer_with(self, number: int, context: RequestContext, check: Callable[[], None]) -> None:
        try:
            check()
        except (ApiError, LimitError) as error:
            self._reject(number, context, error)
        except Exception:
            log.exception("a request of an API process")
            self._reject(number, context, _INTERNAL)
        else:
            self.link.send(frames.pack_json(Kind.ADMITTED, [number, _quotas(context)]))

    async def _answer(self, number: int, path: str) -> None:
        try:
            page = await self._page(path)
        except Exception:
            log.exception("the page %s", path)
            page = 500, _INTERNAL.body(), "application/json"
        status, content, media_type = page
        self.link.send(frames.pack_json(Kind.ANSWER, [number, status, content.decode(), media_type]))

    def _lost(self) -> None:
        for future in list(self._computing.values()):
            future.cancel()
        self._charged.clear()  # what they were charged stays
        self._on_lost()


def _quotas(context: RequestContext) -> Quotas | None:
    return context.usage.quotas(time.time()) if context.usage is not None else None
