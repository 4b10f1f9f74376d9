"""Servers whose clocks differ, and servers that are killed and start again: what they admit together.

The messages are those of `Exchange`; the time is that of the test, and each server has its own clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from inferctl.serve.edge import exchange as exchanges
from inferctl.serve.edge.exchange import Exchange
from inferctl.tenancy.access import channel
from inferctl.tenancy.access.clocks import Clocks, in_own_time
from tests.tenancy.access.test_limits import KEY, Limiter, charge, worst

LIMIT = 90
BEGIN = 1_700_000_000.0


class Time:
    """In place of the module `time`: the clock of the server whose turn it is."""

    def __init__(self) -> None:
        self.now, self.offset = BEGIN, 0.0

    def time(self) -> float:
        return self.now + self.offset

    def monotonic(self) -> float:
        return self.now


class Server:
    """One start of a server. Its clock is ahead by `offset`."""

    def __init__(self, time: Time, offset: float, folder: Path) -> None:
        self.limiter = Limiter(requests=LIMIT, replicas=3, exchanges=True)
        self.exchange = Exchange(self.limiter, folder, "m", lambda _: None)
        self.time, self.offset, self.lines = time, offset, list[bytes]()
        self.limiter.send_all()

    def write(self, line: bytes) -> None:
        self.lines.append(line)

    def send(self) -> list[Any]:
        self.time.offset = self.offset
        self.limiter.update(self.time.time())
        self.exchange._send(self)  # type: ignore[arg-type]
        lines, self.lines = self.lines, []
        return [orjson.loads(line) for line in lines]

    def take(self, messages: list[Any]) -> None:
        self.time.offset = self.offset
        for message in messages:
            self.exchange._take(message)

    def admits(self) -> bool:
        self.time.offset = self.offset
        return charge(self.limiter, KEY, self.time.time()) is not None


class Servers:
    """Three servers that hear each other 50 ms later."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, offsets: Sequence[float]) -> None:
        self.time, self.folder, self.admitted = Time(), folder, list[tuple[float, int]]()
        monkeypatch.setattr(exchanges, "time", self.time)
        self.all = [Server(self.time, offset, folder) for offset in offsets]
        self.late: list[tuple[Server, list[Any]]] = []
        self.stopped: Server | None = None

    def run(self, seconds: float, *busy: int, per_step: int = 2) -> int:
        """Let time pass. Servers `busy` get requests. Returns how many were admitted."""
        before = len(self.admitted)
        for _ in range(round(seconds / 0.1)):
            late, self.late = self.late, [(each, each.send()) for each in self.all if each is not self.stopped]
            for sender, messages in late:
                for each in self.all:
                    if each is not sender:
                        each.take(messages)
            self.time.now += 0.1
            for index in busy:
                self.admitted += [(self.time.now, 1) for _ in range(per_step) if self.all[index].admits()]
        return len(self.admitted) - before

    def stop(self, index: int) -> None:
        self.stopped = self.all[index]

    def start_again(self, index: int) -> None:
        """Start a server that was killed. Whoever connects sends `AGAIN`."""
        self.all[index] = Server(self.time, self.all[index].offset, self.folder)
        for each in self.all:
            each.take([orjson.loads(channel.AGAIN)])


Make = Callable[..., Servers]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(12.0)` returns three servers, the clock of the first of which is ahead by 12 s."""
    return lambda *offsets: Servers(tmp_path, monkeypatch, (*offsets, 0.0, 0.0, 0.0)[:3])


@pytest.mark.parametrize("ahead", [0.0, 0.9, 3.5, 12.0, 31.0, 70.0, 3600.0, -3600.0])
def test_together_they_stay_within_the_limit(ahead: float, make: Make) -> None:
    servers = make(ahead)
    servers.run(10)
    for busy in ((0, 1, 2), (0,), (1, 2), (0, 1, 2)):
        servers.run(40, *busy)
    assert worst(servers.admitted) <= LIMIT + 2


@pytest.mark.parametrize("ahead", [12.0, 70.0, 3600.0])
def test_a_server_that_is_ahead_cannot_use_what_the_others_used(ahead: float, make: Make) -> None:
    servers = make(ahead)
    servers.run(10)
    assert servers.run(20, 1, 2) >= LIMIT - 2
    assert servers.run(25, 0) <= 2


@pytest.mark.parametrize("ahead", [12.0, 58.0, 3600.0])
def test_the_others_get_the_whole_limit_as_soon_as_it_is_free(ahead: float, make: Make) -> None:
    servers = make(ahead)
    servers.run(10)
    used = servers.run(2, 0)
    assert used == LIMIT / 3, "the server whose clock differs applies limit / replicas"
    assert servers.run(20, 1, 2) >= LIMIT - used - 2
    servers.run(65)
    assert servers.run(20, 1, 2) >= LIMIT - 2


def test_a_clock_that_is_ahead_is_logged(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    servers = make(12.0, 0.0, 0.5)
    with caplog.at_level(logging.WARNING):
        servers.run(20)
    ours = [record for record in caplog.records if record.name.startswith("inferctl")]
    assert len(ours) == 2, "one line of each of the others"
    assert "11.9 s ahead of this one" in caplog.text


def test_a_clock_is_judged_by_the_messages_of_some_seconds() -> None:
    clocks = Clocks()
    assert clocks.ahead("a", BEGIN - 20, BEGIN) == 0, "one message may be late"
    assert clocks.ahead("a", BEGIN - 17, BEGIN + 3) == 0
    assert clocks.ahead("a", BEGIN - 14.8, BEGIN + 5) == pytest.approx(-19.8)
    assert clocks.ahead("a", BEGIN + 6, BEGIN + 6) == 0, "the clock is right, and earlier messages were late"
    assert clocks.ahead("a", BEGIN + 17, BEGIN + 7) == 10
    assert clocks.ahead("a", BEGIN + 8, BEGIN + 8) == 10
    assert clocks.ahead("a", BEGIN + 14, BEGIN + 14) == 10, "of the window that ended"
    assert clocks.ahead("a", BEGIN + 20, BEGIN + 20) == 0, "it was set back"


def test_the_names_of_a_hostile_server_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferctl.tenancy.access.clocks._MOST", 10)
    clocks = Clocks()
    for number in range(25):
        clocks.ahead(f"{number:016x}", BEGIN, BEGIN)
    assert len(clocks._found) <= 10


@pytest.mark.parametrize(
    ("ahead", "cell"),
    [(0.0, 100), (3.9, 100), (4.0, 99), (9.0, 98), (-2.9, 100), (-3.1, 101), (-11.1, 103), (1e9, -199_999_900)],
)
def test_counters_are_moved_to_the_cells_of_this_clock(ahead: float, cell: int) -> None:
    assert in_own_time({"k": ({100: (3, 1)}, {})}, ahead) == {"k": ({cell: (3, 1)}, {})}


def test_a_server_that_is_killed_and_starts_again_does_not_get_its_share_again(make: Make) -> None:
    servers = make()
    servers.run(5)
    assert servers.run(10, 0) >= LIMIT - 2
    for _ in range(5):
        servers.stop(0)
        servers.run(1)
        servers.start_again(0)
        servers.run(0.5)
        servers.run(3, 0)
    assert worst(servers.admitted) <= LIMIT + 2


def test_a_server_that_starts_applies_its_share_until_it_has_heard_the_others(make: Make) -> None:
    servers = make()
    assert servers.run(2, 0, per_step=100) == LIMIT / 3
    assert servers.run(10, 0, per_step=100) == LIMIT * 2 / 3
