"""The HTTP sink, with a real server that fails now and then."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from inferctl.config.spec import Access, Metering
from inferctl.core.addresses import WebAddress
from inferctl.core.errors import UsageError
from inferctl.tenancy.metering import cloud_event, sink
from inferctl.tenancy.metering.ledger import Ledger
from inferctl.tenancy.metering.outbox import Outbox
from inferctl.tenancy.metering.recorder import EventRecorder
from inferctl.tenancy.relay.relay import Relay
from tests.http_servers import Handler, serving
from tests.tenancy.parts import ORIGIN, batch, end, event


@dataclass
class Product:
    """A metering product. `statuses`: of its next responses, then 204."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    requests: list[tuple[dict[str, str], list[dict[str, Any]]]] = field(default_factory=list)


@pytest.fixture
def product() -> Iterator[Product]:
    found = Product()

    class Events(Handler):
        def do_POST(self) -> None:
            found.requests.append((dict(self.headers), json.loads(self.body())))
            status = found.statuses.pop(0) if found.statuses else 204
            self.reply(status, **({"location": f"{found.url}/login"} if 300 <= status < 400 else {}))

        def do_GET(self) -> None:
            found.requests.append((dict(self.headers), []))
            self.reply()

    with serving(Events) as port:
        found.url = f"http://127.0.0.1:{port}/api/v1/events"
        yield found


def test_each_event_is_sent_once_as_it_was_recorded(ledger: Ledger, product: Product) -> None:
    first = batch("a/1", 1, 600)
    ledger.apply([first, end("a/1", 601, 601, clean=True), batch("a/2", 1, 2), batch("other/1", 1, 5)])
    assert [sink.send(ledger, WebAddress(product.url), "a/", "token") for _ in range(5)] == [500, 100, 2, 0, 0]
    headers, events = product.requests[0]
    assert headers["Content-Type"] == "application/cloudevents-batch+json"
    assert headers["Authorization"] == "Bearer token"
    assert len(events) == 500
    assert events[0] == cloud_event.read(first.source, first.content)[0].as_cloud_event("a/1")
    assert events[0]["time"] == "2026-09-21T14:13:20.000Z"
    assert sink.send(ledger, WebAddress(product.url), "") == 5


def test_a_sink_that_fails_gets_the_same_events_again(ledger: Ledger, product: Product) -> None:
    ledger.apply([batch("a/1", 1, 5)])
    product.statuses = [503, 500]
    for _ in range(2):
        with pytest.raises(sink.SinkUnavailableError, match="status 50"):
            sink.send(ledger, WebAddress(product.url), "")
    assert sink.send(ledger, WebAddress(product.url), "") == 5
    assert [len(events) for _, events in product.requests] == [5, 5, 5]
    with pytest.raises(sink.SinkUnavailableError):
        ledger.apply([batch("a/1", 6, 7)])
        sink.send(ledger, WebAddress("http://127.0.0.1:1/"), "")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_so_no_event_and_no_token_is_lost(
    ledger: Ledger, product: Product, status: int
) -> None:
    ledger.apply([batch("a/1", 1, 3)])
    product.statuses = [status]
    with pytest.raises(sink.SinkUnavailableError, match=f"status {status}"):
        sink.send(ledger, WebAddress(product.url), "", "token")
    assert len(product.requests) == 1
    assert sink.send(ledger, WebAddress(product.url), "", "token") == 3


def test_an_error_of_a_sink_has_no_query(ledger: Ledger) -> None:
    ledger.apply([batch("a/1", 1, 5)])
    with pytest.raises(sink.SinkUnavailableError) as found:
        sink.send(ledger, WebAddress("http://127.0.0.1:1/?key=geheim"), "")
    assert "geheim" not in found.value.message


def test_a_relay_sends_to_the_sink(tmp_path: Path, product: Product) -> None:
    recorder = EventRecorder(Outbox.create(tmp_path / "m", 1 << 20), ORIGIN)
    for _ in range(10):
        recorder.record(event())
    assert recorder.close(5)
    (tmp_path / "token").write_text("secret\n")
    settings = Metering(data=str(tmp_path / "m"), sink=product.url, sink_token_file=str(tmp_path / "token"))

    async def run() -> None:
        relay = Relay(settings, Access())
        working = asyncio.create_task(relay.run())
        while sum(len(events) for _, events in product.requests) < 10:
            await asyncio.sleep(0.05)
        relay.end()
        await working

    asyncio.run(asyncio.wait_for(run(), 60))
    headers, events = product.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert [event["id"] for event in events] == [str(number) for number in range(1, 11)]


def test_a_sink_that_takes_long_does_not_delay_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, data = threading.Event(), tmp_path / "m"
    monkeypatch.setattr(sink, "send", lambda *_: not answered.wait(60))
    recorder = EventRecorder(Outbox.create(data, 1 << 20), ORIGIN)

    def stored() -> int:
        with (
            contextlib.suppress(UsageError),
            contextlib.closing(Ledger.read(f"sqlite:///{data}/ledger.sqlite")) as found,
        ):
            return sum(row["requests"] for row in found.usage(["key"], 0, 2**62))
        return 0

    async def run() -> None:
        relay = Relay(Metering(data=str(data), sink="http://127.0.0.1:1/"), Access())
        working = asyncio.create_task(relay.run())
        for count in (1, 2, 3):
            recorder.record(event())
            while stored() < count:
                await asyncio.sleep(0.05)
        answered.set()
        relay.end()
        await working

    asyncio.run(asyncio.wait_for(run(), 30))
    assert recorder.close(5)
