"""A real NATS JetStream between the outboxes and the ledger, which loses, repeats and reorders."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nats as client
import nats.js.errors
import pytest

from inferctl.config.spec import Access, Metering
from inferctl.tenancy.metering import broker as brokers
from inferctl.tenancy.metering.ledger import BUDGETS, Ledger
from inferctl.tenancy.metering.outbox import Outbox
from inferctl.tenancy.metering.recorder import EventRecorder
from inferctl.tenancy.relay.relay import Relay
from tests.processes import until
from tests.tenancy.parts import ORIGIN, Nats, batch, event

ALL = (0, 2**62)


class Fleet:
    """A recorder, the relay that publishes its events, and the relay that stores them."""

    def __init__(self, folder: Path, nats: Nats) -> None:
        self._folder, self._nats = folder, nats
        self.recorder = EventRecorder(Outbox.create(folder / "m", 1 << 24), ORIGIN)
        self.ledger_url = f"sqlite:///{folder}/ledger.sqlite"
        Ledger.open(self.ledger_url).close()
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *roles: str) -> None:
        for role in roles:
            options = ["--consume", "--ledger", self.ledger_url] if role == "ledger" else ["--data", "m"]
            command = [sys.executable, "-m", "inferctl", "relay", "--broker", self._nats.url, *options]
            log = (self._folder / f"{role}.log").open("ab")
            self.started[role] = subprocess.Popen(command, cwd=self._folder, stderr=log)

    def kill(self, role: str) -> None:
        self.started[role].kill()
        self.started[role].wait()

    def record(self, count: int) -> None:
        for _ in range(count):
            self.recorder.record(event())
            time.sleep(0.001)

    def in_broker(self) -> int:
        """How many events the broker has got."""

        async def ask() -> int:
            connection = await client.connect(self._nats.url)
            try:
                stream = connection.jetstream()
                info = await stream.stream_info(brokers.STREAM)
                last = await stream.get_msg(brokers.STREAM, info.state.last_seq) if info.state.messages else None
                return int((last.headers or {})["Inferctl-Range"].partition("-")[2]) if last else 0
            except client.js.errors.NotFoundError:
                return 0
            finally:
                await connection.close()

        return asyncio.run(ask())

    def requests(self) -> int:
        ledger = Ledger.read(self.ledger_url)
        found = sum(row["requests"] for row in ledger.usage([], *ALL))
        assert ledger.gaps(*ALL) == []
        ledger.close()
        return found

    def logs(self) -> str:
        return "".join(file.read_text() for file in self._folder.glob("*.log"))


@pytest.fixture
def fleet(tmp_path: Path, nats: Nats) -> Iterator[Fleet]:
    made = Fleet(tmp_path, nats)
    yield made
    made.recorder.close(1)
    for process in made.started.values():
        process.kill()
        process.wait()


def test_the_broker_keeps_events_while_the_ledger_is_gone(fleet: Fleet) -> None:
    fleet.record(300)
    fleet.start("publish")
    until(lambda: fleet.in_broker() == 300)
    fleet.kill("publish")
    fleet.start("ledger")
    until(lambda: fleet.requests() == 300, 60)
    assert fleet.recorder.depth == 300, "freed only when its relay hears of it"
    fleet.start("publish")
    until(lambda: fleet.recorder.depth == 0, 30)
    assert fleet.requests() == 300


def test_killed_relays_and_a_wiped_broker_lose_and_repeat_nothing(fleet: Fleet, nats: Nats) -> None:
    fleet.start("publish", "ledger")
    for role in ("publish", "ledger"):
        fleet.record(300)
        until(lambda: fleet.requests() > 0, 60)
        fleet.kill(role)
        fleet.record(100)
        if role == "publish":
            fleet.start(role)
    until(lambda: fleet.in_broker() == 800, 30)
    nats.kill()
    nats.wipe()
    fleet.record(100)
    nats.start()
    fleet.start("ledger")
    until(lambda: fleet.requests() == 900, 90)
    until(lambda: fleet.recorder.depth == 0, 60)
    assert fleet.requests() == 900
    for process in fleet.started.values():
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, fleet.logs()


def test_messages_that_repeat_are_reordered_or_are_no_events_do_no_harm(tmp_path: Path, nats: Nats) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite")

    async def run() -> None:
        broker = await brokers.connect(nats.url)
        await broker.store(ledger)  # makes the stream
        for each in (batch("a", 6, 9), batch("a", 1, 5), batch("a", 1, 5), batch("b", 1, 2)):
            await broker.publish(each)
        stream = broker._nats.jetstream()
        await stream.publish("inferctl.usage.x", b"no events")
        headers = {"Inferctl-Source": "c", "Inferctl-Range": "1-1", "Inferctl-Oldest": "1", "Inferctl-Time": "0"}
        await stream.publish(
            "inferctl.usage.x", json.dumps({"requests": [[1, 0]], "common": {}}).encode(), headers=headers
        )
        for _ in range(10):
            await broker.store(ledger)
        info = await stream.stream_info(brokers.STREAM)
        assert info.state.messages == 0, "all are acknowledged or dropped"
        await broker.close()

    asyncio.run(run())
    assert ledger.watermarks(["a", "b"]) == {"a": 9, "b": 2}
    assert [row["requests"] for row in ledger.usage(["source"], *ALL)] == [9, 2]
    ledger.close()


def test_any_number_of_batches_can_wait_for_their_predecessor(
    tmp_path: Path, nats: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is published again behind them. Before, 1,000 of them kept it out for ever."""
    monkeypatch.setattr(brokers, "_MAX_DELAY_S", 2)
    ledger, count = Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite"), 1100

    async def run() -> None:
        broker = await brokers.connect(nats.url)
        stored = await broker.store(ledger)  # makes the stream
        for number in range(2, count + 1):
            await broker.publish(batch("a", number, number))
        while stored < count:  # each of them was delivered
            stored += await broker.store(ledger)
        await broker.publish(batch("a", 1, 1))
        async with asyncio.timeout(90):
            while ledger.watermarks(["a"]) != {"a": count}:
                await broker.store(ledger)
        await broker.close()

    asyncio.run(run())
    ledger.close()


