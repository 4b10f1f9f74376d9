"""The request queue: admission control and the choice of the next batch. It has no clock: the time is an argument.

The queue is counted in tokens. A request is accepted or rejected as a whole; its sequences may run in several batches.
Interactive requests run before bulk requests, which never make their batches longer. A batch starts with the oldest
sequence, then adds sequences of similar length from a bounded window. If no bulk sequence ran for a while, some run
with interactive ones, so nothing starves. The batcher never delays a batch to fill it: a batch holds what is queued
when the engine is free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from inferctl.batching.fairness import SHARE, exceeds_share
from inferctl.batching.latency_model import LatencyModel

# A request completes with its last batch, and later requests fill that batch too. So predictions are multiplied by a
# safety factor, which converges where nine of ten responses are in time: a late one raises it, others lower it.
_RAISE, _LOWER = 1.02, 1.02 ** (-1 / 9)
_MAX_SAFETY_FACTOR = 4.0
# The most sequences of one priority in a batch. The event loop stands still while it makes a batch and divides its
# rows: with 2,048 of one token, other requests waited twice as long as with 256.
_MAX_SEQUENCES = 512
# A batch smaller than this (tokens) is not worth a slot of its own while it could share one.
_MIN_SPLIT_TOKENS = 64
# With idle slots, bulk starves only if it gets nothing for this many times as long: a batch may take seconds there.
_IDLE_PATIENCE = 10.0
# Without idle slots, interactive requests wait for bulk batches. So these take this part of the SLO at most, if there
# were interactive requests within these seconds.
_BULK_SHARE_OF_SLO, _RECENT_S = 0.1, 1.0


@dataclass(frozen=True)
class QueueLimits:
    """The limits of the queue.

    `batch_tokens`: the largest batch. `queue_tokens`: the most of interactive requests in the queue. Bulk requests can
    have half as many, which reduce that limit. `window`: how many queued sequences are considered for a batch; more if
    these do not fill it. Sequences that have waited for `overdue_s` run in arrival order. If no bulk sequence ran for
    so long, they get `bulk_share` of one batch. Requests with a longer predicted wait than `max_wait_s`, and
    interactive requests with a longer predicted latency than `slo_s`, are rejected; None turns a check off.
    """

    batch_tokens: int
    queue_tokens: int
    window: int = 256
    overdue_s: float = 1.0
    bulk_share: float = 0.25
    max_wait_s: float | None = None
    slo_s: float | None = None


class QueuedSequence(NamedTuple):
    """A sequence in the queue: its request, its position in the request, its length in tokens, its arrival time (s).

    `tenant`: among whom the queue is shared; None if it is not.
    """

    request: int
    position: int
    tokens: int
    arrived: float
    bulk: bool = False
    tenant: str | None = None


class AdmissionError(Exception):
    """The request is rejected. `reason`: `queue_full`, `key_share`, `max_wait` or `slo`. `retry_after`: in seconds."""

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass
class PriorityQueue:
    """The queued sequences of one priority, in arrival order. Cancelled ones stay until they are reached."""

    sequences: deque[QueuedSequence] = field(default_factory=deque)
    tokens: int = 0
    count: int = 0
    held: dict[str, int] = field(default_factory=dict)  # tokens of each tenant


@dataclass
class Batcher:
    """The queue in front of the ready engines, which run `slots` batches at a time in total.

    `elapsed`: of several models on a device, returns the predicted seconds until it spent some on this one.
    `idle_slots`: whether bulk requests run in slots of their own, in idle time.
    """

    limits: QueueLimits
    latency: LatencyModel = field(default_factory=LatencyModel)
    slots: int = 1
    elapsed: Callable[[float], float] | None = None
    idle_slots: bool = False
    _interactive: PriorityQueue = field(default_factory=PriorityQueue, init=False)
    _bulk: PriorityQueue = field(default_factory=PriorityQueue, init=False)
    # The queued sequences by request and position. A sequence whose request is missing here was cancelled.
    _requests: dict[int, dict[int, QueuedSequence]] = field(default_factory=dict, init=False)
    _safety_factor: float = field(default=1.0, init=False)
    _bulk_at: float = field(default=-math.inf, init=False)  # when bulk sequences were last taken
    _interactive_at: float = field(default=-math.inf, init=False)  # and interactive ones

    def __len__(self) -> int:
        return self._interactive.count + self._bulk.count

    @property
    def waiting_requests(self) -> int:
        """Requests with a sequence in the queue."""
        return len(self._requests)

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue."""
        return self._interactive.tokens + self._bulk.tokens

    def submit(
        self,
        request: int,
        lengths: Sequence[int],
        now: float,
        *,
        bulk: bool = False,
        busy_s: float = 0.0,
        tenant: str | None = None,
    ) -> float:
        """Queue all sequences of a request and return its predicted latency (s). Raises `AdmissionError`.

        `busy_s`: seconds until an engine is free. A request that takes longer than the longest wait is a bulk request,
        because others would wait for it.
        """
        total, longest_wait = sum(lengths), self.limits.max_wait_s
        if longest_wait is not None and self.latency.seconds(total, self.limits.batch_tokens) > longest_wait:
            bulk = True
        predicted = self.predict_latency(total, max(lengths), bulk=bulk, busy_s=busy_s, tenant=tenant)
        items = [QueuedSequence(request, index, tokens, now, bulk, tenant) for index, tokens in enumerate(lengths)]
        self._queue(bulk).sequences.extend(items)
        self._add(items)
        return predicted

    def observe(self, predicted: float, seconds: float) -> None:
        """Adjust the safety factor by one response: its predicted and its measured latency (s)."""
        # Predictions far below the SLO do not affect admission.
        if self.limits.slo_s is not None and predicted > self.limits.slo_s / (2 * _MAX_SAFETY_FACTOR):
            self._safety_factor *= _RAISE if seconds > self._safety_factor * predicted else _LOWER
            self._safety_factor = min(max(self._safety_factor, 1.0), _MAX_SAFETY_FACTOR)

    def predict_latency(
        self, tokens: int, longest: int = 1, *, bulk: bool = False, busy_s: float = 0.0, tenant: str | None = None
    ) -> float:
        """Return the predicted latency (s) of a request. Raises `AdmissionError` if the queue cannot accept it.

        `tokens`: the tokens of the request. `longest`: those of its longest sequence. `busy_s`: seconds until an engine
        is free. `tenant`: must not hold more than its share of the queue. Without a waiting request of this priority,
        the limit of the queue does not apply; otherwise a large request would be rejected forever.
        """
        queue, half = self._queue(bulk), self.limits.queue_tokens // 2
        limit = half if bulk else self.limits.queue_tokens - min(self._bulk.tokens, half)
        wait = busy_s + self.expected_wait(bulk=bulk)
        if queue.tokens and queue.tokens + tokens > limit:
            message = f"the queue has {queue.tokens} of at most {limit} tokens, and the request has {tokens}"
            raise AdmissionError("queue_full", message, wait if self.latency.known else 1.0)
        if tenant is not None and (held := queue.held.get(tenant)):
            self._check_share(held, tokens, limit - queue.tokens, wait, bulk=bulk)
        if self.limits.max_wait_s is not None and wait > self.limits.max_wait_s:
            message = f"the predicted wait is {wait:.3g} s, and the limit is {self.limits.max_wait_s:g} s"
            raise AdmissionError("max_wait", message, wait - self.limits.max_wait_s)
        # The sequences run on all engines that are free by then. One sequence runs on one engine.
        parallel = max(1, min(self.slots, tokens // max(_MIN_SPLIT_TOKENS, longest)))
        own = self.latency.seconds(tokens, self.limits.batch_tokens) / parallel
        predicted = wait + (own if self.elapsed is None else self.elapsed(own))
        if self.limits.slo_s is not None and not bulk and wait:
            late = predicted - self.limits.slo_s / self._safety_factor
            if late > 0:
                raise AdmissionError("slo", f"predicted latency exceeds the SLO by {late:.2g} s", min(late, wait))
        return predicted

    def _check_share(self, held: int, tokens: int, free: int, wait: float, *, bulk: bool) -> None:
        """Raise `AdmissionError` if a tenant that holds `held` tokens would have too many of them.

        The bounds on the wait are shared in the same way: they can be reached long before the queue is full.
        """
        bound = math.inf if self.limits.max_wait_s is None else self.limits.max_wait_s
        if self.limits.slo_s is not None and not bulk:
            bound = min(bound, self.limits.slo_s / self._safety_factor)
        seconds = self.latency.seconds(held + tokens, self.limits.batch_tokens) / max(1, self.slots)
        seconds = seconds if self.elapsed is None else self.elapsed(seconds)
        if exceeds_share(held, tokens, free) or seconds > SHARE * (bound - wait):
            message = f"this key has {held} tokens in the queue, and other keys need room"
            raise AdmissionError("key_share", message, wait if self.latency.known else 1.0)

    def expected_wait(self, *, bulk: bool = True) -> float:
        """Return the seconds until the queue (`bulk` False: the interactive one) is processed; 0 if unknown."""
        tokens = self.waiting_tokens if bulk else self._interactive.tokens
        seconds = self.latency.seconds(tokens, self.limits.batch_tokens) / max(1, self.slots)
        return seconds if self.elapsed is None else self.elapsed(seconds)

    def cancel(self, request: int) -> None:
        """Remove the queued sequences of a request. Unknown requests are ignored."""
        for item in list(self._requests.get(request, {}).values()):
            self._remove(item)
        for queue in (self._interactive, self._bulk):
            if len(queue.sequences) > 2 * queue.count + self.limits.window:
                queue.sequences = deque(item for item in queue.sequences if item.request in self._requests)

    def next_queue(self, *, idle: bool = False) -> PriorityQueue:
        """Return the queue that the next batch is taken from. `idle`: the batch for a slot that uses idle time."""
        return self._queue(idle or not (self.idle_slots or self._interactive.count))

    def next_batch(
        self, now: float, free_slots: int = 1, most_tokens: float = math.inf, *, idle: bool = False
    ) -> list[QueuedSequence]:
        """Remove the next batch from its queue and return it; empty if nothing is queued there.

        `free_slots`: how many batches could start now; this batch gets its part of the queue. The batch keeps the token
        limit, and `most_tokens` if that is not too small, except that a single sequence may exceed both.
        """
        queue, slo_s = self.next_queue(idle=idle), self.limits.slo_s
        if queue is self._bulk and not idle and slo_s is not None and now - self._interactive_at < _RECENT_S:
            most_tokens = min(most_tokens, self.latency.tokens(_BULK_SHARE_OF_SLO * slo_s))
        part = min(math.ceil(queue.tokens / free_slots), most_tokens)
        budget = min(self.limits.batch_tokens, max(_MIN_SPLIT_TOKENS, int(part)))
        batch: list[QueuedSequence] = []
        if queue is self._interactive and queue.count:
            self._interactive_at = now
            patience_s = self.limits.overdue_s * (_IDLE_PATIENCE if self.idle_slots else 1)
            oldest = self._oldest(self._bulk)
            if oldest is not None and now - max(oldest.arrived, self._bulk_at) >= patience_s:
                batch = self._take(self._bulk, now, math.ceil(self.limits.bulk_share * budget), allow_oversized=True)
        batch += self._take(queue, now, budget - sum(item.tokens for item in batch), allow_oversized=not batch)
        if batch and batch[0].bulk:
            self._bulk_at = now
        return batch

    def has_full_batch(self) -> bool:
        """Return whether more requests could not make the next batch larger."""
        queue = self.next_queue()
        return queue.tokens >= self.limits.batch_tokens or queue.count >= _MAX_SEQUENCES

    def requeue(self, batch: Sequence[QueuedSequence]) -> None:
        """Put sequences that no engine started back at the front, in order. The queue limit does not apply."""
        for item in reversed(batch):
            self._queue(item.bulk).sequences.appendleft(item)
        self._add(batch)

    def _queue(self, bulk: bool) -> PriorityQueue:
        return self._bulk if bulk else self._interactive

    def _take(self, queue: PriorityQueue, now: float, budget: int, *, allow_oversized: bool) -> list[QueuedSequence]:
        """Remove sequences that fit into `budget` tokens from the window of a queue, and return them.

        Order: the oldest, the overdue ones, then those closest to the oldest in length. With `allow_oversized` the
        first one may exceed the budget.
        """
        if budget <= 0:
            return []
        window: list[QueuedSequence] = []
        tokens = 0
        while len(window) < self.limits.window or (tokens < budget and len(window) < _MAX_SEQUENCES):
            if (item := self._oldest(queue)) is None:
                break
            window.append(queue.sequences.popleft())
            tokens += item.tokens
        order = window
        if tokens > budget:
            oldest, due = window[0], now - self.limits.overdue_s
            order = sorted(
                window, key=lambda i: 0 if i is oldest or i.arrived <= due else 1 + abs(i.tokens - oldest.tokens)
            )
        taken: list[QueuedSequence] = []
        for item in order:
            if item.tokens <= budget or (allow_oversized and not taken):
                taken.append(item)
                budget -= item.tokens
                self._remove(item)
        chosen = set(taken)
        queue.sequences.extendleft(item for item in reversed(window) if item not in chosen)
        return taken

    def _oldest(self, queue: PriorityQueue) -> QueuedSequence | None:
        while queue.sequences and queue.sequences[0].request not in self._requests:
            queue.sequences.popleft()
        return queue.sequences[0] if queue.sequences else None

    def _add(self, items: Sequence[QueuedSequence]) -> None:
        """Count sequences that joined the queue."""
        for item in items:
            self._requests.setdefault(item.request, {})[item.position] = item
            queue = self._queue(item.bulk)
            queue.count += 1
            queue.tokens += item.tokens
            if item.tenant is not None:
                queue.held[item.tenant] = queue.held.get(item.tenant, 0) + item.tokens

    def _remove(self, item: QueuedSequence) -> None:
        """Count a sequence that left the queue."""
        queued = self._requests[item.request]
        del queued[item.position]
        if not queued:
            del self._requests[item.request]
        queue = self._queue(item.bulk)
        queue.count -= 1
        queue.tokens -= item.tokens
        if item.tenant is not None:
            queue.held[item.tenant] -= item.tokens
            if not queue.held[item.tenant]:
                del queue.held[item.tenant]
