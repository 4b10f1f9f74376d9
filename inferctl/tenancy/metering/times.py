"""Reads the times of `--since` and `--until`."""

from __future__ import annotations

import datetime
import re

from inferctl.core.errors import UsageError, shown

_UNITS_MS = {"h": 3_600_000, "d": 86_400_000}


def parse(text: str, now_ms: int, option: str) -> int:
    """Return a time in milliseconds since 1970: of `7d` or `12h` before `now_ms`, or of a date or time in UTC.

    Raises `UsageError`, which names `option`.
    """
    if found := re.fullmatch(r"(\d{1,6})([hd])", text):
        return now_ms - int(found[1]) * _UNITS_MS[found[2]]
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{option} {shown(text)} is not a time", f"as in `{option} 2026-11-01`, `{option} 7d` or `{option} 12h`"
        ) from None
    return int(1000 * (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp())
