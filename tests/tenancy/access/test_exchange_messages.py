"""Messages of other servers: what is not one of them changes nothing, and costs little."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferctl.serve.edge import exchange as exchanges
from inferctl.serve.edge.exchange import Exchange
from inferctl.tenancy.access import key_table
from inferctl.tenancy.access.key_table import KeyTable
from inferctl.tenancy.access.limits import Limiter
from tests.tenancy.key_files import add

SENDER = "0123456789abcdef"


def message(**fields: object) -> dict[str, Any]:
    cell = int(time.time() // 5)
    counters = {"aaaaaaaaaaaa": [[[cell, 3, 1]], []]}
    return {"sender": SENDER, "counted_by": SENDER, "sent": time.time(), "counters": counters, **fields}


@pytest.fixture
def revoked() -> list[str]:
    return []


@pytest.fixture
def limiter() -> Limiter:
    return Limiter(replicas=2, exchanges=True)


@pytest.fixture
def exchange(limiter: Limiter, revoked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exchange:
    monkeypatch.setattr(exchanges, "_LISTEN_S", 0.0)
    return Exchange(limiter, tmp_path, "m", revoked.extend)


def receive(exchange: Exchange, *lines: bytes) -> None:
    """Let lines arrive, and then the end."""

    async def run() -> None:
        reader = asyncio.StreamReader()
        for line in lines:
            reader.feed_data(line + b"\n")
        reader.feed_eof()
        await exchange._receive(reader)

    asyncio.run(run())


def counted(*cells: object) -> dict[str, Any]:
    return {"counters": {"aaaaaaaaaaaa": [list(cells), []]}}


@pytest.mark.parametrize(
    "fields",
    [
        {"sender": "x"},
        {"counted_by": ""},
        {"counted_by": SENDER + "0"},
        {"sent": "nan"},
        {"sent": "-inf"},
        {"sent": None},
        {"clock": "inf"},
        {"clock": None},
        counted([1, -500, 0]),
        counted([1, 5, 6]),
        counted([1, 1 << 53, 0]),
        counted([1, 2.5, 0]),
        counted([1, True, 0]),
        counted(["1", 5, 0]),
        counted([1, 5]),
        counted(*([number, 1, 0] for number in range(27))),
        {"counters": {f"{number:012}": [[], []] for number in range(1001)}},
        {"counters": {"a" * 201: [[], []]}},
        {"counters": []},
        {"counters": None},
    ],
)
def test_what_no_server_sends_changes_nothing(
    exchange: Exchange, limiter: Limiter, fields: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        receive(exchange, *[orjson.dumps(message(**fields))] * 50)
    assert (limiter._heard, limiter._usages) == ({}, {})
    # asyncio may log what a client of an earlier test left.
    ours = [record for record in caplog.records if record.name.startswith("inferctl")]
    assert len(ours) == 1, "not one line for each message"
    receive(exchange, orjson.dumps(message()))
    assert set(limiter._heard) == {SENDER}
    assert limiter._usages["aaaaaaaaaaaa"].windows[0].foreign_total == 2


def test_a_flood_of_messages_leaves_time_for_requests(exchange: Exchange) -> None:
    """Also if all of them have arrived, so that no read has to wait. CPU time: other processes may run meanwhile."""
    cell = int(time.time() // 5)
    counters = {f"{number:012}": [[[cell, 1, 0]], [[cell, 5, 0]]] for number in range(1000)}
    busy = list[float]()

    async def run() -> None:
        reader = asyncio.StreamReader()
        for number in range(20):
            other = message(counted_by=f"{number:016x}", counters=counters)
            reader.feed_data(orjson.dumps(other) + b"\n")
        reader.feed_eof()
        receiving = asyncio.create_task(exchange._receive(reader))
        while not receiving.done():
            started = time.thread_time()
            await asyncio.sleep(0)
            busy.append(time.thread_time() - started)

    started = time.thread_time()
    asyncio.run(run())
    assert sum(each for each in busy if each > 0.001) < 0.75 * (time.thread_time() - started)


def test_a_server_does_not_hear_itself(exchange: Exchange, limiter: Limiter) -> None:
    receive(exchange, orjson.dumps(message(sender=exchange._this)))
    assert (limiter._heard, limiter._usages) == ({}, {})


def test_only_ids_of_keys_are_revoked(exchange: Exchange, revoked: list[str]) -> None:
    ids = ["aaaaaaaaaaaa", "A" * 12, "user@example.com", "", 5, None]
    receive(exchange, orjson.dumps({"revoked": ids}), orjson.dumps({"revoked": 5}))
    assert revoked == ["aaaaaaaaaaaa"]


def test_revoked_ids_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "_MANY_REVOKED", 10)
    add(tmp_path / "keys.json")
    table = KeyTable(tmp_path / "keys.json", lambda _: None)
    table.revoke(f"{number:012}" for number in range(25))
    assert list(table._revoked) == [f"{number:012}" for number in range(15, 25)]


def test_after_an_outage_the_event_loop_is_not_occupied(exchange: Exchange, limiter: Limiter) -> None:
    """What changed meanwhile is written in parts; each says up to when its counters are."""

    class Writer:
        def __init__(self) -> None:
            self.lines: list[Any] = []

        def write(self, line: bytes) -> None:
            self.lines.append(orjson.loads(line))

    for number in range(5000):
        usage = limiter._new_usage(f"{number:012}", time.time())
        usage.windows[0].advance(int(time.time() // 5))
        usage.windows[0].charge(1, time.time())
        usage.note_change()
    limiter.send_all()
    before, writer = time.time(), Writer()
    for _ in range(10):
        exchange._send(writer)  # type: ignore[arg-type]
    sent = [each["sent"] for each in writer.lines]
    assert [len(each["counters"]) for each in writer.lines] == [500] * 10
    assert max(sent[:-1]) < before <= sent[-1]
