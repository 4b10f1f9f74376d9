"""The batches in flight on one ready engine, and whether the engine can accept another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from inferctl.batching.batcher import QueuedSequence
from inferctl.batching.latency_model import LatencyModel
from inferctl.serve.engine_process.engine_protocol import MIN_BATCH_TOKENS, Batch, EngineInfo, EngineProcess
from inferctl.serve.scheduling.engine_use import EngineUse

# After at most this many batches near the lowered limit that fit into memory, the batch limit is back at its start
# value. If memory stays insufficient, that costs one retry per about this many batches.
_RECOVERY_BATCHES = 256


@dataclass
class BatchAttempt:
    """One attempt to run sequences as a batch.

    `isolated`: no other batch may be in flight on the engine. `started`: when the engine could start it (s), None while
    it is prefetched. `uses`: for whom the sequences are computed, also if their requests are cancelled.
    """

    sequences: Sequence[QueuedSequence]
    isolated: bool = False
    started: float | None = None
    uses: Sequence[EngineUse] = field(default_factory=list)

    @cached_property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return sum(item.tokens for item in self.sequences)


class EngineQueue:
    """Tracks the batches in flight on one engine, from the moment it is ready until it is lost.

    `slots`: how many batches the engine runs at a time. `batch_tokens`: its batch limit, lowered while memory is
    insufficient. `in_flight`: the batches by number, the oldest first.
    """

    def __init__(self, engine: EngineProcess, info: EngineInfo, clock: Callable[[], float]) -> None:
        self.slots, self.batch_tokens = info.parallel, info.batch_tokens
        self.in_flight: dict[int, BatchAttempt] = {}
        self._engine, self._full_batch_tokens, self._clock = engine, info.batch_tokens, clock

    @property
    def tokens(self) -> int:
        """Tokens of all batches in flight."""
        return sum(attempt.tokens for attempt in self.in_flight.values())

    def free_slots(self, *, prefetch: bool = False) -> int:
        """Return how many more batches the engine accepts. With `prefetch`, one of them waits until another is done."""
        isolated = any(attempt.isolated for attempt in self.in_flight.values())
        return 0 if isolated else max(0, self.slots + prefetch - len(self.in_flight))

    def seconds_until_free(self, latency: LatencyModel) -> float:
        """Return the predicted seconds until the engine can start another batch."""
        if self.free_slots():
            return 0.0
        now, total = self._clock(), 0.0
        for attempt in self.in_flight.values():
            elapsed = 0.0 if attempt.started is None else now - attempt.started
            total += max(0.0, latency.seconds(attempt.tokens) - elapsed)
        return total / self.slots

    def send(self, batch: Batch, attempt: BatchAttempt) -> None:
        """Send a batch to the engine."""
        attempt.started = self._clock() if len(self.in_flight) < self.slots else None
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
            if waiting.started is None:
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
