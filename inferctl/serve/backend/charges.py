"""The requests in flight that are charged to keys, and what engines compute for them."""

from __future__ import annotations

import asyncio
import time
from functools import cached_property
from typing import Any

from inferctl.serve.scheduling.engine_use import EngineUse
from inferctl.serve.work import LIMIT_EXCEEDED, Caller, RejectedError, Used
from inferctl.tenancy.access.budgets import BudgetError, Budgets, BudgetUse, Hold
from inferctl.tenancy.access.limits import NO_LIMITS, Charge, KeyUsage, Limiter, LimitError, Quotas


class InFlight:
    """One request. `future`: of its computation, which has `tokens`; `use`: what engines computed so far.

    `hold`: of its budgets; `budget`: their state, if it has none.
    """

    __slots__ = ("budget", "charge", "future", "hold", "key", "tokens", "use")

    def __init__(self) -> None:
        self.key: KeyUsage | None = None
        self.charge: Charge | None = None
        self.future: asyncio.Future[Any] | None = None
        self.use, self.tokens = EngineUse(), 0
        self.hold: Hold | None = None
        self.budget: BudgetUse | None = None

    def used(self) -> Used:
        """Return what it used until its end, which settles its budgets."""
        future, tokens = self.future, self.use.tokens
        if future is not None and future.done() and not future.cancelled() and future.exception() is None:
            tokens = self.tokens
        return self.settled(tokens)

    def settled(self, tokens: int) -> Used:
        """Settle the budgets of a request that used `tokens`, of which engines computed `use`."""
        use = self.use
        if self.hold is not None:
            self.budget = self.hold.settle(use.tokens, tokens - use.tokens, 0)
        return Used(tokens, tokens - use.tokens, use.seconds, self.quotas(), self.budget)

    def quotas(self) -> Quotas | None:
        """Return what remains of the limits of its key."""
        return None if self.key is None else self.key.quotas(time.time())


class Charges:
    """The requests in flight of a server, by number. It is an `EdgeBackend`. Runs on the event loop."""

    def __init__(self, limiter: Limiter | None = None, budgets: Budgets | None = None) -> None:
        self._limiter, self._budgets = limiter or Limiter(), budgets or Budgets()
        self._requests: dict[int, InFlight] = {}

    @cached_property
    def _admitted(self) -> asyncio.Future[RejectedError | None]:
        return done(None)  # the same for all

    def admit(
        self, number: int, caller: Caller, size: int, model: int | None = 0
    ) -> asyncio.Future[RejectedError | None]:
        """Charge a request. Part of `EdgeBackend`."""
        self.charge(number, caller, size)
        return self._admitted

    def charge(self, number: int, caller: Caller, size: int) -> None:
        """Do what `admit` does for the limits."""
        if caller.limits != NO_LIMITS:
            now, request = time.time(), self._request(number)
            assert caller.id is not None
            try:
                if request.charge is None:
                    request.key = self._limiter.usage(caller.id, caller.limits, now)
                    request.charge = Charge(request.key, now)
                request.charge.charge_body(size, now)
            except LimitError as error:
                raise self._rejected(number, error) from None
        if caller.budgets:
            self._request(number)
            try:
                self._budgets.check(caller.budgets, time.time())
            except BudgetError as error:
                raise self._rejected(number, error) from None

    def _hold(self, number: int, caller: Caller, model: str, prompt: int, output: int) -> None:
        """Reserve the most that a request can cost, of its key and its model. Raises `BudgetError`."""
        if budgets := caller.budgets + self._budgets.of_model(model):
            request = self._request(number)
            request.hold = self._budgets.reserve(budgets, model, prompt, output, time.time())

    def report(
        self, number: int, *, in_vain: int = 0, give_back: bool = False, wait: bool = True
    ) -> asyncio.Future[Used]:
        """End a request. Part of `EdgeBackend`."""
        request = self._requests.get(number)
        if request is None:
            return done(Used())
        if request.future is not None:
            request.future.cancel()
        if not (wait and request.use.pending):
            return done(self._reported(number, in_vain, give_back))
        result: asyncio.Future[Used] = asyncio.get_running_loop().create_future()

        def settled(_: object) -> None:
            if not result.done():  # else, or if the request is unknown now, another call has ended it
                known = number in self._requests
                result.set_result(self._reported(number, in_vain, give_back) if known else Used())

        request.use.settled().add_done_callback(settled)
        return result

    def end(self, number: int, *, in_vain: int = 0, give_back: bool = False) -> None:
        """End a request. Part of `EdgeBackend`."""
        request = self._requests.pop(number, None)
        if request is None:
            return
        if request.hold is not None and request.hold.settled is None:
            request.used()
        if request.charge is not None:
            if in_vain:
                request.charge.in_vain(in_vain, time.time())
            request.charge.close(give_back=give_back, computed=request.use.tokens)

    def _reported(self, number: int, in_vain: int, give_back: bool) -> Used:
        """End a request, and return what it used."""
        used = self._requests[number].used()
        self.end(number, in_vain=in_vain, give_back=give_back)
        return used

    def _request(self, number: int) -> InFlight:
        """Return what is known of a request, also of a new one."""
        if (found := self._requests.get(number)) is None:
            found = self._requests[number] = InFlight()
        return found

    def _rejected(self, number: int, error: LimitError | BudgetError | RejectedError) -> RejectedError:
        """Return why a request is refused. It ends with that, unless engines still compute something for it."""
        if isinstance(error, BudgetError):
            self._requests[number].budget = error.use
            error = RejectedError(error.code, str(error), error.retry_after)
        if isinstance(error, LimitError):
            error = RejectedError(LIMIT_EXCEEDED, str(error), error.retry_after)
        used = None if self._requests[number].use.pending else self._reported(number, 0, True)
        return RejectedError(error.reason, error.message, error.retry_after, used)


class GenerationCharges(Charges):
    """Of a server that knows the tokens of a request at its end, when vLLM has counted them."""

    @property
    def models_have_budgets(self) -> bool:
        """Whether a request of any key may have a budget."""
        return self._budgets.of_models

    def reserve(self, number: int, tokens: int) -> Quotas | None:
        """Keep the most tokens that a request can need. Return what remains of the limits. Raises `RejectedError`."""
        request, now = self._requests.get(number), time.time()
        if request is None or request.charge is None or request.key is None:
            return None
        try:
            request.charge.reserve(tokens, now)
        except LimitError as error:
            raise self._rejected(number, error) from None
        return request.key.quotas(now)

    def hold(self, number: int, caller: Caller, model: str, prompt: int, output: int) -> BudgetUse | None:
        """Reserve the most that a request can cost, and return the state of its budget. Raises `RejectedError`."""
        try:
            self._hold(number, caller, model, prompt, output)
        except BudgetError as error:
            raise self._rejected(number, error) from None
        request = self._requests.get(number)
        return request.hold.use() if request is not None and request.hold is not None else None

    def settle(self, number: int, prompt: int, cached: int, output: int = 0) -> BudgetUse | None:
        """Charge the tokens of a request in place of the reserved ones. `cached`: those of the prompt."""
        request = self._requests.get(number)
        if request is None:
            return None
        if request.charge is not None:
            request.charge.settle(prompt + output, time.time())
            request.use.add(prompt + output - cached, 0.0)
        if request.hold is not None:
            request.budget = request.hold.settle(prompt - cached, cached, output)
        return request.budget


def done(value: Any) -> asyncio.Future[Any]:
    """Return a future that has its result."""
    future = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future
