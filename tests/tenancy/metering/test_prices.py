"""The price book, and reports with it."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from inferctl.core.errors import UsageError
from inferctl.tenancy.metering import prices, report
from inferctl.tenancy.metering.ledger import Ledger
from inferctl.tenancy.metering.usage_event import Item
from tests.tenancy.parts import DAY, ORIGIN, batch, batch_of, event

BOOK = """\
prices:
  - {hardware: l4, currency: EUR, from: 2026-09-22, input: 2, engine_second: 1}
  - {hardware: l4, currency: EUR, from: 2026-01-01, input: 0.1, cached: 0.01, output: 0.3}
  - {hardware: "*", currency: USD, from: 2026-01-01, input: 5}
  - {hardware: "*", model: legal, currency: USD, from: 2026-01-01, input: 7}
  - {hardware: h100, model: legal, currency: USD, from: 2026-09-22, input: 9}
"""
ALL = (0, 2**62)
ROW = {"hardware": "l4", "model": "minilm", "day": "2026-09-21", "input_tokens": 3_000_000, "cached_tokens": 1_000_000}
ROW |= {"output_tokens": 1_000_000, "engine_seconds": Decimal(10)}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "prices.yaml"
    file.write_text(BOOK)
    return file


def test_the_price_of_the_day_counts(book: Path) -> None:
    euro = prices.read(book, "EUR")
    assert euro.cost(ROW) == Decimal("0.51")
    assert euro.cost({**ROW, "day": "2026-09-22"}) == Decimal(16)
    dollar = prices.read(book, "USD")
    assert dollar.cost({**ROW, "hardware": "h100"}) == Decimal(15)
    assert dollar.cost({**ROW, "model": "legal"}) == Decimal(21), "the price of a model comes first"
    assert dollar.cost({**ROW, "model": "legal", "hardware": "h100", "day": "2026-09-22"}) == Decimal(27)


def test_gaps_of_the_book_are_errors(book: Path) -> None:
    euro = prices.read(book, "EUR")
    with pytest.raises(UsageError, match="no price in EUR for l4 on 2025-12-31: the first one begins on 2026-01-01"):
        euro.cost({**ROW, "day": "2025-12-31"})
    with pytest.raises(UsageError, match="no price in EUR for the hardware 'h100', used on 2026-09-21"):
        euro.cost({**ROW, "hardware": "h100"})
    with pytest.raises(UsageError, match="several currencies: EUR, USD"):
        prices.read(book, None)
    with pytest.raises(UsageError, match="no prices in CHF"):
        prices.read(book, "CHF")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("price: []", "unknown key 'price'"),
        ("prices: []", "at least 1 item"),
        ("prices: [{hardware: l4, currency: EUR, from: 2026-13-01, input: 1}]", "from: must be a day"),
        ("prices: [{hardware: l4, currency: EUR, from: 2026-01-01}]", "has no price"),
        ("prices: [{hardware: l4, currency: EUR, from: 2026-01-01, input: -1}]", "must be greater than or equal to 0"),
        ("prices: [{hardware: l4, currency: EUR, from: 2026-01-01, inptu: 1}]", "unknown key 'inptu'"),
        ("prices: [{hardware: l4, currency: EUR, from: 2026-01-01, input: true}]", "input: must be a number"),
        ("prices: [{hardware: l4, currency: EUR, from: 2026-01-01, input: .inf}]", "input: must be"),
        ("prices: [{currency: EUR, from: 2026-01-01, input: 1}]", "hardware is missing"),
        (f"{BOOK}  - {{hardware: l4, currency: EUR, from: 2026-01-01, input: 2}}", "a second price for l4 in EUR"),
        ("prices: [1]", "`key: value` lines"),
    ],
)
def test_errors_in_the_book_name_their_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        prices.read(file, None)
    assert error.value.hint
    assert "inferctl schema" not in error.value.hint, "it does not describe price books"


def test_several_errors_in_the_book_have_an_example(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("prices:\n  - {hardware: l4, currency: EUR, from: 2026-01-01, input: x}\n  - {hardware: 5}\n")
    with pytest.raises(UsageError, match="4 errors") as error:
        prices.read(file, None)
    assert prices.EXAMPLE in (error.value.hint or "")
    assert "engine_second" not in error.value.message, "the example is there once"


def test_a_report_adds_costs_over_days_with_different_prices(ledger: Ledger, book: Path) -> None:
    ledger.apply([batch("a", 1, 5), batch("b", 1, 3, at=DAY + 86_400)])
    made = report.make(ledger, ["key"], *ALL, prices.read(book, "EUR"), {})
    # 50 tokens at 0.1, 30 at 2, and 6 ms at 1.
    assert [(row["key"], row["requests"], row["cost"]) for row in made.rows] == [("k1", 8, Decimal("0.006065"))]
    assert made.total["cost"] == Decimal("0.006065")
    assert made.to_csv().splitlines() == [
        "key,requests,errors,inputs,input_tokens,cached_tokens,output_tokens,engine_seconds,cost,key_name",
        "k1,8,0,8,80,0,0,0.016,0.006065,",
    ]


def test_each_name_of_a_server_has_its_own_sums_and_price(ledger: Ledger, tmp_path: Path) -> None:
    chosen, prices_of = random.Random(1), {"minilm": 1, "legal": 5, "order": 1}
    usages = [event(f"k{n % 2}", chosen.randrange(10**6), model=chosen.choice([*prices_of])) for n in range(300)]
    items = [Item(number, DAY, each) for number, each in enumerate(usages, 1)]
    origins = {name: replace(ORIGIN, model=name) for name in prices_of}
    ledger.apply([batch_of("a", items, origins=origins)])
    common = "hardware: l4, currency: EUR, from: 2026-01-01"
    (tmp_path / "book.yaml").write_text(f"prices: [{{{common}, input: 1}}, {{{common}, model: legal, input: 5}}]")
    book = prices.read(tmp_path / "book.yaml", None)
    expected: Counter[tuple[str | None, str | None]] = Counter()
    for each in usages:
        expected[each.model, each.key_id] += each.input_tokens * prices_of[each.model or ""]
    found = report.make(ledger, ["model", "key"], *ALL, book, {}).rows
    assert {(row["model"], row["key"]): row["cost"] * 10**6 for row in found} == expected
    assert report.make(ledger, ["key"], *ALL, book, {}).total["cost"] * 10**6 == expected.total()


def test_sums_and_costs_are_exact_decimals(ledger: Ledger, tmp_path: Path) -> None:
    """The expected ones are sums of integers. Those of floats had figures such as 0.00012119619999999998."""
    chosen = random.Random(1)
    usages = [
        event(f"k{number % 3}", chosen.randrange(10**6), engine_seconds=chosen.randrange(10**7) / 1e6)
        for number in range(3000)
    ]
    stored = batch_of("a", [Item(number, DAY, each) for number, each in enumerate(usages, 1)])
    ledger.apply([stored])
    (tmp_path / "exact.yaml").write_text(
        "prices: [{hardware: l4, currency: EUR, from: 2026-01-01, input: 0.07, engine_second: 0.0002}]"
    )
    made = report.make(ledger, ["key"], *ALL, prices.read(tmp_path / "exact.yaml", None), {})
    for kind, rows in (("csv", list(csv.DictReader(io.StringIO(made.to_csv())))), ("json", made.to_json()["rows"])):
        assert [row["key"] for row in rows] == ["k0", "k1", "k2"]
        for row in rows:
            own = [each.data for each in stored.events if each.data["key_id"] == row["key"]]
            tokens, us = sum(each["input_tokens"] for each in own), sum(round(1000 * each["engine_ms"]) for each in own)
            assert Decimal(str(row["engine_seconds"])) * 10**6 == us, kind
            # In units of 10**-10: 0.07 per million tokens are 700, 0.0002 per second is 2 per microsecond.
            assert Decimal(row["cost"]) * 10**10 == 700 * tokens + 2 * us, kind
    assert Decimal(made.to_json()["total"]["cost"]) == sum(row["cost"] for row in made.rows)
