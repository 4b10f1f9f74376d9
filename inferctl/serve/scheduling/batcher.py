"""The request queue: admission control and the choice of the next batch.

It knows no HTTP and no torch. It has no clock: the time is an argument, and the same calls give the same batches.

The queue is counted in tokens. A request is accepted or rejected as a whole; its sequences may run in several batches.
Interactive requests run before bulk requests. A batch starts with the oldest interactive sequence, then adds sequences
of similar length from a bounded window. Bulk sequences past the maximum wait get a reserved share, so nothing starves.
The batcher never delays a batch to fill it: a batch holds what is queued when the engine is free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from inferctl.serve.scheduling.latency_model import LatencyModel

# A request completes with its last batch, and later requests fill that batch too. So predictions are multiplied by a
# safety factor, which converges where nine of ten responses are in time: a late one raises it, others lower it.
_RAISE, _LOWER = 1.02, 1.02 ** (-1 / 9)
_MAX_SAFETY_FACTOR = 4.0
# A batch smaller than this (tokens) is not worth a slot of its own while it could share one.
_MIN_SPLIT_TOKENS = 64


@dataclass(frozen=True)
class QueueLimits:
    """The limits of the queue.

    `batch_tokens`: the largest batch. `queue_tokens`: the largest queue; bulk requests can use half of it. `window`:
    how many queued sequences are considered for a batch. `max_wait_s`: sequences past it run in arrival order, and bulk
    sequences past it get `bulk_share` of the tokens. `slo_s`: interactive requests with a longer predicted latency are
    rejected; None turns this check off.
    """

    batch_tokens: int
    queue_tokens: int
    window: int = 256
    max_wait_s: float = 1.0
    bulk_share: float = 0.25
    slo_s: float | None = None

    def with_batch_tokens(self, tokens: int) -> QueueLimits:
        """Return the same limits with another batch size."""
        return replace(self, batch_tokens=tokens)


class QueuedSequence(NamedTuple):
    """A sequence in the queue: its request, its position in the request, its length in tokens, its arrival time (s)."""

    request: int
    position: int
    tokens: int
    arrived: float
    bulk: bool = False


class AdmissionError(Exception):
    """The request is rejected. `reason` is `queue_full`, or `slo` if it would be late. `retry_after` is in seconds."""

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass
class PriorityQueue:
    """The queued sequences of one priority, in arrival order. Cancelled ones stay until they are reached."""

    sequences: deque[QueuedSequence] = field(default_factory=deque)
    tokens: int = 0
    count: int = 0


@dataclass
class _QueuedRequest:
    """How many sequences and tokens of a request are queued, and in which queue."""

    queue: PriorityQueue
    count: int = 0
    tokens: int = 0


@dataclass
class Batcher:
    """The queue in front of `engines` equal engines, or of an engine that runs `engines` batches at a time."""

    limits: QueueLimits
    latency: LatencyModel = field(default_factory=LatencyModel)
    engines: int = 1
    _interactive: PriorityQueue = field(default_factory=PriorityQueue, init=False)
    _bulk: PriorityQueue = field(default_factory=PriorityQueue, init=False)
    # By request number. A sequence whose request is missing here was cancelled.
    _requests: dict[int, _QueuedRequest] = field(default_factory=dict, init=False)
    _safety_factor: float = field(default=1.0, init=False)
    _bulk_credit: float = field(default=0.0, init=False)  # tokens that bulk can take before interactive requests

    def __len__(self) -> int:
        return self._interactive.count + self._bulk.count

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue."""
        return self._interactive.tokens + self._bulk.tokens

    def submit(
        self, request: int, lengths: Sequence[int], now: float, *, bulk: bool = False, busy_s: float = 0.0
    ) -> float:
        """Queue all sequences of a request and return its predicted latency (s). Raises `AdmissionError` like `check`.

        `busy_s`: seconds until an engine is free.
        """
        total = sum(lengths)
        predicted = self.check(total, max(lengths), bulk=bulk, busy_s=busy_s)
        queue = self._queue(bulk)
        queue.sequences.extend(
            QueuedSequence(request, index, tokens, now, bulk) for index, tokens in enumerate(lengths)
        )
        self._add(queue, request, len(lengths), total)
        return predicted

    def observe(self, predicted: float, seconds: float) -> None:
        """Adjust the safety factor by one response: its predicted and its measured latency (s)."""
        # Predictions far below the SLO do not affect admission.
        if self.limits.slo_s is not None and predicted > self.limits.slo_s / (2 * _MAX_SAFETY_FACTOR):
            self._safety_factor *= _RAISE if seconds > self._safety_factor * predicted else _LOWER
            self._safety_factor = min(max(self._safety_factor, 1.0), _MAX_SAFETY_FACTOR)

    def check(self, tokens: int, longest: int = 1, *, bulk: bool = False, busy_s: float = 0.0) -> float:
        """Return the predicted latency (s) of a request. Raises `AdmissionError` if the queue cannot accept it.

        `tokens`: the tokens of the request. `longest`: those of its longest sequence. `busy_s`: seconds until an engine
        is free. An empty queue accepts any request, also one above the limits; otherwise it would be rejected forever.
        """
        queue, half = self._queue(bulk), self.limits.queue_tokens // 2
        limit = half if bulk else self.limits.queue_tokens - min(self._bulk.tokens, half)
        wait = busy_s + self.expected_wait(bulk=bulk)
        if queue.tokens and queue.tokens + tokens > limit:
            message = f"the queue has {queue.tokens} of at most {limit} tokens, and the request has {tokens}"
            raise AdmissionError("queue_full", message, wait if self.latency.known else 1.0)
        # The sequences run on all engines that are free by then. One sequence runs on one engine.
        parallel = max(1, min(self.engines, tokens // max(_MIN_SPLIT_TOKENS, longest)))
        predicted = wait + self.latency.seconds(tokens, self.limits.batch_tokens) / parallel
        if self.limits.slo_s is None or bulk or not wait:
            return predicted
        late = predicted - self.limits.slo_s / self._safety_factor
        if late > 0:
            raise AdmissionError("slo", f"predicted latency exceeds the SLO by {late:.2g} s", min(late, wait))
        return predicted

    def expected_wait(self, *, bulk: bool = True) -> float:
        """Return the seconds until the queue is processed; 0 before the first observation.

        `bulk` False counts only what runs before a new interactive request.
        """
        tokens = self.waiting_tokens if bulk else self._interactive.tokens
        return self.latency.seconds(tokens, self.limits.batch_tokens) / max(1, self.engines)

    def cancel(self, request: int) -> None:
        """Remove the queued sequences of a request. Unknown requests are ignored."""
        entry = self._requests.pop(request, None)
        if entry is None:
            return
        queue = entry.queue
        queue.count -= entry.count
        queue.tokens -= entry.tokens
        if len(queue.sequences) > 2 * queue.count + self.limits.window:
            queue.sequences = deque(item for item in queue.sequences if item.request in self._requests)

    def next_batch(self, now: float, slots: int = 1) -> list[QueuedSequence]:
        """Remove the next batch from the queue and return it; empty if nothing is queued.

        `slots`: how many batches could start now; this batch gets its part of the queue. The batch keeps the token
        limit, except that a single sequence may exceed it.
        """
        part = max(_MIN_SPLIT_TOKENS, math.ceil(self.waiting_tokens / slots)) if slots > 1 else self.waiting_tokens
        budget = min(self.limits.batch_tokens, part)
        batch = self._take_overdue_bulk(now, budget)
        for queue in (self._interactive, self._bulk):
            remaining = budget - sum(item.tokens for item in batch)
            batch += self._take(queue, now, remaining, allow_oversized=not batch)
        return batch

    def has_full_batch(self) -> bool:
        """Return whether more requests could not make the next batch larger."""
        return self.waiting_tokens >= self.limits.batch_tokens or len(self) >= self.limits.window

    def requeue(self, batch: Sequence[QueuedSequence]) -> None:
        """Put sequences that no engine started back at the front, in order. The queue limit does not apply."""
        for item in reversed(batch):
            queue = self._queue(item.bulk)
            queue.sequences.appendleft(item)
            self._add(queue, item.request, 1, item.tokens)

    def _queue(self, bulk: bool) -> PriorityQueue:
        return self._bulk if bulk else self._interactive

    def _take_overdue_bulk(self, now: float, budget: int) -> list[QueuedSequence]:
        """Remove the bulk sequences that run before interactive ones, and return them.

        While the oldest bulk sequence is past the maximum wait, each batch adds `bulk_share` of its tokens to a credit.
        A sequence runs once the credit pays for its tokens.
        """
        oldest = self._oldest(self._bulk)
        if oldest is None or not self._interactive.count or now - oldest.arrived < self.limits.max_wait_s:
            self._bulk_credit = 0.0
            return []
        self._bulk_credit += self.limits.bulk_share * budget
        batch: list[QueuedSequence] = []
        while (item := self._oldest(self._bulk)) and (not batch or item.tokens <= budget):
            price = min(item.tokens, self.limits.batch_tokens)
            if price > self._bulk_credit:
                break
            batch.append(self._bulk.sequences.popleft())
            self._remove(item)
            self._bulk_credit -= price
            budget -= price
        return batch

    def _take(self, queue: PriorityQueue, now: float, budget: int, *, allow_oversized: bool) -> list[QueuedSequence]:
        """Remove sequences that fit into `budget` tokens from the window of a queue, and return them.

        Order: the oldest, those past the maximum wait, then those closest to the oldest in length. With
        `allow_oversized` the first one may exceed the budget.
        """
        if budget <= 0:
            return []
        window: list[QueuedSequence] = []
        while len(window) < self.limits.window and self._oldest(queue):
            window.append(queue.sequences.popleft())
        order = list(range(len(window)))
        if sum(item.tokens for item in window) > budget:
            oldest, due = window[0], now - self.limits.max_wait_s
            order.sort(
                key=lambda i: 0 if not i or window[i].arrived <= due else 1 + abs(window[i].tokens - oldest.tokens)
            )
        taken: list[int] = []
        for i in order:
            if window[i].tokens <= budget or (allow_oversized and not taken):
                taken.append(i)
                budget -= window[i].tokens
        rest = set(order).difference(taken)
        queue.sequences.extendleft(window[i] for i in sorted(rest, reverse=True))
        for i in taken:
            self._remove(window[i])
        return [window[i] for i in taken]

    def _oldest(self, queue: PriorityQueue) -> QueuedSequence | None:
        while queue.sequences and queue.sequences[0].request not in self._requests:
            queue.sequences.popleft()
        return queue.sequences[0] if queue.sequences else None

    def _add(self, queue: PriorityQueue, request: int, count: int, tokens: int) -> None:
        """Count sequences that joined the queue."""
        entry = self._requests.setdefault(request, _QueuedRequest(queue))
        for counter in (queue, entry):
            counter.count += count
            counter.tokens += tokens

    def _remove(self, item: QueuedSequence) -> None:
        """Count a sequence that left the queue."""
        entry = self._requests[item.request]
        for counter in (entry.queue, entry):
            counter.count -= 1
            counter.tokens -= item.tokens
        if not entry.count:
            del self._requests[item.request]
