"""NATS JetStream between the machines with servers and the one with the ledger. It may lose everything.

A server's relay publishes the batches of its outboxes, and asks for the watermarks of the ledger. It frees nothing
before the ledger has it, and publishes again what does not arrive. The relay with the ledger stores what it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import zlib
from functools import partial
from typing import Any

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig

from inferctl.core.addresses import NatsAddress
from inferctl.core.errors import NotReadyError
from inferctl.tenancy import broker as brokers
from inferctl.tenancy.metering.ledger import Ledger
from inferctl.tenancy.metering.outbox import EventBatch

log = logging.getLogger("inferctl.metering")

STREAM, CONSUMER = "INFERCTL_USAGE", "ledger"
SUBJECT, WATERMARKS = "inferctl.usage", "inferctl.usage-watermarks"
_MAX_BYTES = 256 * 1024 * 1024
# Copies of the stream in a cluster of NATS, so that the loss of one server stops nothing; and the error of one server.
_COPIES, _NO_CLUSTER = 3, 10074
# A batch that the ledger does not have after this time is published again.
_LOST_S = 10.0
_FETCH, _FETCH_S = 50, 0.5
# After this, what a relay got whose connection broke goes to the next one. A message that arrives twice does no harm.
_ACK_S = 10
# A batch without its predecessor comes again after 1 s, then after twice the time, up to this one.
_MAX_DELAY_S = 16
_RANGE, _OLDEST, _TIME, _SOURCE = "Inferctl-Range", "Inferctl-Oldest", "Inferctl-Time", "Inferctl-Source"


class BrokerUnavailableError(NotReadyError):
    """The broker, or the relay with the ledger behind it, does not respond. The same call may succeed later."""


async def connect(address: NatsAddress | str) -> EventBroker:
    """Connect to NATS. Raises `BrokerUnavailableError`, and `UsageError` for an invalid address."""
    url = NatsAddress(address)
    try:
        # The client does not connect again by itself: after some errors it never would, and it keeps what it could
        # not send. The caller does, when `EventBroker.broken` says so.
        return EventBroker(url, await brokers.connect(url, brokers.TIMEOUT_S, allow_reconnect=False))
    except brokers.ERRORS as error:
        raise _unavailable(url, error) from None


class EventBroker:
    """A connection to NATS. All methods raise `BrokerUnavailableError`."""

    def __init__(self, url: NatsAddress, connection: Any) -> None:
        self._url, self._nats, self._failed = url, connection, False
        self._stream = connection.jetstream(timeout=brokers.TIMEOUT_S)
        self._subscription: Any = None

    @property
    def broken(self) -> bool:
        """Whether another connection must be made."""
        return self._failed or not self._nats.is_connected

    async def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(*brokers.ERRORS):
            await self._nats.close()

    def _failure(self, error: Exception) -> BrokerUnavailableError:
        # What JetStream rejects is no fault of the connection.
        self._failed = self._failed or not isinstance(error, nats.js.errors.APIError)
        return _unavailable(self._url, error)

    async def publish(self, batch: EventBatch) -> None:
        """Return when the broker has stored `batch`."""
        headers = {
            "Nats-Msg-Id": f"{batch.source}.{batch.first}-{batch.last}",
            _SOURCE: batch.source,
            _RANGE: f"{batch.first}-{batch.last}",
            _OLDEST: str(batch.oldest),
            _TIME: str(batch.time_ms),
        }
        subject = f"{SUBJECT}.{batch.source.partition('/')[0].replace('.', '-')}"
        try:
            try:
                await self._stream.publish(subject, batch.content, headers=headers)
            except (nats.js.errors.NotFoundError, nats.js.errors.NoStreamResponseError):
                await self._make_stream()  # the first time, and if the broker lost its store
                await self._stream.publish(subject, batch.content, headers=headers)
        except (ValueError, *brokers.ERRORS) as error:  # ValueError: the answer is no JSON
            raise self._failure(error) from None

    async def watermarks(self, sources: list[str]) -> dict[str, int]:
        """Ask the relay with the ledger up to which number it has the events of `sources`."""
        found: dict[str, int] = await self._ask(sources)
        return found

    async def totals(self) -> dict[str, Any]:
        """Ask the relay with the ledger for what it has of budgets, as of `Ledger.budgets`."""
        found: dict[str, Any] = await self._ask(None)
        return found

    async def _ask(self, sources: list[str] | None) -> Any:
        try:
            response = await self._nats.request(WATERMARKS, json.dumps(sources).encode(), timeout=brokers.TIMEOUT_S)
            return json.loads(response.data if sources is not None else zlib.decompress(response.data))
        except (nats.errors.NoRespondersError, TimeoutError) as error:  # the client's TimeoutError is one
            silent = isinstance(error, TimeoutError)
            reason = f"does not respond within {brokers.TIMEOUT_S:g} s" if silent else "is not connected"
            message = f"the relay with the ledger {reason}, through the broker {self._url}"
            raise BrokerUnavailableError(message, "start `inferctl relay --consume`") from None
        except (ValueError, *brokers.ERRORS) as error:
            raise self._failure(error) from None

    async def answer(self, ledger: Ledger) -> None:
        """Answer what `watermarks` and `totals` ask, from now on."""

        async def answer(message: Any) -> None:
            # Without an answer, the other side asks again.
            with contextlib.suppress(NotReadyError, ValueError, *brokers.ERRORS):
                sources = json.loads(message.data)
                ask = partial(ledger.budgets, time.time()) if sources is None else partial(ledger.watermarks, sources)
                content = json.dumps(await asyncio.to_thread(ask)).encode()
                # 9,000 counters of budgets have 900 kB, and a message at most 1 MiB.
                await message.respond(content if sources is not None else zlib.compress(content))

        try:
            await self._nats.subscribe(WATERMARKS, queue=CONSUMER, cb=answer)
        except brokers.ERRORS as error:
            raise self._failure(error) from None

    async def store(self, ledger: Ledger) -> int:
        """Store the next messages in `ledger`, and return how many there were.

        Raises also `DatabaseUnavailableError`. The broker then delivers the messages again.
        """
        try:
            messages = await self._fetch()
            batches: list[tuple[Any, EventBatch]] = []
            for message in messages:
                try:
                    batches.append((message, _batch(message)))
                except (KeyError, ValueError, TypeError):
                    log.error("a message in the stream %s is no batch of usage events; it is dropped", STREAM)
                    await message.term()
            watermarks = await asyncio.to_thread(ledger.apply, [batch for _, batch in batches])
            for message, batch in batches:
                if batch.last <= watermarks.get(batch.source, 0):
                    await message.ack()
                else:  # its predecessor was lost, and will be published again
                    # Redelivered messages come before new ones. So they must not come so often that no other does.
                    await message.nak(delay=min(2 ** (message.metadata.num_delivered - 1), _MAX_DELAY_S))
            return len(messages)
        except (ValueError, *brokers.ERRORS) as error:
            subscription, self._subscription = self._subscription, None
            if subscription:  # otherwise, nobody would read what the broker sends to it
                with contextlib.suppress(*brokers.ERRORS):
                    await subscription.unsubscribe()
            raise self._failure(error) from None

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
        config = ConsumerConfig(
            durable_name=CONSUMER,
            filter_subject=f"{SUBJECT}.>",
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=_ACK_S,
            # All messages may wait for a predecessor, which is published again behind them.
            max_ack_pending=-1,
        )
        await self._stream.add_consumer(STREAM, config)  # also changes one of an earlier version
        return await self._stream.pull_subscribe_bind(CONSUMER, stream=STREAM)

    async def _make_stream(self) -> None:
        config = StreamConfig(
            name=STREAM,
            subjects=[f"{SUBJECT}.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            # Full: publishing fails, and the events stay in the outboxes.
            discard=DiscardPolicy.NEW,
            max_bytes=_MAX_BYTES,
            duplicate_window=120,
            num_replicas=_COPIES,
        )
        try:
            await self._stream.add_stream(config)
        except nats.js.errors.APIError as error:
            if error.err_code != _NO_CLUSTER:
                raise
            await self._stream.add_stream(config, num_replicas=1)


class PublishProgress:
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


def _batch(message: Any) -> EventBatch:
    """Return the batch in a message, with events that the ledger can store. Raises an error for anything else."""
    headers = message.headers
    first, _, last = headers[_RANGE].partition("-")
    numbers = int(first), int(last), int(headers[_TIME])
    batch = EventBatch(headers[_SOURCE], *numbers, bytes(message.data), int(headers[_OLDEST]))
    if not batch.events:
        raise ValueError("no events")
    return batch


def _unavailable(url: NatsAddress, error: Exception) -> BrokerUnavailableError:
    # Also the TimeoutError of the client, whose text is only `nats: timeout`.
    late = isinstance(error, TimeoutError)
    reason = f"no response within {brokers.TIMEOUT_S:g} s" if late else brokers.reason(error)
    return BrokerUnavailableError(f"the broker {url} is not available: {reason}", "check metering.broker")
