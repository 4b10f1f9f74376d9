"""Which waiting sequences form the next batch, and which requests may wait at all. Knows no HTTP, no torch and no clock of its own:
time comes in as an argument, and the same calls give the same batches.

The queue is counted in tokens. A request is taken whole or refused whole; its sequences may run in several batches. Interactive work goes
before bulk, the oldest of it first, then what is nearest to that in length, looked for in a bounded window. Bulk that has waited too long
earns a share of the batches, so nothing starves. There is no waiting window: a batch is as large as what waits when the engine is free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from inferctl.serve.pace import Pace

# A request ends with its batch, which later ones fill: predictions are stretched until nine answers of ten come in time. Steps of that search.
_LATE, _IN_TIME = 1.02, 1.02 ** (-1 / 9)
_LONGEST_STRETCH = 4.0
# Less than this (tokens) is not worth a batch of its own while others could share one.
_SMALLEST_SHARE = 64


@dataclass(frozen=True)
class Limits:
    """`batch_tokens`: of one batch at most. `queue_tokens`: waiting at most, half of them bulk. `window`: sequences looked at to fill a batch.

    `age_cap` (seconds): who waited longer goes in order of arrival, whatever its length, and bulk gets `aged_share` of the tokens.
    `slo` (seconds): interactive requests that would finish later are refused; None refuses none for that.
    """

    batch_tokens: int
    queue_tokens: int
    window: int = 256
    age_cap: float = 1.0
    aged_share: float = 0.25
    slo: float | None = None

    def with_batch_tokens(self, tokens: int) -> Limits:
        """The same limits with another batch size."""
        return replace(self, batch_tokens=tokens)


class Work(NamedTuple):
    """One sequence of a request, the `sequence`-th of it. `tokens` is its length."""

    request: int
    sequence: int
    tokens: int
    arrived: float
    bulk: bool = False


class RefusedError(Exception):
    """The request may not wait. `reason`: `queue_full`, or `slo` when it would be answered too late; `retry_after` in seconds."""

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


@dataclass
class _Lane:
    """Work of one priority, in order of arrival; what was cancelled is skipped when it is reached."""

    works: deque[Work] = field(default_factory=deque)
    tokens: int = 0
    count: int = 0


@dataclass
class _Share:
    """What of one request is in the queue."""

    lane: _Lane
    count: int = 0
    tokens: int = 0


@dataclass
class Batcher:
    """The queue in front of `engines` equal engines, or an engine that runs as many batches at a time."""

    limits: Limits
    pace: Pace = field(default_factory=Pace)
    engines: int = 1
    _interactive: _Lane = field(default_factory=_Lane, init=False)
    _bulk: _Lane = field(default_factory=_Lane, init=False)
    _shares: dict[int, _Share] = field(default_factory=dict, init=False)  # by request; work without one was cancelled
    _stretch: float = field(default=1.0, init=False)
    _earned: float = field(default=0.0, init=False)  # tokens that bulk may take before interactive work

    def __len__(self) -> int:
        return self._interactive.count + self._bulk.count

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue."""
        return self._interactive.tokens + self._bulk.tokens

    def submit(
        self, request: int, lengths: Sequence[int], now: float, *, bulk: bool = False, running: float = 0.0
    ) -> float:
        """Queue all sequences of a request; returns in how many seconds it should be answered. Raises `RefusedError` as `check` does."""
        total = sum(lengths)
        predicted = self.check(total, max(lengths), bulk=bulk, running=running)
        lane = self._lane(bulk)
        lane.works.extend(Work(request, number, tokens, now, bulk) for number, tokens in enumerate(lengths))
        self._joined(lane, request, len(lengths), total)
        return predicted

    def answered(self, predicted: float, seconds: float) -> None:
        """Learn from a request how far predictions are off, where they matter."""
        if self.limits.slo is not None and predicted > self.limits.slo / (2 * _LONGEST_STRETCH):
            self._stretch *= _LATE if seconds > self._stretch * predicted else _IN_TIME
            self._stretch = min(max(self._stretch, 1.0), _LONGEST_STRETCH)

    def check(self, tokens: int, longest: int = 1, *, bulk: bool = False, running: float = 0.0) -> float:
        """Seconds in which a request of `tokens`, its longest sequence of so many, should be answered. Raises `RefusedError` when it may not wait.

        `running`: seconds until an engine is free.
        Where nothing waits, any request may: one that is larger than the limits must be possible at some time.
        """
        lane, half = self._lane(bulk), self.limits.queue_tokens // 2
        limit = half if bulk else self.limits.queue_tokens - min(self._bulk.tokens, half)
        ahead = running + self.expected_wait(bulk=bulk)
        if lane.tokens and lane.tokens + tokens > limit:
            message = f"{lane.tokens} tokens are waiting, the limit is {limit}"
            raise RefusedError("queue_full", message, ahead if self.pace.known else 1.0)
        # Its sequences run on all engines that are free by then, each of them on one.
        spread = max(1, min(self.engines, tokens // max(_SMALLEST_SHARE, longest)))
        predicted = ahead + self.pace.seconds(tokens, self.limits.batch_tokens) / spread
        if self.limits.slo is None or bulk or not ahead:
            return predicted
        late = predicted - self.limits.slo / self._stretch
        if late > 0:
            raise RefusedError("slo", f"this would be answered {late:.2g} s too late", min(late, ahead))
        return predicted

    def expected_wait(self, *, bulk: bool = True) -> float:
        """Seconds until what waits now is done (`bulk` False: what goes before a new interactive request); 0 before anything was seen."""
        tokens = self.waiting_tokens if bulk else self._interactive.tokens
        return self.pace.seconds(tokens, self.limits.batch_tokens) / max(1, self.engines)

    def cancel(self, request: int) -> None:
        """Drop the sequences of a request that still wait. Unknown requests are ignored."""
        share = self._shares.pop(request, None)
        if share is None:
            return
        lane = share.lane
        lane.count -= share.count
        lane.tokens -= share.tokens
        if len(lane.works) > 2 * lane.count + self.limits.window:
            lane.works = deque(work for work in lane.works if work.request in self._shares)

    def next_batch(self, now: float, share: int = 1) -> list[Work]:
        """Take the next batch out of the queue; empty when nothing waits. Its sum of tokens keeps the limit unless one sequence alone is over it.

        `share`: so many batches could begin at once, so this one takes its part of what waits.
        """
        part = max(_SMALLEST_SHARE, math.ceil(self.waiting_tokens / share)) if share > 1 else self.waiting_tokens
        room = min(self.limits.batch_tokens, part)
        batch = self._earned_by_bulk(now, room)
        for lane in (self._interactive, self._bulk):
            batch += self._take(lane, now, room - sum(work.tokens for work in batch), not batch)
        return batch

    def has_full_batch(self) -> bool:
        """Whether waiting longer could not make the next batch larger."""
        return self.waiting_tokens >= self.limits.batch_tokens or len(self) >= self.limits.window

    def requeue(self, batch: Sequence[Work]) -> None:
        """Put work that an engine lost before it began back in front, in order. The queue limit does not apply."""
        for work in reversed(batch):
            lane = self._lane(work.bulk)
            lane.works.appendleft(work)
            self._joined(lane, work.request, 1, work.tokens)

    def _lane(self, bulk: bool) -> _Lane:
        return self._bulk if bulk else self._interactive

    def _earned_by_bulk(self, now: float, room: int) -> list[Work]:
        """Bulk that goes before interactive work: when the oldest has waited too long, it earns tokens with every batch until it has paid."""
        oldest = self._oldest(self._bulk)
        if oldest is None or not self._interactive.count or now - oldest.arrived < self.limits.age_cap:
            self._earned = 0.0
            return []
        self._earned += self.limits.aged_share * room
        batch: list[Work] = []
        while (work := self._oldest(self._bulk)) and (not batch or work.tokens <= room):
            price = min(work.tokens, self.limits.batch_tokens)
            if price > self._earned:
                break
            batch.append(self._bulk.works.popleft())
            self._left(work)
            self._earned -= price
            room -= price
        return batch

    def _take(self, lane: _Lane, now: float, room: int, alone: bool) -> list[Work]:
        """From the window of a lane what fits into `room`: the oldest, all that is over age, then the nearest to the oldest in length.

        `alone`: the batch is still empty, so that the first may be longer than the room.
        """
        if room <= 0:
            return []
        window: list[Work] = []
        while len(window) < self.limits.window and self._oldest(lane):
            window.append(lane.works.popleft())
        order = list(range(len(window)))
        if sum(work.tokens for work in window) > room:
            oldest, due = window[0], now - self.limits.age_cap
            order.sort(
                key=lambda i: 0 if not i or window[i].arrived <= due else 1 + abs(window[i].tokens - oldest.tokens)
            )
        taken: list[int] = []
        for i in order:
            if window[i].tokens <= room or (alone and not taken):
                taken.append(i)
                room -= window[i].tokens
        left = set(order).difference(taken)
        lane.works.extendleft(window[i] for i in sorted(left, reverse=True))
        for i in taken:
            self._left(window[i])
        return [window[i] for i in taken]

    def _oldest(self, lane: _Lane) -> Work | None:
        while lane.works and lane.works[0].request not in self._shares:
            lane.works.popleft()
        return lane.works[0] if lane.works else None

    def _joined(self, lane: _Lane, request: int, count: int, tokens: int) -> None:
        share = self._shares.setdefault(request, _Share(lane))
        for part in (lane, share):
            part.count += count
            part.tokens += tokens

    def _left(self, work: Work) -> None:
        share = self._shares[work.request]
        for part in (share.lane, share):
            part.count -= 1
            part.tokens -= work.tokens
        if not share.count:
            del self._shares[work.request]
