"""Budgets: their windows, the cost of a request, and what servers together spend while messages or servers get lost."""

from __future__ import annotations

import json
import os
import random
import resource
from collections import Counter
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from inferctl.config.budget import UNITS, amount, parse
from inferctl.tenancy.access.budgets import EXCEEDED, PENDING, TOTALS_FILE, UNAVAILABLE, BudgetError, Budgets, Hold
from inferctl.tenancy.metering.prices import PriceBook, TokenPrice


def unix(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


NOW = unix("2026-12-02T12:00:00Z")


def book(*prices: dict[str, Any]) -> dict[str, PriceBook]:
    common = {"hardware": "*", "currency": "EUR", "from": "2026-01-01"}
    valid = sorted((TokenPrice.model_validate(common | each) for each in prices), key=lambda one: one.start)
    return {"EUR": PriceBook("prices.yaml", "EUR", tuple(reversed(valid)))}


UNIT = book({"input": 1_000_000})  # one unit of money per token

WINDOWS = [
    ("day", "2026-12-02T23:59:59Z", "2026-12-02", "2026-12-03T00:00:00Z"),
    ("day", "2026-12-03T00:00:00Z", "2026-12-03", "2026-12-04T00:00:00Z"),
    ("month", "2026-12-31T23:59:59Z", "2026-12", "2027-01-01T00:00:00Z"),
    ("month", "2028-02-29T12:00:00Z", "2028-02", "2028-03-01T00:00:00Z"),
    ("week", "2027-01-03T23:00:00Z", "2026-W53", "2027-01-04T00:00:00Z"),
    ("total", "2026-12-02T00:00:00Z", "total", "1970-01-01T00:00:00Z"),
    # In Berlin, December begins an hour earlier. The days on which its clocks change have 23 and 25 hours.
    ("month Europe/Berlin", "2026-11-30T23:30:00Z", "2026-12 Europe/Berlin", "2026-12-31T23:00:00Z"),
    ("day Europe/Berlin", "2026-03-29T12:00:00Z", "2026-03-29 Europe/Berlin", "2026-03-29T22:00:00Z"),
    ("day Europe/Berlin", "2026-10-25T12:00:00Z", "2026-10-25 Europe/Berlin", "2026-10-25T23:00:00Z"),
    ("day Asia/Kathmandu", "2026-12-02T18:15:00Z", "2026-12-03 Asia/Kathmandu", "2026-12-03T18:15:00Z"),
    ("week America/New_York", "2026-12-07T04:59:59Z", "2026-W49 America/New_York", "2026-12-07T05:00:00Z"),
]


@pytest.mark.parametrize(("period", "at", "label", "end"), WINDOWS)
def test_a_window_is_a_calendar_period_of_its_time_zone(period: str, at: str, label: str, end: str) -> None:
    assert parse("k", f"1 EUR/{period}").window(unix(at)) == (f"EUR {label}", unix(end))


TEXTS: list[tuple[str, tuple[int, bool] | None]] = [
    ("50 EUR/month", (50 * UNITS, False)),
    ("0.000000001 $/day soft", (1, True)),
    ("1.5 EUR/week UTC soft", (1_500_000_000, True)),
    ("1 €/day", (UNITS, False)),
    *((text, None) for text in ("1 E=R/day", "1 E,R/day", "1 \x1b/day", "٥٠ EUR/day", "")),  # a header has it
    *((text, None) for text in ("50", "50 EUR", "50EUR/day", "-1 EUR/day", "1e3 EUR/day", "1 EUR/year")),
    *((text, None) for text in ("1.0000000001 EUR/day", "1 EUR/day Mars/X", "1 EUR/day ../../etc/passwd")),
]


@pytest.mark.parametrize(("text", "found"), TEXTS)
def test_a_budget_is_an_exact_amount_for_a_period(text: str, found: tuple[int, bool] | None) -> None:
    if found is None:
        with pytest.raises(ValueError, match=r"not a (budget|time zone)"):
            parse("k", text)
        return
    assert parse("k", text)[1::4] == found
    assert Fraction(amount(found[0])) * UNITS == found[0]


def test_the_cost_of_tokens_is_that_of_the_price_book_rounded_up() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        names = ("input", "cached", "output")
        prices = {name: round(draw.choice((0.0, draw.uniform(0, 3), draw.uniform(0, 500))), 5) for name in names}
        tokens = [draw.choice((0, draw.randrange(10), draw.randrange(10**6))) for _ in names]
        rate = book(prices)["EUR"].rate("l4", "m", "2026-12-02")
        exact = sum(Fraction(str(price)) * n for price, n in zip(prices.values(), tokens, strict=True)) / 1_000_000
        assert 0 <= Fraction(rate.cost(*tokens), UNITS) - exact < Fraction(1, UNITS)
        assert rate.cost(*tokens) <= rate.most(tokens[0] + tokens[1], tokens[2])


def opened(folder: Path, books: dict[str, PriceBook] = UNIT) -> Budgets:
    """One server, which knows that the ledger has nothing."""
    found = Budgets({}, books, folder)
    found.open("a", NOW)
    (folder / TOTALS_FILE).write_text(json.dumps({"at": NOW, "totals": {"spent": [], "ended": []}}))
    found.read_totals(NOW)
    return found


def result(budgets: Budgets, budget: str, tokens: int, now: float = NOW) -> str | Hold:
    try:
        return budgets.reserve([parse("k", budget)], "m", tokens, 0, now)
    except BudgetError as error:
        return error.code


def test_reservations_and_prices_belong_to_the_admission(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The price changes on the next day, the clock jumps, and a window ends while a request runs."""
    budgets = opened(tmp_path, book({"input": 1_000_000}, {"input": 2_000_000, "from": "2026-12-03"}))
    budget, tomorrow = "10 EUR/day", NOW + 86_400
    steps: list[tuple[str, int, float, str | None]] = [
        (budget, 6, NOW, None),
        (budget, 5, NOW, PENDING),  # 6 are reserved
        (budget, 11, NOW, EXCEEDED),
        (budget, 5, tomorrow, None),  # at the new price
        (budget, 1, tomorrow, PENDING),
        (budget, 5, NOW, PENDING),  # the clock was set back: the earlier window goes on
    ]
    first, *_, later, _, _ = (result(budgets, text, tokens, now) for text, tokens, now, _ in steps)
    assert isinstance(first, Hold)
    assert isinstance(later, Hold)
    assert first.settle(4, 0, 0).cost == 4 * UNITS, "at its own price, after midnight"
    assert first.settle(6, 0, 0).cost == 4 * UNITS, "only once"
    assert later.settle(5, 0, 0)[6:8] == (10 * UNITS, 0)
    assert [record.message.rpartition(" ")[2] for record in caplog.records] == ["100%"]
    for at in (NOW + 9 * 86_400, NOW):  # a jump forgets no window
        os.utime(tmp_path / TOTALS_FILE, (at, at))
        budgets.read_totals(at)
    found, reached, low = list[str | Hold](), list[list[int]](), "3 EUR/day"
    tries = (budget, 1, tomorrow), (budget, 7, NOW), (low, 1, NOW), (budget, 6, NOW), (f"{low} soft", 9, NOW)
    for text, tokens, now in tries:
        found.append(result(budgets, text, tokens, now))
        reached.append([budgets.reached(level, now) for level in (80, 100)] + [budgets.reached(80, now + 86_400)])
    assert reached == [[1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]], "also if nothing was spent since then"
    assert found[:3] == [EXCEEDED] * 3, "of the next day, of this one, and a lower limit"
    assert [record.message.rpartition(" ")[2] for record in caplog.records[1:]] == ["100%"], "of the lower limit"
    assert all(isinstance(each, Hold) for each in found[3:])


CANNOT: list[tuple[list[str], dict[str, PriceBook]]] = [
    (["1 EUR/day"], book({"input": 1, "engine_second": 1})),
    (["1 EUR/day"], book({"input": 1, "from": "2027-01-01"})),
    (["1 EUR/day"], {}),
    (["1 USD/day"], UNIT),
    (["1 EUR/day", "1 USD/day"], UNIT),
]


@pytest.mark.parametrize(("texts", "books"), CANNOT)
def test_what_has_no_certain_price_is_unavailable(
    texts: list[str], books: dict[str, PriceBook], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError) as error:
        opened(tmp_path, books).reserve([parse("k", text) for text in texts], "m", 1, 0, NOW)
    assert error.value.code == UNAVAILABLE


def test_a_full_disk_and_a_counter_without_a_name_lose_nothing(tmp_path: Path) -> None:
    budgets, most = opened(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert isinstance(result(budgets, "9 EUR/day", 2), Hold)
    both = [parse("k", "9 EUR/day"), parse("last", "9 EUR/day")]
    for number in range(63):  # what a file has without growing
        budgets.check([parse(str(number), "9 EUR/day")], NOW)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, most[1]))
    try:
        for _ in range(2):
            with pytest.raises(BudgetError, match="cannot be written"):
                budgets.reserve(both, "m", 3, 0, NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert budgets.reserve(both, "m", 4, 0, NOW).use()[6:8] == (0, 6 * UNITS)
    (file,) = (tmp_path / "budgets").iterdir()
    budgets.__dict__["_file"].close()
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"last", "EUR', b'"last", "E\0\0'))
    assert [result(opened(tmp_path), "9 EUR/day", tokens) for tokens in (4, 10)] == [PENDING, EXCEEDED]


BUDGET, LIMIT, LARGEST = "600 EUR/month", 600, 9
SECONDS, STEPS = 0.1, 300


class Fleet:
    """Three servers, a network that loses, delays and cuts, and a ledger. `cut`: a server that nobody hears."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.folder, self.time, self.starts = random.Random(seed), folder, 0.0, 0
        self.cut = -1
        self.mail: list[tuple[float, int, Any]] = []
        self.spent, self.ended = Counter[str](), list[str]()
        self.holds: list[list[Hold]] = [[], [], []]
        self.servers = [self.start(number) for number in range(3)]

    def start(self, number: int) -> Budgets:
        self.starts += 1
        found = Budgets({}, UNIT, self.folder / str(number), 3, exchanges=True)
        found.open(f"run{self.starts}", NOW + self.time)
        return found

    def kill(self, number: int) -> None:
        """Kill a server and what is in flight, and start it again. The ledger has what it spent."""
        server, self.holds[number] = self.servers[number], []
        server.__dict__["_file"].close()
        self.ended.append(server.run)
        self.servers[number] = self.start(number)

    def step(self, loss: float) -> None:
        self.time += SECONDS
        for sender, server in enumerate(self.servers):
            message = json.dumps(server.message(self.time))
            for receiver in range(3) if message != "null" else ():
                if receiver != sender and self.cut not in (sender, receiver) and self.random.random() >= loss:
                    delay = self.random.choice((0.01, 0.05, 0.3 if loss else 0.05))
                    self.mail.append((self.time + delay, receiver, json.loads(message)))
        due = sorted((each for each in self.mail if each[0] <= self.time + SECONDS), key=lambda each: each[0])
        self.mail = [each for each in self.mail if each[0] > self.time + SECONDS]
        for _, receiver, message in due:
            self.servers[receiver].take(message, self.time)

    def store(self) -> None:
        """Let the relays write what the ledger has."""
        spent = [["k", *parse("k", BUDGET).window(NOW), run, units] for run, units in sorted(self.spent.items())]
        content = {"at": NOW + self.time, "totals": {"spent": spent, "ended": [*self.ended]}}
        for number, server in enumerate(self.servers):
            file = self.folder / str(number) / TOTALS_FILE
            file.write_text(json.dumps(content))
            os.utime(file, (NOW + self.time, NOW + self.time))
            server.read_totals(NOW + self.time)

    def request(self, number: int, tokens: int) -> str:
        found = result(self.servers[number], BUDGET, tokens)
        if isinstance(found, str):
            return found
        self.holds[number].append(found)
        return "admitted"

    def settle(self, number: int) -> None:
        hold = self.holds[number].pop(self.random.randrange(len(self.holds[number])))
        most = hold.most // UNITS
        self.spent[self.servers[number].run] += hold.settle(self.random.randint(most // 2, most), 0, 0).cost

    @property
    def total(self) -> int:
        return self.spent.total() // UNITS


def test_servers_that_lost_their_folders_wait_for_the_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(tmp_path, 0)

    def codes() -> list[str]:
        for _ in range(40):
            fleet.step(0.0)
        return [fleet.request(number, 1) for number in range(3)]

    assert codes() == [UNAVAILABLE] * 3, "they only tell each other that nothing is spent"
    fleet.store()
    assert codes() == ["admitted"] * 3
    for number in range(3):
        fleet.kill(number)
    assert codes() == ["admitted"] * 3, "all have their folders"
    for tokens in (240, 9, 1):  # together, they reach 80% after the second one
        for server in fleet.servers[:2]:
            server.reserve([parse("k", f"{BUDGET} soft")], "m", tokens, 0, NOW).settle(tokens, 0, 0)
        codes()
    assert [record.message.rpartition(" ")[2] for record in caplog.records].count("80%") == 2, "on each"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("trouble", ["none", "loss", "cut", "kills", "all"])
def test_servers_together_stay_within_a_budget(trouble: str, seed: int, tmp_path: Path) -> None:
    """The oracle is the sum of what requests cost, which no server computes."""
    fleet = Fleet(tmp_path, seed)
    busy = fleet.random.choice(((1, 1, 1), (1, 0, 0), (8, 1, 0)))
    for turn in range(STEPS):
        if trouble in ("cut", "all") and turn % 40 == 20:
            fleet.cut = fleet.random.randrange(3) if fleet.cut < 0 else -1
        if trouble in ("kills", "all") and turn % 30 == 10:
            fleet.kill(fleet.random.randrange(3))
        if turn % 50 == 0:
            fleet.store()
        fleet.step(0.2 if trouble in ("loss", "all") else 0.0)
        for number in range(3):
            for _ in range(fleet.random.randrange(4) * busy[number]):
                code = fleet.request(number, fleet.random.randint(1, LARGEST))
                assert code != EXCEEDED or fleet.total > LIMIT - 2 * LARGEST, "a false 429"
            while fleet.holds[number] and fleet.random.random() < 0.7:
                fleet.settle(number)
        held = sum(each.most for holds in fleet.holds for each in holds) // UNITS
        assert fleet.total + held <= LIMIT + 2 * LARGEST
    fleet.cut = -1
    for turn in range(80):  # all hear each other again, and the ledger has everything: the rest can be spent
        fleet.step(0.0)
        if turn == 20:
            fleet.store()
        for number in range(3):
            while fleet.holds[number]:
                fleet.settle(number)
            fleet.request(number, fleet.random.randint(1, LARGEST) if turn < 40 else 1)
    assert LIMIT <= fleet.total + sum(map(len, fleet.holds)) <= LIMIT + 2 * LARGEST
    shown = {budgets.reserve([parse("k", f"{BUDGET} soft")], "m", 0, 0, NOW).use().spent for budgets in fleet.servers}
    assert {units // UNITS for units in shown} == {fleet.total}
