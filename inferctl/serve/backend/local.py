"""The backend in this process."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from functools import partial

from inferctl.batching.batcher import AdmissionError
from inferctl.reading.rows import Tokens
from inferctl.serve.cache.vector_cache import VectorCache
from inferctl.serve.edge.errors import ApiError, at_capacity
from inferctl.serve.edge.key_limits import KeyLimits
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.scheduling.dispatcher import Dispatcher, EngineFailedError, EngineUnavailableError, RequestResult
from inferctl.serve.scheduling.engine_use import EngineUse
from inferctl.tenancy.access.key_file import ApiKey


class LocalBackend:
    """It is a `Backend`. Runs on the event loop. `limits`: None for a server that asks for no key."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        cache: VectorCache | None = None,
        limits: KeyLimits | None = None,
    ) -> None:
        self._dispatcher, self._metrics, self._cache, self._limits = dispatcher, metrics, cache, limits

    def charge(self, key: ApiKey, context: RequestContext) -> None:
        """Charge one request. Part of `Backend`."""
        if self._limits is not None:
            self._limits.charge(key, context)

    async def admit(self, context: RequestContext, _: int) -> None:
        """Do what `check_queue` does. Part of `Backend`."""
        self.check_queue(context)

    def check_queue(self, context: RequestContext) -> None:
        """Raise `ApiError` if the queue is full."""
        if self._cache is None:  # the cache may have the vectors, so a full queue does not rule a request out
            try:
                self._dispatcher.check_admission(bulk=context.priority == b"bulk", tenant=context.tenant)
            except AdmissionError as error:
                raise _rejection(error) from None

    async def compute(
        self, context: RequestContext, sequences: Sequence[Tokens], marks: Sequence[int] | None
    ) -> RequestResult:
        """Return the vectors of a request. Part of `Backend`."""
        future = self.start(context, sequences, marks)
        with contextlib.suppress(Exception):  # `finish` raises it
            await future
        return self.finish(context, future, sum(map(len, sequences)))

    def start(
        self, context: RequestContext, sequences: Sequence[Tokens], marks: Sequence[int] | None
    ) -> asyncio.Future[RequestResult]:
        """Do the first half of `compute`: return the future of the result. Cancelling it cancels the request."""
        tokens = sum(map(len, sequences))
        if context.charge is not None:
            context.charge.tokens(tokens, time.time())
        context.use = use = EngineUse()
        bulk = context.priority == b"bulk"
        submit = partial(self._dispatcher.submit, bulk=bulk, tenant=context.tenant)
        try:
            if self._cache is None or (marks is not None and not self._cache.marked):  # pairs are not cached
                return submit(sequences, marks, use=use)
        except AdmissionError as error:
            raise _rejection(error) from None
        except EngineUnavailableError as error:
            raise _unavailable(error) from None
        directives = context.cache_control
        run = self._cache.run(context.key_id, sequences, submit, use, marks=marks, bulk=bulk, directives=directives)
        return asyncio.get_running_loop().create_task(run)

    def finish(self, context: RequestContext, future: asyncio.Future[RequestResult], tokens: int) -> RequestResult:
        """Do the second half of `compute`: return the result of a future that is done. `tokens`: of the request."""
        try:
            result = future.result()
        except AdmissionError as error:
            raise _rejection(error) from None
        except EngineUnavailableError as error:
            raise _unavailable(error) from None
        except EngineFailedError as error:
            raise ApiError(500, f"the engine could not compute this request: {error}", code="engine_failed") from None
        use = context.use
        assert use is not None
        context.input_tokens, context.cached_tokens = tokens, tokens - use.tokens
        context.engine_seconds, context.use = use.seconds, None
        if result.non_finite:
            self._metrics.non_finite.inc(len(result.non_finite))
            message = f"the model returned NaN or infinity for input {min(result.non_finite)}"
            raise ApiError(500, message, code="non_finite")
        return result


def _unavailable(error: EngineUnavailableError) -> ApiError:
    return ApiError(503, str(error), code="engine_unavailable", headers={"retry-after": "1"})


def _rejection(error: AdmissionError) -> ApiError:
    return at_capacity(str(error), error.reason, max(1, math.ceil(error.retry_after)))
