"""One engine as the dispatcher sees it: what is with it, since when, and whether it takes more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from inferctl.serve.batcher import Work
from inferctl.serve.types import Batch, BatchResult, EngineInfo

if TYPE_CHECKING:
    from inferctl.serve.dispatcher import Dispatcher


@dataclass(frozen=True)
class Sent:
    """A batch by its works. `alone`: nothing may be with the engine beside it. `exact`: in fp32.

    `doubt`: what failed though it was alone, and how; the batch itself is a harmless one that shows whether the engine is well.
    """

    works: Sequence[Work]
    alone: bool = False
    exact: bool = False
    doubt: tuple[Sent, Exception] | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens in it."""
        return sum(work.tokens for work in self.works)


@dataclass
class _Flight:
    """A batch that is with the engine; `began` is None while all its slots are taken."""

    sent: Sent
    began: float | None


class Lane:
    """The `Listener` of one supervisor."""

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float]) -> None:
        self.write: Callable[[Batch], None] | None = None  # the supervisor's
        self.kill: Callable[[], None] = lambda: None  # the supervisor's
        self.on_ready: Callable[[EngineInfo], None] = lambda _: None
        self.on_lost: Callable[[], None] = lambda: None
        self.info: EngineInfo | None = None
        self.batch_tokens = 0
        self._dispatcher, self._clock = dispatcher, clock
        self._in_flight: dict[int, _Flight] = {}  # the oldest first
        self._alive = False  # was ready in this life
        self.ran = 0  # batches, in this life
        self._failed = False  # the last of them raised

    @property
    def up(self) -> bool:
        """Whether the engine takes batches."""
        return self.info is not None

    @property
    def slots(self) -> int:
        """Batches that the engine runs at a time; 0 while it is not up."""
        return self.info.parallel if self.info else 0

    @property
    def free(self) -> int:
        """Batches that it would begin at once."""
        return 0 if self._alone else max(0, self.slots - len(self._in_flight))

    @property
    def _alone(self) -> bool:
        """Whether what is with the engine wants nothing beside it."""
        return any(flight.sent.alone for flight in self._in_flight.values())

    @property
    def busy(self) -> bool:
        """Whether anything is with the engine."""
        return bool(self._in_flight)

    @property
    def tokens(self) -> int:
        """Tokens that are with the engine."""
        return sum(flight.sent.tokens for flight in self._in_flight.values())

    @property
    def largest(self) -> int:
        """Tokens of the largest batch that is with the engine; 0 when there is none."""
        return max((flight.sent.tokens for flight in self._in_flight.values()), default=0)

    def takes(self, *, ahead: bool) -> bool:
        """Whether another batch may be sent; `ahead`: also one that waits for the engine."""
        return not self._alone and len(self._in_flight) < self.slots + ahead

    def left(self, seconds: Callable[[Sent], float]) -> float:
        """How long until the engine can begin another batch, when one takes `seconds`."""
        if self.free or not self._in_flight:
            return 0.0
        now = self._clock()
        left = [
            max(0.0, seconds(flight.sent) - (0.0 if flight.began is None else now - flight.began))
            for flight in self._in_flight.values()
        ]
        return sum(left) if self._alone else sum(left) / max(1, self.slots)

    def send(self, batch: Batch, sent: Sent) -> None:
        """Hand a batch to the engine."""
        assert self.write is not None
        self._in_flight[batch.id] = _Flight(sent, self._clock() if len(self._in_flight) < self.slots else None)
        self.write(batch)

    def replace(self) -> None:
        """Give up this engine: it takes nothing more, and its end is near."""
        self.info = None
        self._dispatcher.lanes_changed()
        self.kill()

    def engine_ready(self, info: EngineInfo) -> None:
        """See `Listener`."""
        self._alive, self.ran, self._failed = True, 0, False
        self.info, self.batch_tokens = info, info.batch_tokens
        self._dispatcher.lanes_changed()
        self.on_ready(info)
        self._dispatcher.pump()

    def engine_lost(self) -> None:
        """See `Listener`."""
        was_alive, self._alive, self.info = self._alive, False, None
        lost, self._in_flight = list(self._in_flight.values()), {}
        self._dispatcher.lanes_changed()
        if was_alive:
            running = [flight.sent for flight in lost if flight.began is not None]
            ahead = [flight.sent for flight in lost if flight.began is None]
            self._dispatcher.lost(running, ahead, spoilt=self._failed)
        self.on_lost()
        self._dispatcher.pump()

    def batch_done(self, result: BatchResult) -> None:
        """See `Listener`."""
        self._failed = False
        sent, seconds = self._ended(result.id)
        self._dispatcher.done(self, sent, result, seconds)

    def batch_failed(self, number: int, message: str, out_of_memory: bool) -> None:
        """See `Listener`."""
        self._failed = True
        sent, _ = self._ended(number)
        self._dispatcher.failed(self, sent, message, out_of_memory)

    def _ended(self, number: int) -> tuple[Sent, float]:
        """The batch, and for how long the engine had it."""
        self.ran += 1
        now, flight = self._clock(), self._in_flight.pop(number)
        if following := next((waiting for waiting in self._in_flight.values() if waiting.began is None), None):
            following.began = now
        return flight.sent, 0.0 if flight.began is None else now - flight.began
