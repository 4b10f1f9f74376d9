"""Budgets: their windows, the cost of a request, and what servers spend together while messages and servers are lost."""

from __future__ import annotations

import random
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from inferctl.config.budget import UNITS, Budget, amount, parse
from inferctl.tenancy.access.budgets import EXCEEDED, PENDING, UNAVAILABLE, BudgetError, Budgets, Hold
from inferctl.tenancy.metering.prices import PriceBook, TokenPrice

NOW = datetime.fromisoformat("2026-12-02T12:00:00Z").timestamp()


def price(**fields: Any) -> TokenPrice:
    return TokenPrice.model_validate({"hardware": "*", "currency": "EUR", "from": "2026-01-01", **fields})


def book(*prices: TokenPrice) -> dict[str, PriceBook]:
    return {"EUR": PriceBook("prices.yaml", "EUR", tuple(sorted(prices, key=lambda each: each.start, reverse=True)))}


UNIT = book(price(input=1_000_000))  # one unit of money per token


@pytest.mark.parametrize(
    ("text", "at", "label", "end"),
    [
        ("1 EUR/day", "2026-12-02T23:59:59Z", "EUR 2026-12-02", "2026-12-03T00:00:00Z"),
        ("1 EUR/day", "2026-12-03T00:00:00Z", "EUR 2026-12-03", "2026-12-04T00:00:00Z"),
        ("1 USD/month", "2026-12-31T23:59:59Z", "USD 2026-12", "2027-01-01T00:00:00Z"),
        ("1 EUR/month", "2028-02-29T12:00:00Z", "EUR 2028-02", "2028-03-01T00:00:00Z"),
        ("1 EUR/week", "2027-01-03T23:00:00Z", "EUR 2026-W53", "2027-01-04T00:00:00Z"),
        ("1 EUR/total", "2026-12-02T00:00:00Z", "EUR total", None),
        # In Berlin, December begins an hour earlier. The days on which its clocks change have 23 and 25 hours.
        ("1 EUR/month Europe/Berlin", "2026-11-30T23:30:00Z", "EUR 2026-12 Europe/Berlin", "2026-12-31T23:00:00Z"),
        ("1 EUR/day Europe/Berlin", "2026-03-29T12:00:00Z", "EUR 2026-03-29 Europe/Berlin", "2026-03-29T22:00:00Z"),
        ("1 EUR/day Europe/Berlin", "2026-10-25T12:00:00Z", "EUR 2026-10-25 Europe/Berlin", "2026-10-25T23:00:00Z"),
        ("1 EUR/day Asia/Kathmandu", "2026-12-02T18:15:00Z", "EUR 2026-12-03 Asia/Kathmandu", "2026-12-03T18:15:00Z"),
        (
            "1 EUR/week America/New_York",
            "2026-12-07T04:59:59Z",
            "EUR 2026-W49 America/New_York",
            "2026-12-07T05:00:00Z",
        ),
    ],
)
def test_a_window_is_a_calendar_period_of_its_time_zone(text: str, at: str, label: str, end: str | None) -> None:
    found = parse("k", text).window(datetime.fromisoformat(at).timestamp())
    assert found == (label, datetime.fromisoformat(end).timestamp() if end else 0)


@pytest.mark.parametrize(
    ("text", "limit", "soft"),
    [
        ("50 EUR/month", 50 * UNITS, False),
        ("0.000000001 $/day soft", 1, True),
        ("1.5 EUR/week UTC soft", 1_500_000_000, True),
    ],
)
def test_an_amount_is_exact(text: str, limit: int, soft: bool) -> None:
    assert parse("k", text)[1::4] == (limit, soft)
    assert Decimal(amount(limit)) * UNITS == limit


