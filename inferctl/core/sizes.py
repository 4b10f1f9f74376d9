"""Parses and formats sizes in bytes, such as `6GB`."""

from __future__ import annotations

import re

from inferctl.core.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `6GB`, `800 MiB` or `1.5g`. Raises `UsageError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found:
        raise UsageError(f"{text!r} is not a size", "write a size such as 6GB, 800MB or 2GiB")
    return int(float(found.group(1)) * _UNITS[(found.group(2) or "").lower()])


def size(value: float, digits: int = 2) -> str:
    """Format bytes in decimal units: `4.13 GB`, `52.1 MB`. `digits`: decimal places of gigabytes."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= factor:
            return f"{value / factor:.{digits if unit == 'GB' else 1}f} {unit}"
    return f"{value:.0f} B"
