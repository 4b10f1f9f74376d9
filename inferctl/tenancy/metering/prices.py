"""The price book: what tokens and engine seconds cost, by hardware and model, from which day on."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, StrictStr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from inferctl.config.budget import UNITS
from inferctl.config.spec_types import Section
from inferctl.core import document, validation
from inferctl.core.errors import Problem, SpecError, UsageError

ANY = "*"
_PRICES = ("input", "cached", "output", "engine_second")
_MILLION = Decimal(1_000_000)
EXAMPLE = """\
prices:
  - hardware: l4          # as in `inferctl usage --by hardware`; "*" is all others
    currency: EUR
    from: 2026-01-01      # first day, in UTC
    input: 0.02           # per 1,000,000 tokens
    cached: 0.005         # default: as input
    output: 0.06
    engine_second: 0.0002
"""


def _amount(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("amount", "must be a number")
    return Decimal(str(value))  # of the text: 0.1 as a float is not a tenth


def _day(value: Any) -> str:
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise PydanticCustomError("day", "must be a day, such as 2026-01-01") from None


Amount = Annotated[Decimal, BeforeValidator(_amount), Field(ge=0)]
Text = Annotated[StrictStr, Field(min_length=1)]


class TokenPrice(Section):
    """Prices from the day `start` on. `input`, `cached` and `output` are per 1,000,000 tokens."""

    hardware: Text
    currency: Text
    model: Text | None = None  # all names
    start: Annotated[str, BeforeValidator(_day)] = Field(alias="from")
    input: Amount = Decimal(0)
    cached: Amount | None = None  # as `input`
    output: Amount = Decimal(0)
    engine_second: Amount = Decimal(0)

    @model_validator(mode="after")
    def _has_a_price(self) -> TokenPrice:
        if self.model_fields_set.isdisjoint(_PRICES):
            raise ValueError(f"the entry has no price: add one or more of {', '.join(_PRICES)}")
        return self

    def cost(self, row: Mapping[str, Any]) -> Decimal:
        """Return the cost of the sums in `row`."""
        cached: int = row["cached_tokens"]
        computed: int = row["input_tokens"] - cached
        output: int = row["output_tokens"]
        cached_price = self.input if self.cached is None else self.cached
        tokens = self.input * computed + cached_price * cached + self.output * output
        seconds: Decimal = row["engine_seconds"]
        return tokens / _MILLION + self.engine_second * seconds


class Rate(NamedTuple):
    """Prices of 1,000,000 tokens as integers, in billionths of the currency. For budgets."""

    input: int
    cached: int
    output: int

    def cost(self, computed: int, cached: int, output: int) -> int:
        """Return the cost of tokens in billionths, rounded up. `computed`: those of the input that no cache had."""
        return -(-(self.input * computed + self.cached * cached + self.output * output) // 1_000_000)

    def most(self, prompt: int, output: int) -> int:
        """Return the most that a request can cost."""
        return -(-(max(self.input, self.cached) * prompt + self.output * output) // 1_000_000)


@dataclass(frozen=True)
class PriceBook:
    """All prices of one currency, the latest first."""

    file: str
    currency: str
    prices: tuple[TokenPrice, ...]

    def cost(self, row: Mapping[str, Any]) -> Decimal:
        """Return the cost of the sums in `row`, which has `hardware`, `model` and `day`. Raises as `find`."""
        # Without tokens and engine time, as before the server is ready, there is nothing to price.
        if not (row["input_tokens"] or row["output_tokens"] or row["engine_seconds"]):
            return Decimal(0)
        return self.find(row["hardware"], row["model"], row["day"]).cost(row)

    def rate(self, hardware: str, model: str, day: str) -> Rate:
        """Return the prices of tokens on a day. Raises `UsageError` without them, or if engine seconds have a price."""
        price = self.find(hardware, model, day)
        if price.engine_second:
            raise UsageError(
                f"{self.file} has a price per engine second for {price.hardware} in {self.currency}",
                "a budget needs prices of tokens only: nobody knows the engine seconds of a request before its end",
            )
        amounts = (price.input, price.input if price.cached is None else price.cached, price.output)
        return Rate(*(math.ceil(each * UNITS) for each in amounts))

    def find(self, hardware: str | None, model: str | None, day: str) -> TokenPrice:
        """Return the price of a day. Those of the model come before those of its hardware. Raises `UsageError`."""
        hardware = hardware or "unknown"
        for name, of in ((hardware, model), (ANY, model), (hardware, None), (ANY, None)):
            known = [price for price in self.prices if (price.hardware, price.model) == (name, of)]
            for price in known:
                if price.start <= day:
                    return price
            if known:
                raise UsageError(
                    f"{self.file} has no price in {self.currency} for {name} on {day}: "
                    f"the first one begins on {known[-1].start}",
                    "add an entry with an earlier `from`, or report a later time with `--since`",
                )
        raise UsageError(
            f"{self.file} has no price in {self.currency} for the hardware {hardware!r}, used on {day}",
            f'add an entry with `hardware: {hardware}`, or one with `hardware: "{ANY}"`',
        )


def read(file: Path, currency: str | None) -> PriceBook:
    """Read a price book. `currency`: None if the book has one only. Raises `UsageError` and `SpecError`."""
    books = read_all(file)
    if currency is None and len(books) > 1:
        raise UsageError(f"{file} has several currencies: {', '.join(books)}", "choose one with `--currency`")
    chosen = currency or next(iter(books))
    if chosen not in books:
        raise UsageError(f"{file} has no prices in {chosen}", f"`--currency` can be: {', '.join(books)}")
    return books[chosen]


def read_all(file: Path) -> dict[str, PriceBook]:
    """Read the prices of all currencies. Raises `UsageError` and `SpecError`."""
    example = f"a price book looks like this:\n\n{EXAMPLE}"
    content = document.read(file, example)
    try:
        prices = _Book.model_validate(content.data).prices
    except ValidationError as error:
        raise SpecError(str(file), validation.problems(error, content, _keys_at, ""), example) from None
    problems: list[Problem] = []
    seen: set[tuple[str, str | None, str, str]] = set()
    for index, price in enumerate(prices):
        identity = (price.hardware, price.model, price.currency, price.start)
        if identity in seen:
            message = f"a second price for {price.hardware} in {price.currency} from {price.start}"
            problems.append(Problem("prices", message, content.line(["prices", index]), "remove one of the two"))
        seen.add(identity)
    if problems:
        raise SpecError(str(file), problems, example)
    ordered = sorted(prices, key=lambda price: price.start, reverse=True)
    return {
        currency: PriceBook(str(file), currency, tuple(price for price in ordered if price.currency == currency))
        for currency in sorted({price.currency for price in prices})
    }


class _Book(Section):
    prices: list[TokenPrice] = Field(min_length=1)


def _keys_at(location: Sequence[str | int]) -> list[str]:
    return [field.alias or name for name, field in (TokenPrice if location else _Book).model_fields.items()]
