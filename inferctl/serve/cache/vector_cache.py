"""Returns stored vectors, and has missing ones computed: equal sequences in flight are computed once.

    keys -> store ----------------------------------------------> vectors
              | missing                                             ^
              +-> joined: another request computes it --------------+
              +-> a flight of this request: engines ----------------+

A flight runs as long as any request waits for it, so a client that disconnects does not hurt the others. What engines
compute for a flight counts for the request that started it, also if its client disconnected.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from inferctl.config.spec import Cache, Task
from inferctl.config.spec_types import CACHED
from inferctl.core.sizes import parse_size
from inferctl.reading.rows import Rows, Tokens, Vectors
from inferctl.serve.cache.keys import KeySpace
from inferctl.serve.cache.store import VectorStore
from inferctl.serve.observe.metrics import Metrics
from inferctl.serve.scheduling.dispatcher import OnVector, RequestResult
from inferctl.serve.scheduling.engine_use import EngineUse
from inferctl.serve.work import Work

# A request joins the flights of others this often. If they fail for reasons of their own, it computes everything.
_MAX_JOINS = 3
# Stands for a vector with NaN or infinity. It is never stored.
_NON_FINITE = b""


class Compute(Protocol):
    """Computes sequences. Raises what `Dispatcher.submit` raises."""

    def __call__(
        self,
        sequences: Sequence[Tokens],
        marks: Sequence[int] | None = None,
        *,
        on_vector: OnVector | None = None,
        use: EngineUse | None = None,
    ) -> asyncio.Future[RequestResult]: ...


@dataclass(eq=False)
class _Flight:
    """Missing sequences of one request that are computed.

    `future`: of the computation. `waiters`: how many requests need the flight. `joined`: futures of single vectors that
    other requests wait for; None means that the flight failed.
    """

    keys: list[bytes]
    bulk: bool
    future: asyncio.Future[RequestResult] = field(init=False)
    waiters: int = 0
    found: dict[bytes, bytes] = field(default_factory=dict)
    joined: dict[bytes, asyncio.Future[bytes | None]] = field(default_factory=dict)
    error: BaseException | None = None

    def join(self, key: bytes) -> asyncio.Future[bytes | None]:
        """Return the future of one vector. Do not cancel it: others wait for it too."""
        if key not in self.joined:
            self.joined[key] = asyncio.get_running_loop().create_future()
        return self.joined[key]


def create(settings: Cache, task: Task, metrics: Metrics, share: int = 1) -> VectorCache | None:
    """Return the cache of a model, None without one: also for a task whose results are not cached.

    `share`: how many models share the size, in equal parts, so that none evicts what is of another.

    Raises `NotReadyError` if a package is missing, `UsageError` for a bad size.
    """
    if task not in CACHED or not settings.size:
        return None
    store = VectorStore(parse_size(settings.size) // share)
    return VectorCache(store, metrics, marked=task == "embed")


class VectorCache:
    """The cache of one server. Runs on the event loop.

    `marked`: whether it keeps rows of sequences with a mark: those of embedding models, and no pairs.
    """

    def __init__(
        self,
        store: VectorStore,
        metrics: Metrics,
        *,
        marked: bool = True,
    ) -> None:
        self.marked = marked
        self._store, self._metrics = store, metrics
        self._hits = metrics.cache_hits
        metrics.cache_bytes.set_function(lambda: store.bytes)
        self._key_space = KeySpace()
        self._flights: dict[bytes, _Flight] = {}  # who computes a vector now

    async def run(self, work: Work, compute: Compute, use: EngineUse) -> RequestResult:
        """Return the rows of a request.

        `compute` runs the missing ones, and `use` counts what engines compute. A caller shares entries with nobody
        else. With the directive `no-cache`, everything is computed; with `no-store`, also nothing is stored. Raises
        what `compute` raises.
        """
        caller, sequences, marks, directives, _ = work
        keys = self._key_space.keys(caller.id, sequences, marks)
        if directives and (wanted := {part.strip().lower() for part in directives.split(b",")}):
            if b"no-store" in wanted:
                return await compute(sequences, marks, use=use)
            if b"no-cache" in wanted:
                return await compute(sequences, marks, on_vector=partial(self._refresh, keys), use=use)
        by_key = None if marks is None else dict(zip(keys, marks, strict=True))
        return await self._run(keys, sequences, by_key, compute, use, caller.bulk)

    async def _run(
        self,
        keys: Sequence[bytes],
        sequences: Sequence[Tokens],
        marks: dict[bytes, int] | None,
        compute: Compute,
        use: EngineUse,
        bulk: bool,
    ) -> RequestResult:
        found: dict[bytes, bytes] = {}
        computed = joins = 0
        queue_s = inference_s = 0.0
        local = 0
        while True:
            joined: dict[bytes, _Flight] = {}
            missing: dict[bytes, Tokens] = {}
            for key, sequence in zip(keys, sequences, strict=True):
                if key in found or key in joined or key in missing:
                    continue
                if (vector := self._store.get(key)) is not None:
                    found[key] = vector
                    local += not joins
                # An interactive request does not wait behind a bulk one.
                elif joins < _MAX_JOINS and (flight := self._flights.get(key)) and (bulk or not flight.bulk):
                    joined[key] = flight
                else:
                    missing[key] = sequence
            if not joined and not missing:
                break
            own = self._start(missing, marks, compute, use, bulk) if missing else None
            waiting = {key: flight.join(key) for key, flight in joined.items()}
            started = time.monotonic()
            await self._wait({*joined.values(), *((own,) if own else ())}, own, list(waiting.values()))
            if own:
                result = own.future.result()
                if not joins and len(missing) == len(keys):
                    # The most common case: all inputs are new. To put the vectors together again would take as long.
                    self._metrics.cache_misses.inc(len(keys))
                    return result
                found |= own.found
                computed += len(own.found)
                queue_s, inference_s = queue_s + result.queue_seconds, inference_s + result.inference_seconds
            elif waiting:
                queue_s += time.monotonic() - started
            for key, future in waiting.items():
                if (joined_vector := future.result()) is not None:
                    found[key] = joined_vector
                elif (error := joined[key].error) and len(joined[key].keys) == 1:
                    raise error  # the same sequence would fail again
            joins += 1
        self._hits.inc(local)
        self._metrics.cache_misses.inc(computed)
        self._metrics.cache_coalesced.inc(len(keys) - local - computed)
        non_finite = [index for index, key in enumerate(keys) if not found[key]]
        rows: Rows = np.empty((0, 0), np.float32)
        if not non_finite and marks is None:
            data = b"".join([found[key] for key in keys])
            rows = np.frombuffer(data, dtype=np.float32).reshape(len(keys), -1)
        elif not non_finite:
            rows = [np.frombuffer(found[key], dtype=np.float32) for key in keys]  # not copied: they can be large
        return RequestResult(rows, non_finite, queue_s, inference_s)

    def _start(
        self,
        missing: dict[bytes, Tokens],
        marks: dict[bytes, int] | None,
        compute: Compute,
        use: EngineUse,
        bulk: bool,
    ) -> _Flight:
        flight = _Flight(list(missing), bulk)
        in_order = None if marks is None else [marks[key] for key in missing]
        arrived = partial(self._arrived, flight)
        flight.future = compute(list(missing.values()), in_order, on_vector=arrived, use=use)
        flight.future.add_done_callback(partial(self._finished, flight))
        for key in missing:
            self._flights[key] = flight
        return flight

    async def _wait(
        self, flights: set[_Flight], own: _Flight | None, futures: Sequence[asyncio.Future[bytes | None]]
    ) -> None:
        """Wait for a flight of this request and for vectors of others. Stop those that nobody needs."""
        for flight in flights:
            flight.waiters += 1
        try:
            # If this request is cancelled, that does not cancel what others wait for.
            both = [*futures, *((own.future,) if own else ())]
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for flight in flights:
                flight.waiters -= 1
                if not flight.waiters and not flight.future.done():
                    self._forget(flight)
                    flight.future.cancel()

    def _arrived(self, flight: _Flight, index: int, vector: Vectors, ok: bool) -> None:
        self._resolve(flight, flight.keys[index], vector.tobytes() if ok else _NON_FINITE)

    def _resolve(self, flight: _Flight, key: bytes, vector: bytes) -> None:
        flight.found[key] = vector
        if vector:
            self._store.put(key, vector)
        if self._flights.get(key) is flight:
            del self._flights[key]
        if (future := flight.joined.get(key)) and not future.done():
            future.set_result(vector)

    def _finished(self, flight: _Flight, future: asyncio.Future[RequestResult]) -> None:
        flight.error = asyncio.CancelledError() if future.cancelled() else future.exception()
        self._forget(flight)
        for joined in flight.joined.values():
            if not joined.done():
                joined.set_result(None)

    def _forget(self, flight: _Flight) -> None:
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]

    def _refresh(self, keys: Sequence[bytes], index: int, vector: Vectors, ok: bool) -> None:
        if ok:
            self._store.put(keys[index], vector.tobytes())
