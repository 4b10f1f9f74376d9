"""The backend in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

from inferctl.serve.backend.charges import Charges, done
from inferctl.serve.cache.vector_cache import VectorCache
from inferctl.serve.scheduling.dispatcher import Dispatcher, RequestResult
from inferctl.serve.work import Caller, Outcome, RejectedError, Work
from inferctl.tenancy.access.budgets import BudgetError, Budgets
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


class Stack(NamedTuple):
    """What computes for one model. `name`: of the model, in prices."""

    dispatcher: Dispatcher
    cache: VectorCache | None = None
    name: str = ""


class LocalBackend(Charges):
    """It is a `Backend`. `stacks`: of the models, in their order. Runs on the event loop."""

    def __init__(self, stacks: Sequence[Stack], limiter: Limiter | None = None, budgets: Budgets | None = None) -> None:
        super().__init__(limiter, budgets)
        self._stacks = stacks

    def admit(
        self, number: int, caller: Caller, size: int, model: int | None = 0
    ) -> asyncio.Future[RejectedError | None]:
        """Charge a request, and look at the queue. Part of `Backend`."""
        self.charge(number, caller, size)
        # The cache may have the vectors, so a full queue does not rule a request out.
        if model is not None and (stack := self._stacks[model]).cache is None:
            try:
                stack.dispatcher.check_admission(bulk=caller.bulk, tenant=caller.tenant)
            except RejectedError as full:
                return done(full)
        return self._admitted

    def submit(self, number: int, work: Work) -> Job:
        """Charge the tokens of a request, and compute it. Part of `Backend`."""
        request, (caller, sequences, marks, _, model) = self._request(number), work
        dispatcher, cache, name = self._stacks[model]
        request.tokens = sum(map(len, sequences))
        submit = partial(dispatcher.submit, bulk=caller.bulk, tenant=caller.tenant)
        try:
            if request.charge is not None:
                request.charge.tokens(request.tokens, time.time())
            self._hold(number, caller, name, request.tokens, 0)
            if cache is None or (marks is not None and not cache.marked):  # pairs are not cached
                request.future = submit(sequences, marks, use=request.use)
            else:
                run = cache.run(work, submit, request.use)
                request.future = asyncio.get_running_loop().create_task(run)
        except (LimitError, BudgetError, RejectedError) as error:
            raise self._rejected(number, error) from None
        return Job(self, number, request.future)

    def outcome(self, number: int, future: asyncio.Future[RequestResult]) -> Outcome:
        """Return what came of a request whose future is done. Raises `RejectedError`."""
        try:
            result = future.result()
            if result.non_finite:
                message = f"the model returned NaN or infinity for input {min(result.non_finite)}"
                raise RejectedError("non_finite", message)
        except RejectedError as error:
            raise self._rejected(number, error) from None
        request = self._requests[number]
        used = request.settled(request.tokens)
        return Outcome(result.rows, used, result.queue_seconds, result.inference_seconds)