def test_a_broker_that_never_was_there_is_an_error() -> None:
    """Otherwise the relay waits in its first step for ever: it says nothing, and SIGTERM does not end it."""

    async def connect() -> None:
        async with asyncio.timeout(30):
            await brokers.connect("nats://user:secret@127.0.0.1:1")

    expected = r"nats://\*\*\*@127\.0\.0\.1:1 .*Connect call failed"
    with pytest.raises(brokers.BrokerUnavailableError, match=expected) as error:
        asyncio.run(connect())
    assert "secret" not in error.value.message


@pytest.mark.parametrize("how", ["error", "killed"])
async def test_a_connection_that_ended_is_made_again(nats: Nats, tmp_path: Path, how: str) -> None:
    """After some errors, the client of NATS closes for ever, or does not read any more."""
    settings = {"mode": "on", "broker": nats.url, "ledger": f"sqlite:///{tmp_path}/ledger.sqlite"}
    relay = Relay(Metering.model_validate(settings), Access.model_validate({}), consume=True)

    async def stored(number: int) -> None:
        """Publish a batch, and wait until the relay says that the ledger has it."""
        async with asyncio.timeout(60):
            while True:
                try:
                    broker = await brokers.connect(nats.url)
                    await broker.publish(batch("a", number, number))
                    while (await broker.watermarks(["a"])).get("a", 0) < number:
                        await asyncio.sleep(0.05)
                    await broker.close()
                    return
                except brokers.BrokerUnavailableError:
                    await asyncio.sleep(0.2)

    running = asyncio.create_task(relay.run())
    await stored(1)
    first = relay._broker
    assert first
    if how == "killed":
        nats.kill()
        nats.start()
    else:
        await first._nats._process_err("'user authentication expired'")
    await stored(2)
    assert relay._broker is not first
    with relay._ledger._transaction() as connection:  # more than a message of NATS has
        rows = [
            {"account": "k", "label": "total", "run": f"{n:0250}", "window_end": 0, "spent": n} for n in range(5000)
        ]
        connection.execute(BUDGETS.insert(), rows)
    broker = await brokers.connect(nats.url)
    assert len((await broker.totals())["spent"]) == 5000
    await broker.close()
    relay.end()
    await running


async def test_a_silent_broker_is_an_error_that_names_it(nats: Nats, tmp_path: Path) -> None:
    broker = await brokers.connect(nats.url)
    await broker.publish(batch("a", 1, 1))
    nats.signal(signal.SIGSTOP)
    try:
        with pytest.raises(brokers.BrokerUnavailableError, match=f"{nats.url} is not available: no response"):
            await broker.publish(batch("a", 2, 2))
    finally:
        nats.signal(signal.SIGCONT)
    assert broker.broken
    await broker.close()


async def test_without_the_relay_of_the_ledger_the_connection_is_kept(nats: Nats) -> None:
    broker = await brokers.connect(nats.url)
    with pytest.raises(brokers.BrokerUnavailableError, match="relay with the ledger is not connected"):
        await broker.watermarks(["a"])
    assert not broker.broken
    await broker.close()
    assert broker.broken
