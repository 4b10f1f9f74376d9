"""Budgets in money: `50 EUR/month`, and the windows of time for which they hold. Money is an integer: billionths."""

from __future__ import annotations

import datetime
import functools
import re
import zoneinfo
from decimal import Decimal
from typing import NamedTuple

UNITS = 1_000_000_000  # of one unit of a currency
EXAMPLE = "50 EUR/month"
PATTERN = (
    r"^([0-9]{1,9}(?:\.[0-9]{1,9})?) ([\w$€£¥]{1,16})/(day|week|month|total)"
    r"(?: ([A-Z][A-Za-z0-9_/+-]{0,63}))?( soft)?$"
)


class Window(NamedTuple):
    """A span of time. `label`: its name, unique among all budgets of an account. `end`: Unix time (s), 0 for never."""

    label: str
    end: int


class Budget(NamedTuple):
    """What an `account` may spend. `limit`: in billionths of the currency. `soft`: nothing is rejected."""

    account: str
    limit: int
    currency: str
    period: str
    zone: str
    soft: bool

    def window(self, now: float) -> Window:
        """Return the window of the Unix time `now`."""
        return _window(self.currency, self.period, self.zone, int(now) // 900)  # all zones change at such times


@functools.lru_cache(maxsize=4096)
def parse(account: str, text: str) -> Budget:
    """Return the budget in a text such as `50 EUR/month Europe/Berlin soft`. Raises `ValueError`."""
    if not (found := re.fullmatch(PATTERN, text)):
        raise ValueError(f"{text!r} is not a budget")
    number, currency, period, zone, soft = found.groups(default="")
    try:
        _place(zone or "UTC")
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        raise ValueError(f"{zone!r} is not a time zone that this machine has, such as Europe/Berlin") from None
    return Budget(account, int(Decimal(number) * UNITS), currency, period, zone or "UTC", bool(soft))


def amount(units: int) -> str:
    """Return an amount of money, which is not negative, as a decimal number with nine places."""
    return "%d.%09d" % divmod(units, UNITS) if units else "0"  # noqa: UP031  # in each response, and the fastest way


@functools.lru_cache(maxsize=1024)
def _window(currency: str, period: str, zone: str, quarter: int) -> Window:
    place = _place(zone)
    day = datetime.datetime.fromtimestamp(900 * quarter, place).date()
    if period == "day":
        name, after = day.isoformat(), day + datetime.timedelta(1)
    elif period == "week":
        year, week, weekday = day.isocalendar()
        name, after = f"{year}-W{week:02d}", day + datetime.timedelta(8 - weekday)
    elif period == "month":
        name, after = f"{day:%Y-%m}", (day.replace(day=1) + datetime.timedelta(32)).replace(day=1)
    else:
        return Window(f"{currency} total", 0)
    end = datetime.datetime.combine(after, datetime.time(), place)
    return Window(f"{currency} {name}{'' if zone == 'UTC' else f' {zone}'}", int(end.timestamp()))


def _place(zone: str) -> datetime.tzinfo:
    return datetime.UTC if zone == "UTC" else zoneinfo.ZoneInfo(zone)  # a container may have no database of time zones
