"""The exchange of a relay, with a real NATS: errors of the broker, and lines that it does not pass on."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import nats as client
import pytest

from inferctl.tenancy.access import channel
from inferctl.tenancy.fleet import broker
from inferctl.tenancy.fleet.broker import FleetBroker, FleetBrokerError
from inferctl.tenancy.relay.exchange import ExchangeRelay
from tests.processes import free_port
from tests.tenancy.parts import Nats, Part

LINE = b'{"sender": 1}\n'


async def until(condition: Callable[[], object]) -> None:
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError


class Connected:
    """A relay, and one API process of the server `m` that is connected to it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder, self.changes = folder, 0
        self.relay = ExchangeRelay(folder, url, self._change)

    def _change(self) -> None:
        self.changes += 1

    @property
    def subscribed(self) -> bool:
        return self.relay._broker is not None and "m" in self.relay._subscribed

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.relay.run())
        path = Path(channel.address(self.folder))
        await until(path.exists)
        self.reader, self.writer = await asyncio.open_unix_connection(path, limit=channel.MAX_LINE)
        self.writer.write(b"m\n")
        try:
            yield
        finally:
            self.writer.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def next(self) -> bytes:
        """Return the next line that is not `AGAIN`."""
        while (line := await asyncio.wait_for(self.reader.readline(), 20)) == channel.AGAIN:
            pass
        return line


async def test_only_what_belongs_to_a_subject_is_passed_on(nats: Nats, tmp_path: Path) -> None:
    found = Connected(nats.url, tmp_path)
    async with found.run():
        await until(lambda: found.subscribed)
        assert Path(channel.address(tmp_path)).stat().st_mode & 0o777 == 0o600
        other = await client.connect(nats.url)
        revoke = json.dumps({"revoked": ["aaaaaaaaaaaa"]}).encode()
        long = json.dumps({"x": "a" * channel.MAX_LINE}).encode()
        for content in (revoke, b'{"\\u0072evoked": []}', b"[]", b"{", b"", long):
            await other.publish(f"{broker.LIMITS}.m", content)
        for content in (LINE.strip(), b'{"again": true}', b'{"revoked": [], "sender": 1}', b"null", long):
            await other.publish(broker.KEYS, content)
        await other.flush()
        await asyncio.sleep(0.3)
        assert found.changes == 0
        await other.publish(broker.KEYS, revoke)
        await other.flush()
        assert json.loads(await found.next()) == {"revoked": ["aaaaaaaaaaaa"]}
        assert found.changes == 1
        await other.publish(f"{broker.LIMITS}.m", LINE.strip())
        await other.flush()
        assert await found.next() == LINE
        await other.close()


async def test_a_connection_that_ended_for_ever_is_made_again(nats: Nats, tmp_path: Path) -> None:
    found = Connected(nats.url, tmp_path)
    async with found.run():
        await until(lambda: found.subscribed)
        first = found.relay._broker
        assert first
        # As when the broker says it. The client then closes, and does not connect again.
        await first._nats._process_err("'user authentication expired'")
        await until(lambda: found.subscribed and found.relay._broker is not first)
        other = await client.connect(nats.url)
        await other.publish(f"{broker.LIMITS}.m", LINE.strip())
        await other.flush()
        assert await found.next() == LINE
        await other.close()


def test_a_subject_that_the_broker_forbids_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    user = f'{{user: a, password: b, permissions: {{publish: ">", subscribe: {{deny: "{broker.KEYS}"}}}}}}'
    (tmp_path / "n.conf").write_text(f"listen: 127.0.0.1:{port}\nauthorization {{ users: [{user}] }}\n")
    server = Part(["nats-server", "-c", str(tmp_path / "n.conf")])
    server.start()

    async def run() -> None:
        found = Connected(f"nats://a:b@127.0.0.1:{port}", tmp_path)
        async with found.run():
            await until(lambda: "rejects something" in caplog.text)
            assert broker.KEYS in caplog.text

    try:
        with caplog.at_level(logging.WARNING):
            asyncio.run(run())
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("authorization", "credentials"),
    [
        ('user: "u@x", password: "p/@:#?% +&"', "u%40x:p%2F%40%3A%23%3F%25%20%2B%26"),
        ('token: "t/@:#?% +&"', "t%2F%40%3A%23%3F%25%20%2B%26"),
    ],
)
def test_credentials_with_special_characters_connect(nats: Nats, authorization: str, credentials: str) -> None:
    nats.kill()
    with Path(nats.command[-1]).open("a") as config:
        config.write(f"authorization {{ {authorization} }}\n")
    nats.start()
    host = nats.url.removeprefix("nats://")

    async def connect(address: str) -> None:
        await (await FleetBroker.connect(address)).close()

    asyncio.run(connect(f"nats://{credentials}@{host}"))
    asyncio.run(connect(f"{credentials}@{host}"))
    with pytest.raises(FleetBrokerError) as failed:
        asyncio.run(connect(f"wrong{credentials}@{host}"))
    assert "%2F" not in failed.value.message and "***@" in failed.value.message
