"""Counts what vLLM's engine computes for a request, below all of vLLM's APIs.

Every API of vLLM calls `EngineClient.generate`, and each task that it starts inherits the context of its request. So
one counter is exact for chat, completions, Responses and Messages, also for a client that leaves: `abort` makes the
engine return what it generated until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any

_ABORT_INTERVAL_S = 0.05  # a part of a request may reach the engine after the first call of `abort`
_current: ContextVar[EngineUsage | None] = ContextVar("engine_usage", default=None)


class EngineUsage:
    """The tokens of one request. `cached`: those of its prompts that the prefix cache had.

    `begun`: whether the engine received a part of it. `first_token`: the monotonic time of the first one, None before,
    or if the engine reports all tokens at the end.
    """

    def __init__(self) -> None:
        self.prompt = self.output = self.cached = 0
        self.begun = False
        self.first_token: float | None = None
        self._running: set[str] = set()  # the ids for the engine

    def watch(self) -> None:
        """Count what the current task and those that it starts ask of the engine."""
        _current.set(self)

    async def abort(self, engine: Any) -> None:
        """End all that runs. Returns when the engine has reported what it generated."""
        while self._running:
            await engine.abort(list(self._running))
            await asyncio.sleep(_ABORT_INTERVAL_S)

    async def counted(self, outputs: AsyncGenerator[Any, None], sampling: Any, request_id: str) -> AsyncGenerator[Any]:
        """Yield the `RequestOutput`s of one prompt, which have the new tokens of some sequences, or all at the end."""
        self.begun, first = True, True
        self._running.add(request_id)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if first:
                        first = False
                        self._count_prompt(output, sampling)
                    self.output += sum(len(each.token_ids) for each in output.outputs)
                    yield output
        finally:
            self._running.discard(request_id)

    def _count_prompt(self, output: Any, sampling: Any) -> None:
        at_the_end = sampling.output_kind.name == "FINAL_ONLY"
        self.prompt += len(output.prompt_token_ids or ()) + len(output.encoder_prompt_token_ids or ())
        # Of several sequences, vLLM then reports the cache hits of the last one, which finds what the first computed.
        if not (at_the_end and sampling.n > 1):
            self.cached += output.num_cached_tokens or 0
        if not at_the_end and self.first_token is None:
            self.first_token = time.monotonic()


def install(engine: Any) -> None:
    """Count what `engine`, vLLM's `EngineClient`, generates for requests that `watch`."""
    generate: Callable[..., AsyncGenerator[Any, None]] = engine.generate

    def counted(prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncGenerator[Any, None]:
        outputs, usage = generate(prompt, sampling_params, request_id, **options), _current.get()
        return outputs if usage is None else usage.counted(outputs, sampling_params, request_id)

    engine.generate = counted
