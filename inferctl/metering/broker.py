"""NATS JetStream between the machines with servers and the one with the ledger. It may lose everything.

A server's worker publishes the batches of its outboxes, and asks for the watermarks of the ledger. It frees nothing
before the ledger has it, and publishes again what does not arrive. The worker with the ledger stores what it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from typing import Any

import nats
import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig

from inferctl.errors import NotReadyError
from inferctl.metering import cloud_event
from inferctl.metering.ledger import Ledger
from inferctl.metering.outbox import Batch

log = logging.getLogger("inferctl.metering")

STREAM, CONSUMER = "INFERCTL_USAGE", "ledger"
SUBJECT, WATERMARKS = "inferctl.usage", "inferctl.usage-watermarks"
_MAX_BYTES = 256 * 1024 * 1024
_TIMEOUT_S = 5.0
# A batch that the ledger does not have after this time is published again.
_LOST_S = 10.0
_FETCH, _FETCH_S = 50, 0.5
_RANGE, _OLDEST, _TIME, _SOURCE = "Inferctl-Range", "Inferctl-Oldest", "Inferctl-Time", "Inferctl-Source"
_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, asyncio.TimeoutError)


class BrokerUnavailableError(NotReadyError):
    """The broker, or the worker with the ledger behind it, does not respond. The same call may succeed later."""


async def connect(url: str) -> Broker:
    """Connect to `url`, and make the stream if it does not exist. Raises `BrokerUnavailableError`."""

    async def ignore(_: Exception) -> None:
        """The next call fails with the same error, and its caller reports it."""

    try:
        # Without the timeout, the first connection is tried for ever: no message, and SIGTERM does not end the worker.
        async with asyncio.timeout(_TIMEOUT_S):
            connection = await nats.connect(
                url, connect_timeout=_TIMEOUT_S, max_reconnect_attempts=-1, allow_reconnect=True, error_cb=ignore
            )
    except _ERRORS as error:
        raise _unavailable(error) from None
    return Broker(connection)


class Broker:
    """A connection to NATS. All methods raise `BrokerUnavailableError`."""

    def __init__(self, connection: Any) -> None:
        self._nats = connection
        self._stream = connection.jetstream(timeout=_TIMEOUT_S)
        self._subscription: Any = None

    async def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(*_ERRORS):
            await self._nats.close()

    async def publish(self, batch: Batch) -> None:
        """Return when the broker has stored `batch`."""
        headers = {
            "Nats-Msg-Id": f"{batch.source}.{batch.first}-{batch.last}",
            "Content-Type": cloud_event.BATCH_MEDIA_TYPE,
            _SOURCE: batch.source,
            _RANGE: f"{batch.first}-{batch.last}",
            _OLDEST: str(batch.oldest),
            _TIME: str(batch.time_ms),
        }
        events = cloud_event.read(batch.source, batch.content)
        content = json.dumps([event.as_cloud_event(batch.source) for event in events]).encode()
        subject = f"{SUBJECT}.{batch.source.partition('/')[0].replace('.', '-')}"
        try:
            try:
                await self._stream.publish(subject, content, headers=headers)
            except (nats.js.errors.NotFoundError, nats.js.errors.NoStreamResponseError):
                await self._make_stream()  # the first time, and if the broker lost its store
                await self._stream.publish(subject, content, headers=headers)
        except _ERRORS as error:
            raise _unavailable(error) from None

    async def watermarks(self, sources: list[str]) -> dict[str, int]:
        """Ask the worker with the ledger up to which number it has the events of `sources`."""
        try:
            response = await self._nats.request(WATERMARKS, json.dumps(sources).encode(), timeout=_TIMEOUT_S)
        except _ERRORS as error:
            raise _unavailable(error) from None
        found: dict[str, int] = json.loads(response.data)
        return found

    async def answer_watermarks(self, ledger: Ledger) -> None:
        """Answer what `watermarks` asks, from now on."""

        async def answer(message: Any) -> None:
            # Without an answer, the other side asks again.
            with contextlib.suppress(NotReadyError, ValueError, *_ERRORS):
                found = await asyncio.to_thread(ledger.watermarks, json.loads(message.data))
                await message.respond(json.dumps(found).encode())

        try:
            await self._nats.subscribe(WATERMARKS, queue=CONSUMER, cb=answer)
        except _ERRORS as error:
            raise _unavailable(error) from None

    async def store(self, ledger: Ledger) -> int:
        """Store the next messages in `ledger`, and return how many there were.

        Raises also `DatabaseUnavailableError`. The broker then delivers the messages again.
        """
        try:
            messages = await self._fetch()
            batches: list[tuple[Any, Batch]] = []
            for message in messages:
                try:
                    batches.append((message, _batch(message)))
                except (KeyError, ValueError, TypeError):
                    log.error("a message in the stream %s is no batch of usage events; it is dropped", STREAM)
                    await message.term()
            try:
                watermarks = await asyncio.to_thread(ledger.apply, [batch for _, batch in batches])
            except ValueError:
                watermarks, batches = await self._one_by_one(ledger, batches)
            for message, batch in batches:
                if batch.last <= watermarks.get(batch.source, 0):
                    await message.ack()
                else:  # its predecessor was lost, and will be published again
                    await message.nak(delay=1)
            return len(messages)
        except _ERRORS as error:
            self._subscription = None
            raise _unavailable(error) from None

    async def _one_by_one(
        self, ledger: Ledger, batches: list[tuple[Any, Batch]]
    ) -> tuple[dict[str, int], list[tuple[Any, Batch]]]:
        """Store batches of which one is invalid. Return the watermarks, and the batches without the invalid ones."""
        watermarks: dict[str, int] = {}
        valid = []
        for message, batch in batches:
            try:
                watermarks |= await asyncio.to_thread(ledger.apply, [batch])
            except ValueError as error:
                log.error("a message in the stream %s is dropped: %s", STREAM, error)
                await message.term()
            else:
                valid.append((message, batch))
        return watermarks, valid

    async def _fetch(self) -> list[Any]:
        if self._subscription is None:
            try:
                self._subscription = await self._subscribe()
            except nats.js.errors.NotFoundError:
                await self._make_stream()
                self._subscription = await self._subscribe()
        try:
            messages: list[Any] = await self._subscription.fetch(_FETCH, timeout=_FETCH_S)
            return messages
        except (TimeoutError, nats.errors.TimeoutError):
            # Also if the consumer was lost with the broker's store.
            await self._stream.consumer_info(STREAM, CONSUMER)
            return []

    async def _subscribe(self) -> Any:
        config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, ack_wait=30, max_ack_pending=1000)
        return await self._stream.pull_subscribe(f"{SUBJECT}.>", CONSUMER, stream=STREAM, config=config)

    async def _make_stream(self) -> None:
        config = StreamConfig(
            name=STREAM,
            subjects=[f"{SUBJECT}.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            # Full: publishing fails, and the events stay in the outboxes.
            discard=DiscardPolicy.NEW,
            max_bytes=_MAX_BYTES,
            duplicate_window=120,
        )
        await self._stream.add_stream(config)


class Progress:
    """What was published of one source, and what the ledger has of it."""

    def __init__(self, watermark: int) -> None:
        self.watermark = self.published = watermark
        self._moved = time.monotonic()

    def update(self, watermark: int) -> None:
        """Take over the ledger's watermark. If it stands still, publish again from there."""
        now = time.monotonic()
        if watermark != self.watermark or self.published <= watermark:
            # Lower: the ledger was restored from a copy.
            self.published = max(self.published, watermark) if watermark > self.watermark else watermark
            self.watermark, self._moved = watermark, now
        elif now - self._moved > _LOST_S:
            self.published, self._moved = watermark, now


def _batch(message: Any) -> Batch:
    headers = message.headers
    first, _, last = headers[_RANGE].partition("-")
    return Batch(
        headers[_SOURCE], int(first), int(last), int(headers[_TIME]), bytes(message.data), int(headers[_OLDEST])
    )


def _unavailable(error: BaseException) -> BrokerUnavailableError:
    reason = str(error).strip() or type(error).__name__
    return BrokerUnavailableError(f"the broker is not available: {reason.splitlines()[0]}", "check metering.broker")
