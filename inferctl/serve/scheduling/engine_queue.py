"""The batches in flight on one engine, and whether the engine can accept another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, EngineInfo
from inferctl.serve.scheduling.batcher import QueuedSequence

if TYPE_CHECKING:
    from inferctl.serve.scheduling.dispatcher import Dispatcher


@dataclass(frozen=True)
class BatchAttempt:
    """One attempt to run sequences as a batch.

    `isolated`: no other batch may be in flight on the engine. `exact`: run in fp32.
    `probe_for`: the attempt that failed in isolation, and its error. This attempt then is a health-check batch. It
    shows whether the engine or the request caused the failure.
    """

    sequences: Sequence[QueuedSequence]
    isolated: bool = False
    exact: bool = False
    probe_for: tuple[BatchAttempt, Exception] | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens in the batch."""
        return sum(item.tokens for item in self.sequences)


@dataclass
class _BatchInFlight:
    """A batch on the engine. `started` is its start time (s), None while all slots are in use."""

    attempt: BatchAttempt
    started: float | None


class EngineQueue:
    """Tracks the batches in flight on one engine. It is the `Listener` of that engine's supervisor."""

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float]) -> None:
        self.write: Callable[[Batch], None] | None = None  # the supervisor's
        self.kill: Callable[[], None] = lambda: None  # the supervisor's
        self.on_ready: Callable[[EngineInfo], None] = lambda _: None
        self.on_lost: Callable[[], None] = lambda: None
        self.info: EngineInfo | None = None
        self.batch_tokens = 0
        self.batches_run = 0  # since this engine process started
        self._dispatcher, self._clock = dispatcher, clock
        self._in_flight: dict[int, _BatchInFlight] = {}  # the oldest first
        self._started = False  # this engine process was ready
        self._last_failed = False  # the last batch raised

    @property
    def ready(self) -> bool:
        """Whether the engine accepts batches."""
        return self.info is not None

    @property
    def slots(self) -> int:
        """How many batches the engine runs at a time; 0 while it is not ready."""
        return self.info.parallel if self.info else 0

    @property
    def free_slots(self) -> int:
        """How many more batches the engine would start at once."""
        return 0 if self._isolated else max(0, self.slots - len(self._in_flight))

    @property
    def _isolated(self) -> bool:
        """Whether a batch in flight must run in isolation."""
        return any(batch.attempt.isolated for batch in self._in_flight.values())

    @property
    def busy(self) -> bool:
        """Whether a batch is in flight."""
        return bool(self._in_flight)

    @property
    def tokens(self) -> int:
        """Tokens of all batches in flight."""
        return sum(batch.attempt.tokens for batch in self._in_flight.values())

    @property
    def largest(self) -> int:
        """Tokens of the largest batch in flight; 0 if there is none."""
        return max((batch.attempt.tokens for batch in self._in_flight.values()), default=0)

    def accepts(self, *, prefetch: bool) -> bool:
        """Return whether another batch can be sent; with `prefetch` also one that waits for a slot."""
        return not self._isolated and len(self._in_flight) < self.slots + prefetch

    def seconds_until_free(self, predict: Callable[[BatchAttempt], float]) -> float:
        """Return the seconds until the engine can start another batch. `predict` gives the seconds of a batch."""
        if self.free_slots or not self._in_flight:
            return 0.0
        now = self._clock()
        remaining = [
            max(0.0, predict(batch.attempt) - (0.0 if batch.started is None else now - batch.started))
            for batch in self._in_flight.values()
        ]
        return sum(remaining) if self._isolated else sum(remaining) / max(1, self.slots)

    def send(self, batch: Batch, attempt: BatchAttempt) -> None:
        """Send a batch to the engine."""
        assert self.write is not None
        started = self._clock() if len(self._in_flight) < self.slots else None
        self._in_flight[batch.id] = _BatchInFlight(attempt, started)
        self.write(batch)

    def replace(self) -> None:
        """Kill the engine, so that the supervisor starts another. It accepts no more batches."""
        self.info = None
        self._dispatcher.engines_changed()
        self.kill()

    def engine_ready(self, info: EngineInfo) -> None:
        """Use the engine from now on. Part of `Listener`."""
        self._started, self.batches_run, self._last_failed = True, 0, False
        self.info, self.batch_tokens = info, info.batch_tokens
        self._dispatcher.engines_changed()
        self.on_ready(info)
        self._dispatcher.dispatch()

    def engine_lost(self) -> None:
        """Give the batches in flight back to the dispatcher. Part of `Listener`."""
        started, self._started, self.info = self._started, False, None
        lost, self._in_flight = list(self._in_flight.values()), {}
        self._dispatcher.engines_changed()
        if started:
            running = [batch.attempt for batch in lost if batch.started is not None]
            prefetched = [batch.attempt for batch in lost if batch.started is None]
            self._dispatcher.engine_crashed(running, prefetched, after_failure=self._last_failed)
        self.on_lost()
        self._dispatcher.dispatch()

    def batch_done(self, result: BatchResult) -> None:
        """Pass a result to the dispatcher. Part of `Listener`."""
        self._last_failed = False
        attempt, seconds = self._finish(result.id)
        self._dispatcher.batch_done(self, attempt, result, seconds)

    def batch_failed(self, number: int, message: str, out_of_memory: bool) -> None:
        """Pass a failure to the dispatcher. Part of `Listener`."""
        self._last_failed = True
        attempt, _ = self._finish(number)
        self._dispatcher.batch_failed(self, attempt, message, out_of_memory)

    def _finish(self, number: int) -> tuple[BatchAttempt, float]:
        """Remove a batch and return it with its run time (s). The next prefetched batch starts now."""
        self.batches_run += 1
        now, batch = self._clock(), self._in_flight.pop(number)
        if following := next((waiting for waiting in self._in_flight.values() if waiting.started is None), None):
            following.started = now
        return batch.attempt, 0.0 if batch.started is None else now - batch.started
