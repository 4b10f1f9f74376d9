"""The price book: what tokens and engine seconds cost, by hardware and model, from which day on."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictStr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

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


@dataclass(frozen=True)
class PriceBook:
    """All prices of one currency, the latest first."""

    file: str
    currency: str
    prices: tuple[TokenPrice, ...]

    def cost(self, row: Mapping[str, Any]) -> Decimal:
        """Return the cost of the sums in `row`, which has `hardware`, `model` and `day`.

        Prices of the model come before those of its hardware. Raises `UsageError` if the book has none on this day.
        """
        hardware = row["hardware"] or "unknown"
        # Without tokens and engine time, as before the server is ready, there is nothing to price.
        if not (row["input_tokens"] or row["output_tokens"] or row["engine_seconds"]):
            return Decimal(0)
        for name, model in ((hardware, row["model"]), (ANY, row["model"]), (hardware, None), (ANY, None)):
            known = [price for price in self.prices if (price.hardware, price.model) == (name, model)]
            for price in known:
                if price.start <= row["day"]:
                    return price.cost(row)
            if known:
                raise UsageError(
                    f"{self.file} has no price in {self.currency} for {name} on {row['day']}: "
                    f"the first one begins on {known[-1].start}",
                    "add an entry with an earlier `from`, or report a later time with `--since`",
                )
        raise UsageError(
            f"{self.file} has no price in {self.currency} for the hardware {hardware!r}, used on {row['day']}",
            f'add an entry with `hardware: {hardware}`, or one with `hardware: "{ANY}"`',
        )


def read(file: Path, currency: str | None) -> PriceBook:
    """Read a price book. `currency`: None if the book has one only. Raises `UsageError` and `SpecError`."""
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
    currencies = sorted({price.currency for price in prices})
    if currency is None and len(currencies) > 1:
        raise UsageError(f"{file} has several currencies: {', '.join(currencies)}", "choose one with `--currency`")
    chosen = currency or currencies[0]
    if chosen not in currencies:
        raise UsageError(f"{file} has no prices in {chosen}", f"`--currency` can be: {', '.join(currencies)}")
    ordered = sorted((price for price in prices if price.currency == chosen), key=lambda price: price.start)
    return PriceBook(str(file), chosen, tuple(reversed(ordered)))


class _Book(Section):
    prices: list[TokenPrice] = Field(min_length=1)


def _keys_at(location: Sequence[str | int]) -> list[str]:
    return [field.alias or name for name, field in (TokenPrice if location else _Book).model_fields.items()]
