"""The usage report: sums of the ledger, their cost, and what is known to be missing."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from inferctl.tenancy.metering.ledger import SUMS, Gap, Ledger
from inferctl.tenancy.metering.prices import PriceBook

# What a spreadsheet takes for a formula at the start of a cell. Callers of a proxy or with a token choose their ids.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Report:
    """Usage by `dimensions`. `rows`: their values, `SUMS`, and `cost` if there is a price book.

    With the dimension `key`, a row also has `key_name`: None if it is not known, as of a caller with a token.
    `gaps`: lost events. `unclean_ends`: sources of server processes that were killed.
    """

    dimensions: tuple[str, ...]
    rows: list[dict[str, Any]]
    total: dict[str, Any]
    gaps: list[Gap]
    unclean_ends: list[str]
    currency: str | None = None

    @property
    def lost(self) -> int:
        """How many events were lost."""
        return sum(gap.last - gap.first + 1 for gap in self.gaps)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values of a row."""
        names = ["key_name"] if "key" in self.dimensions else []
        return (*self.dimensions, *SUMS, *(["cost"] if self.currency else []), *names)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data. Costs are text, because they are exact decimals."""
        return {
            "by": list(self.dimensions),
            "currency": self.currency,
            "rows": [_plain(row) for row in self.rows],
            "total": _plain(self.total),
            "lost_events": self.lost,
            "gaps": [vars(gap) for gap in self.gaps],
            "unclean_ends": self.unclean_ends,
        }

    def to_csv(self) -> str:
        """Return the rows as CSV with a header. Texts that a spreadsheet would run as a formula begin with a quote."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in self.rows)
        return text.getvalue()


def make(
    ledger: Ledger,
    dimensions: Sequence[str],
    since_ms: int,
    until_ms: int,
    book: PriceBook | None,
    names: Mapping[str, str],
) -> Report:
    """Return the usage from `since_ms` to before `until_ms`. `names`: of keys, by id.

    Raises `UsageError` for a day without a price.
    """
    # What prices depend on.
    needed = [
        *dimensions,
        *(name for name in ("hardware", "model", "day", "currency") if book and name not in dimensions),
    ]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    total = _empty(book)
    for found in ledger.usage(needed, since_ms, until_ms):
        group = tuple(found[name] for name in dimensions)
        row = rows.setdefault(group, dict(zip(dimensions, group, strict=True)) | _empty(book))
        if "key" in dimensions:
            row["key_name"] = names.get(found["key"])
        cost = {}
        if book:  # what a budget was charged is not priced again
            cost["cost"] = found["cost"] if found["currency"] == book.currency else book.cost(found)
        for sums in (row, total):
            for name, value in ({name: found[name] for name in SUMS} | cost).items():
                sums[name] += value
    return Report(
        tuple(dimensions),
        list(rows.values()),
        total,
        ledger.gaps(since_ms, until_ms),
        ledger.unclean_ends(since_ms, until_ms),
        book.currency if book else None,
    )


def _empty(book: PriceBook | None) -> dict[str, Any]:
    return dict.fromkeys(SUMS, 0) | ({"cost": Decimal(0)} if book else {})


def _cell(value: Any) -> Any:
    if isinstance(value, Decimal):
        return f"{value:f}"
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    plain = dict(row)
    plain["engine_seconds"] = float(row["engine_seconds"])
    if "cost" in row:
        plain["cost"] = f"{row['cost']:f}"
    return plain
