"""Which waiting sequences form the next batch. Knows no HTTP, no torch and no clock of its own: time comes in as an argument.

The queue is counted in tokens. A request is taken whole or refused whole; its sequences may run in several batches. The oldest sequence always
goes first, then younger ones that still fit, looked for in a bounded window: nothing starves, and batches fill up. There is no waiting
window: a batch is as large as what happens to wait when the engine is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Limits:
    """`batch_tokens`: of one batch at most. `queue_tokens`: waiting at most. `window`: sequences looked at to fill a batch."""

    batch_tokens: int
    queue_tokens: int
    window: int = 256

    def with_batch_tokens(self, tokens: int) -> Limits:
        """The same limits with another batch size."""
        return replace(self, batch_tokens=tokens)


@dataclass(frozen=True)
class Work:
    """One sequence of a request. `tokens` is its length, `attempt` counts from 0."""

    request: int
    index: int
    tokens: int
    arrived: float
    attempt: int = 0


class QueueFullError(Exception):
    """The request does not fit into the queue; `retry_after` is when to come back, in seconds."""

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(f"{waiting} tokens are waiting, the limit is {limit}")
        self.waiting, self.limit, self.retry_after = waiting, limit, retry_after


@dataclass
class Batcher:
    """The queue of one engine. Deterministic: the same calls give the same batches."""

    limits: Limits
    waiting_tokens: int = field(default=0, init=False)
    _queue: deque[Work] = field(default_factory=deque, init=False)
    _pending: dict[int, int] = field(default_factory=dict, init=False)  # request -> its sequences in the queue
    _rate: float | None = field(default=None, init=False)  # tokens per second, smoothed

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, request: int, lengths: Sequence[int], now: float) -> None:
        """Queue all sequences of a request. Raises `QueueFullError` when they do not fit; an empty queue takes any request."""
        total = sum(lengths)
        if self.waiting_tokens and self.waiting_tokens + total > self.limits.queue_tokens:
            raise QueueFullError(self.waiting_tokens, self.limits.queue_tokens, self.expected_wait())
        self._queue.extend(Work(request, index, tokens, now) for index, tokens in enumerate(lengths))
        self._pending[request] = len(lengths)
        self.waiting_tokens += total

    def cancel(self, request: int) -> None:
        """Drop the sequences of a request that still wait. Unknown requests are ignored."""
        if self._pending.pop(request, 0):
            dropped = [work for work in self._queue if work.request == request]
            self._queue = deque(work for work in self._queue if work.request != request)
            self.waiting_tokens -= sum(work.tokens for work in dropped)

    def next_batch(self) -> list[Work]:
        """Take the next batch out of the queue; empty when nothing waits. Its sum of tokens keeps the limit unless one sequence alone is over it."""
        if not self._queue:
            return []
        batch: list[Work] = []
        skipped: list[Work] = []
        room = self.limits.batch_tokens
        for _ in range(min(self.limits.window, len(self._queue))):
            work = self._queue.popleft()
            if work.tokens <= room or not batch:
                batch.append(work)
                room -= work.tokens
                self._leave(work)
            else:
                skipped.append(work)
            if room <= 0:
                break
        self._queue.extendleft(reversed(skipped))
        return batch

    def has_full_batch(self) -> bool:
        """Whether waiting longer could not make the next batch larger."""
        return self.waiting_tokens >= self.limits.batch_tokens or len(self._queue) >= self.limits.window

    def requeue(self, batch: Sequence[Work]) -> None:
        """Put a batch that was lost with its engine back in front, in order, each sequence with one attempt more. The queue limit does not apply."""
        for work in reversed(batch):
            self._queue.appendleft(Work(work.request, work.index, work.tokens, work.arrived, work.attempt + 1))
            self._pending[work.request] = self._pending.get(work.request, 0) + 1
            self.waiting_tokens += work.tokens

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a finished batch how fast the engine is."""
        if seconds > 0:
            rate = tokens / seconds
            self._rate = rate if self._rate is None else 0.8 * self._rate + 0.2 * rate

    def expected_wait(self) -> float:
        """Seconds until what waits now is done, from the speed seen so far; 1 before anything was seen."""
        return self.waiting_tokens / self._rate if self._rate else 1.0

    def oldest(self) -> float | None:
        """When the sequence at the head arrived; None when nothing waits."""
        return self._queue[0].arrived if self._queue else None

    def _leave(self, work: Work) -> None:
        self.waiting_tokens -= work.tokens
        left = self._pending[work.request] - 1
        if left:
            self._pending[work.request] = left
        else:
            del self._pending[work.request]
