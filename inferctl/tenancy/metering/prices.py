"""The price book: what tokens and engine seconds cost, for each hardware, from which day on."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from inferctl.core import document
from inferctl.core.document import Document
from inferctl.core.errors import Problem, SpecError, UsageError, did_you_mean, shown

ANY = "*"
_PRICES = ("input", "cached", "output", "engine_second")
_KEYS = ("hardware", "currency", "from", *_PRICES)
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


@dataclass(frozen=True)
class Price:
    """Prices from the day `start` on. `input`, `cached` and `output` are per 1,000,000 tokens."""

    hardware: str
    currency: str
    start: str
    input: Decimal
    cached: Decimal
    output: Decimal
    engine_second: Decimal

    def cost(self, row: Mapping[str, Any]) -> Decimal:
        """Return the cost of the sums in `row`."""
        cached: int = row["cached_tokens"]
        computed: int = row["input_tokens"] - cached
        output: int = row["output_tokens"]
        tokens = self.input * computed + self.cached * cached + self.output * output
        return tokens / _MILLION + self.engine_second * Decimal(str(row["engine_seconds"]))


@dataclass(frozen=True)
class PriceBook:
    """All prices of one currency, the latest first."""

    file: str
    currency: str
    prices: tuple[Price, ...]

    def cost(self, row: Mapping[str, Any]) -> Decimal:
        """Return the cost of the sums in `row`, which has `hardware` and `day`.

        Raises `UsageError` if the book has no price for this hardware on this day.
        """
        hardware = row["hardware"] or "unknown"
        # Without tokens and engine time, as before the server is ready, there is nothing to price.
        if not (row["input_tokens"] or row["output_tokens"] or row["engine_seconds"]):
            return Decimal(0)
        for name in (hardware, ANY):
            known = [price for price in self.prices if price.hardware == name]
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
    entries = content.data.get("prices")
    if unknown := set(content.data) - {"prices"}:
        key = sorted(unknown)[0]
        raise SpecError(str(file), [Problem(key, f"unknown key {key!r}", content.line([key]), example)])
    if not isinstance(entries, list) or not entries:
        raise SpecError(str(file), [Problem("prices", "`prices` must be a list with entries", None, example)])
    problems: list[Problem] = []
    prices = [price for index in range(len(entries)) if (price := _price(content, index, problems))]
    seen: set[tuple[str, str, str]] = set()
    for index, price in enumerate(prices):
        identity = (price.hardware, price.currency, price.start)
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


def _price(content: Document, index: int, problems: list[Problem]) -> Price | None:
    entry, before = content.data["prices"][index], len(problems)

    def problem(key: str, message: str, hint: str | None = None) -> None:
        path = ("prices", index, key)
        problems.append(Problem(document.dotted(path), message, content.line(path), hint))

    if not isinstance(entry, dict):
        problem(
            "", f"expected `key: value` lines, got {shown(entry)}", "as in `- hardware: l4`, with `currency: EUR` below"
        )
        return None
    for key in set(entry) - set(_KEYS):
        problem(str(key), f"unknown key {key!r}", did_you_mean(str(key), _KEYS) or f"known: {', '.join(_KEYS)}")
    for key in ("hardware", "currency"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            problem(key, f"`{key}` must be text", "as in `hardware: l4` and `currency: EUR`")
    try:
        start = datetime.date.fromisoformat(str(entry.get("from"))).isoformat()
    except ValueError:
        start = ""
        problem("from", f"`from` must be a day, got {shown(entry.get('from'))}", "as in `from: 2026-01-01`")
    amounts: dict[str, Decimal] = {}
    for key in _PRICES:
        if key == "cached" and key not in entry:
            amounts[key] = amounts.get("input", Decimal(0))
            continue
        amount = entry.get(key, 0)
        # Decimal of the text: 0.1 as a float is not a tenth.
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < float("inf"):
            hint = f"as in `{key}: 0.02`, {'per second' if key == 'engine_second' else 'per 1,000,000 tokens'}"
            problem(key, f"`{key}` must be a number from 0 on, got {shown(amount)}", hint)
        else:
            amounts[key] = Decimal(str(amount))
    if not set(_PRICES) & set(entry):
        problem("", "the entry has no price", f"add one or more of {', '.join(_PRICES)}, as in `input: 0.02`")
    if len(problems) > before:
        return None
    return Price(entry["hardware"], entry["currency"], start, **amounts)
