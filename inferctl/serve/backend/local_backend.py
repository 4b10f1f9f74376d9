"""The backend in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from functools import partial
from typing import Any

from inferctl.serve.backend.charges import Charges, done
from inferctl.serve.cache.vector_cache import VectorCache
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.scheduling.dispatcher import Dispatcher, RequestResult
from inferctl.serve.work import Caller, Outcome, RejectedError, Used, Work
from inferctl.tenancy.access.limits import Limiter, LimitError


class Job:
    """A request that is computed. Awaiting it returns its `Outcome` or raises a `RejectedError`, and so does `outcome`.

    No task or future of its own is between it and the dispatcher: that would take a tenth of its time here.
    """

    __slots__ = ("_backend", "_number", "future")

    def __init__(self, backend: LocalBackend, number: int, future: asyncio.Future[RequestResult]) -> None:
        self._backend, self._number, self.future = backend, number, future

    def __await__(self) -> Generator[Any, None, Outcome]:
        try:
            yield from self.future.__await__()
        except RejectedError:
            return self.outcome()  # raises it with what the request used
        return self.outcome()

    def outcome(self) -> Outcome:
        """Return what came of it, when its future is done."""
        return self._backend.outcome(self._number, self.future)


class LocalBackend(Charges):
    """It is a `Backend`. Runs on the event loop."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        cache: VectorCache | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        super().__init__(limiter)
        self._dispatcher, self._metrics, self._cache = dispatcher, metrics, cache

    def admit(self, number: int, caller: Caller, size: int) -> asyncio.Future[RejectedError | None]:
        """Charge a request, and look at the queue. Part of `Backend`."""
        self.charge(number, caller, size)
        if self._cache is None:  # the cache may have the vectors, so a full queue does not rule a request out
            try:
                self._dispatcher.check_admission(bulk=caller.bulk, tenant=caller.tenant)
            except RejectedError as full:
                return done(full)
        return self._admitted

    def submit(self, number: int, work: Work) -> Job:
        """Charge the tokens of a request, and compute it. Part of `Backend`."""
        request, (caller, sequences, marks, _) = self._request(number), work
        request.tokens = sum(map(len, sequences))
        submit = partial(self._dispatcher.submit, bulk=caller.bulk, tenant=caller.tenant)
        try:
            if request.charge is not None:
                request.charge.tokens(request.tokens, time.time())
            if self._cache is None or (marks is not None and not self._cache.marked):  # pairs are not cached
                request.future = submit(sequences, marks, use=request.use)
            else:
                run = self._cache.run(work, submit, request.use)
                request.future = asyncio.get_running_loop().create_task(run)
        except (LimitError, RejectedError) as error:
            raise self._rejected(number, error) from None
        return Job(self, number, request.future)

    def outcome(self, number: int, future: asyncio.Future[RequestResult]) -> Outcome:
        """Return what came of a request whose future is done. Raises `RejectedError`."""
        try:
            result = future.result()
            if result.non_finite:
                self._metrics.non_finite.inc(len(result.non_finite))
                message = f"the model returned NaN or infinity for input {min(result.non_finite)}"
                raise RejectedError("non_finite", message)
        except RejectedError as error:
            raise self._rejected(number, error) from None
        request = self._requests[number]
        use, tokens = request.use, request.tokens
        used = Used(tokens, tokens - use.tokens, use.seconds, request.quotas())
        return Outcome(result.rows, used, result.queue_seconds, result.inference_seconds)