@pytest.mark.parametrize(
    "text",
    [
        "50",
        "50 EUR",
        "50EUR/day",
        "-1 EUR/day",
        "1e3 EUR/day",
        "1 EUR/year",
        "1.0000000001 EUR/day",
        "1 EUR/day Mars/X",
    ],
)
def test_other_texts_are_no_budgets(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a (budget|time zone)"):
        parse("k", text)


def test_the_cost_of_tokens_is_that_of_the_price_book_rounded_up() -> None:
    random_ = random.Random(1)
    for _ in range(2000):
        prices = [round(random_.choice((0.0, random_.uniform(0, 3), random_.uniform(0, 500))), 5) for _ in range(3)]
        one = price(**dict(zip(("input", "cached", "output"), prices, strict=True)))
        rate = book(one)["EUR"].rate("l4", "m", "2026-12-02")
        computed, cached, output = (
            random_.choice((0, random_.randrange(10), random_.randrange(10**6))) for _ in range(3)
        )
        exact = (
            sum(Fraction(str(each)) * n for each, n in zip(prices, (computed, cached, output), strict=True)) / 1_000_000
        )
        assert 0 <= Fraction(rate.cost(computed, cached, output), UNITS) - exact < Fraction(1, UNITS)
        assert rate.cost(computed, cached, output) <= rate.most(computed + cached, output)


def opened(folder: Path, run: str = "a", books: dict[str, PriceBook] = UNIT, **options: Any) -> Budgets:
    found = Budgets({}, books, folder, **options)
    found.open(run, NOW)
    found._known = True
    return found


def code(budgets: Budgets, budget: Budget, tokens: int, now: float = NOW) -> str | Hold:
    try:
        return budgets.reserve([budget], "m", tokens, 0, now)
    except BudgetError as error:
        return error.code


def test_reservations_and_prices_belong_to_the_admission(tmp_path: Path) -> None:
    """A price of the next day, a clock that jumps, and a window that ends while a request runs."""
    books = book(price(input=1_000_000), price(input=2_000_000, **{"from": "2026-12-03"}))
    budgets, daily = opened(tmp_path, books=books), parse("k", "10 EUR/day")
    held, tomorrow = code(budgets, daily, 6), NOW + 86_400
    assert isinstance(held, Hold)
    assert (code(budgets, daily, 5), code(budgets, daily, 11)) == (PENDING, EXCEEDED)
    later = code(budgets, daily, 5, tomorrow)  # at the new price, in the next window
    assert isinstance(later, Hold)
    assert (code(budgets, daily, 1, tomorrow), code(budgets, daily, 5)) == (PENDING, PENDING)
    assert held.settle(4, 0, 0)[0] == 4 * UNITS, "at its own price"
    assert held.settle(6, 0, 0)[0] == 4 * UNITS, "only once"
    assert later.settle(5, 0, 0)[6:8] == (10 * UNITS, 0)
    assert (code(budgets, daily, 1, tomorrow), code(budgets, daily, 7)) == (EXCEEDED, EXCEEDED)
    assert isinstance(code(budgets, daily, 6), Hold), "the clock was set back: the earlier window goes on"
    assert code(budgets, parse("k", "3 EUR/day"), 1) == EXCEEDED, "a lower limit"
    assert isinstance(code(budgets, parse("k", "3 EUR/day soft"), 9), Hold)


def test_what_has_no_certain_price_is_unavailable(tmp_path: Path) -> None:
    seconds = book(price(input=1, engine_second=1))
    late = book(price(input=1, **{"from": "2027-01-01"}))
    for number, books in enumerate((seconds, late, {})):
        assert code(opened(tmp_path / str(number), books=books), parse("k", "1 EUR/day"), 1) == UNAVAILABLE
    with pytest.raises(BudgetError) as error:
        opened(tmp_path).reserve([parse("k", "1 EUR/day"), parse("team:t", "1 USD/day")], "m", 1, 0, NOW)
    assert error.value.code == UNAVAILABLE


class Fleet:
    """Servers with folders of their own, and a network between them. `cut`: servers that nobody hears."""

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.random, self.folder, self.count, self.time = random.Random(seed), folder, count, 0.0
        self.starts, self.cut = 0, set[int]()
        self.servers = [self.start(number) for number in range(count)]
        self.holds: list[list[Hold]] = [[] for _ in self.servers]
        self.mail: list[tuple[float, int, Any]] = []
        self.spent = self.admitted = 0

    def start(self, number: int) -> Budgets:
        self.starts += 1
        return opened(self.folder / str(number), f"run{self.starts}", replicas=self.count, exchanges=True)

    def kill(self, number: int) -> None:
        """Kill a server with all that is in flight. Its clients got no response, and nothing is billed."""
        server = self.servers[number]
        assert server._file is not None
        server._file.close()
        self.holds[number] = []
        self.servers[number] = self.start(number)

    def step(self, loss: float) -> None:
        self.time += 0.1
        for sender, server in enumerate(self.servers):
            for message in server.messages(self.time):
                for receiver in range(self.count):
                    if receiver != sender and not self.cut & {sender, receiver} and self.random.random() >= loss:
                        delay = self.random.choice((0.01, 0.05, 0.3 if loss else 0.05))
                        self.mail.append((self.time + delay, receiver, message))
        due = [each for each in self.mail if each[0] <= self.time + 0.1]
        self.mail = [each for each in self.mail if each[0] > self.time + 0.1]
        for _, receiver, message in sorted(due, key=lambda each: each[0]):
            self.servers[receiver].take(message, self.time)

    def request(self, number: int, budget: Budget, tokens: int) -> str | None:
        """Admit a request. What a killed server held is spent in no ledger, so only settled requests count."""
        found = code(self.servers[number], budget, tokens)
        if isinstance(found, str):
            return found
        self.holds[number].append(found)
        return None

    def settle(self, number: int) -> None:
        held = self.holds[number].pop(self.random.randrange(len(self.holds[number])))
        most = held.most // UNITS
        self.spent += held.settle(self.random.randint(most // 2, most), 0, 0).cost // UNITS


LARGEST, LIMIT = 9, 600


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("trouble", ["none", "loss", "cut", "kills", "all"])
def test_servers_together_stay_within_a_budget(trouble: str, seed: int, tmp_path: Path) -> None:
    """The oracle is the sum of what requests cost, which no server computes."""
    fleet, budget = Fleet(tmp_path, 3, seed), parse("k", f"{LIMIT} EUR/month")
    busy = fleet.random.choice(((1, 1, 1), (1, 0, 0), (8, 1, 0)))
    for turn in range(300):
        if trouble in ("cut", "all") and turn % 40 == 20:
            fleet.cut = {fleet.random.randrange(3)} if not fleet.cut else set()
        if trouble in ("kills", "all") and turn % 30 == 10:
            fleet.kill(fleet.random.randrange(3))
        fleet.step(0.2 if trouble in ("loss", "all") else 0.0)
        for number in range(3):
            for _ in range(fleet.random.randrange(4) * busy[number]):
                found = fleet.request(number, budget, fleet.random.randint(1, LARGEST))
                assert found != EXCEEDED or fleet.spent > LIMIT - 2 * LARGEST, "a false 429"
            while fleet.holds[number] and fleet.random.random() < 0.7:
                fleet.settle(number)
        held = sum(each.most for holds in fleet.holds for each in holds) // UNITS
        assert fleet.spent + held <= LIMIT + 2 * LARGEST
    fleet.cut = set()
    for _ in range(60):  # all hear each other again: what is left can be spent, but for what was in flight at a SIGKILL
        fleet.step(0.0)
        for number in range(3):
            while fleet.holds[number]:
                fleet.settle(number)
            fleet.request(number, budget, 1)
    lost = sum(s.reserved for s in fleet.servers[0]._spendings.values()) // UNITS
    assert LIMIT - lost - 3 <= fleet.spent + sum(map(len, fleet.holds)) <= LIMIT + 2 * LARGEST
