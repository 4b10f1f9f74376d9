"""The batches in flight on one ready engine, and whether the engine can accept another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from inferctl.batching.batcher import QueuedSequence
from inferctl.batching.device_share import Load
from inferctl.batching.latency_model import LatencyModel
from inferctl.serve.engine_process.engine_protocol import MIN_BATCH_TOKENS, Batch, EngineInfo, EngineProcess
from inferctl.serve.scheduling.engine_use import EngineUse

# After at most this many batches near the lowered limit that fit into memory, the batch limit is back at its start
# value. If memory stays insufficient, that costs one retry per about this many batches.
_RECOVERY_BATCHES = 256
# A batch that takes this many times as long as predicted, and these seconds, does not keep other models from the
# device: its engine may hang.
_PATIENCE, _MIN_PATIENCE_S = 4.0, 0.25


@dataclass
class BatchAttempt:
    """One attempt to run sequences as a batch.

    `isolated`: no other batch may be in flight on the engine. `started`: when the engine could start it (s), None while
    it is prefetched. `uses`: for whom the sequences are computed, also if their requests are cancelled. `charged`: the
    seconds of a device with several models that were predicted. `idle`: as in `Batch`.
    """

    sequences: Sequence[QueuedSequence]
    isolated: bool = False
    started: float | None = None
    uses: Sequence[EngineUse] = field(default_factory=list)
    charged: float = 0.0
    idle: bool = False

    @cached_property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return sum(item.tokens for item in self.sequences)


class EngineQueue:
    """Tracks the batches in flight on one engine, from the moment it is ready until it is lost.

    `slots`: how many batches the engine runs at a time, and `idle_slots` more on idle cores. `batch_tokens`: its batch
    limit, lowered while memory is insufficient. `in_flight`: the batches by number, the oldest first. `place`: which of
    several equal devices it uses.
    """

    def __init__(self, engine: EngineProcess, info: EngineInfo, clock: Callable[[], float], place: int = 0) -> None:
        self.slots, self.batch_tokens, self.place = info.parallel, info.batch_tokens, place
        self.idle_slots, self.in_flight = info.idle_parallel, dict[int, BatchAttempt]()
        self._engine, self._full_batch_tokens, self._clock = engine, info.batch_tokens, clock

    @property
    def tokens(self) -> int:
        """Tokens of all batches in flight."""
        return sum(attempt.tokens for attempt in self.in_flight.values())

    def free_slots(self, *, prefetch: bool = False, idle: bool = False) -> int:
        """Return how many more batches the engine accepts. With `prefetch`, one of them waits until another is done.

        `idle`: for idle cores.
        """
        used = 0
        for attempt in self.in_flight.values():
            if attempt.isolated:
                return 0
            used += attempt.idle == idle
        return max(0, (self.idle_slots if idle else self.slots) + prefetch - used)

    def seconds_until_free(self, latency: LatencyModel) -> float:
        """Return the predicted seconds until the engine can start another batch."""
        return 0.0 if self.free_slots() else self.load(latency).remaining_s

    def load(self, latency: LatencyModel) -> Load:
        """Return the load of its batches on its cores or GPU."""
        now, total, running, overdue_s = self._clock(), 0.0, 0, math.inf
        for attempt in self.in_flight.values():
            if attempt.idle:
                continue
            predicted = latency.seconds(attempt.tokens)
            elapsed = 0.0 if attempt.started is None else now - attempt.started
            total += max(0.0, predicted - elapsed)
            if attempt.started is not None and (left := max(_MIN_PATIENCE_S, _PATIENCE * predicted) - elapsed) > 0:
                running, overdue_s = running + 1, min(overdue_s, left)
        return Load(running / self.slots, total / self.slots, overdue_s)

    def send(self, batch: Batch, attempt: BatchAttempt) -> None:
        """Send a batch to the engine."""
        attempt.started = self._clock() if self.free_slots(idle=attempt.idle) else None
        for use in attempt.uses:
            use.begin()
        self.in_flight[batch.id] = attempt
        self._engine.send(batch)

    def finish(self, number: int) -> tuple[BatchAttempt, float]:
        """Remove a batch and return it with its run time (s). The next prefetched batch starts now."""
        now, attempt = self._clock(), self.in_flight.pop(number)
        for use in attempt.uses:
            use.end()
        for waiting in self.in_flight.values():
            if waiting.started is None and waiting.idle == attempt.idle:
                waiting.started = now
                break
        return attempt, 0.0 if attempt.started is None else now - attempt.started

    def close(self) -> list[BatchAttempt]:
        """Return the batches that the engine had when it ended."""
        for attempt in self.in_flight.values():
            for use in attempt.uses:
                use.end()
        return list(self.in_flight.values())

    def lower_batch_limit(self, failed: BatchAttempt) -> None:
        """Halve the batch limit after memory was insufficient for a batch and those that ran at the same time."""
        largest = max([failed.tokens, *(attempt.tokens for attempt in self.in_flight.values())])
        self.batch_tokens = max(MIN_BATCH_TOKENS, min(self.batch_tokens, largest // 2))

    def raise_batch_limit(self, tokens: int) -> None:
        """Raise a lowered batch limit by one step after a batch of at least half that size fitted into memory."""
        if 2 * tokens > self.batch_tokens:
            step = max(1, self._full_batch_tokens // _RECOVERY_BATCHES)
            self.batch_tokens = min(self._full_batch_tokens, self.batch_tokens + step)
