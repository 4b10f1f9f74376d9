"""Reads fields of Kubernetes objects, which may be absent or of another type, and quantities such as `500m`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d{1,2}))?")
_POWERS_OF_TEN = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_POWERS_OF_TWO = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_MAX_EXPONENT = 30
# Kubernetes caps quantities.
_MOST = 2**63 - 1


def mapping(value: Any, *path: str) -> dict[str, Any]:
    """Return the mapping at `path` in `value`; an empty one if it is absent or something else."""
    found = get(value, *path)
    return found if isinstance(found, dict) else {}


def optional(value: Any, *path: str) -> dict[str, Any] | None:
    """Return the mapping at `path` in `value`; None if it is absent or something else, where {} has a meaning."""
    found = get(value, *path)
    return found if isinstance(found, dict) else None


def items(value: Any, *path: str) -> list[dict[str, Any]]:
    """Return the mappings in the list at `path` in `value`; an empty list if it is absent or something else."""
    found = get(value, *path)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def strings(value: Any, *path: str) -> list[str]:
    """Return the items of the list at `path` in `value` as text."""
    found = get(value, *path)
    return [str(each) for each in found] if isinstance(found, list) else []


def text(value: Any, *path: str) -> str:
    """Return the value at `path` as text; "" if it is absent or null."""
    found = get(value, *path)
    return "" if found is None or isinstance(found, dict | list) else str(found)


def integer(value: Any, *path: str, default: int = 0) -> int:
    """Return the integer at `path`; `default` if it is absent or something else."""
    found = get(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else default


def get(value: Any, *path: str) -> Any:
    """Return the value at `path`; None if a part of the path is absent."""
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def text_map(value: Mapping[str, Any]) -> dict[str, str]:
    """Return labels or annotations as text. A YAML file may have `true` or 1 where Kubernetes has text."""
    return {str(key): _text(each) for key, each in value.items() if each is not None}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def quantity(value: Any) -> Fraction:
    """Return a quantity of Kubernetes (`2`, `500m`, `1Gi`, `129e6`) as a number. Raises `ValueError`."""
    return max(Fraction(-_MOST), min(Fraction(_MOST), _uncapped(value)))


def _uncapped(value: Any) -> Fraction:
    match = _QUANTITY.fullmatch(str(value)) if isinstance(value, str | int | float) else None
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a quantity such as 500m, 2 or 1Gi")
    number, suffix, exponent = match.groups()
    amount = Fraction(number)
    if exponent is not None:
        if abs(int(exponent)) > _MAX_EXPONENT:
            raise ValueError(f"{value!r} is out of range")
        return amount * Fraction(10) ** int(exponent)
    if suffix in _POWERS_OF_TWO:
        return amount * int(2 ** _POWERS_OF_TWO[suffix])
    return amount * Fraction(10) ** _POWERS_OF_TEN.get(suffix or "", 0)


def amounts(values: Mapping[str, Any]) -> dict[str, int]:
    """Return a resource list as the scheduler counts it: CPU in thousandths, others in units, both rounded up.

    Raises `ValueError` for an invalid quantity.
    """
    return {
        str(name): math.ceil(quantity(value) * (1000 if name == "cpu" else 1))
        for name, value in values.items()
        if value is not None
    }


def show(resource: str, amount: int) -> str:
    """Return an amount of `amounts` for people: `2.5` CPUs, `1.5Gi` of memory, `2` GPUs."""
    if resource.rpartition(".")[2] == "cpu":
        return f"{amount / 1000:g}"
    if "memory" in resource or "storage" in resource or "hugepages" in resource:
        for suffix, power in reversed(_POWERS_OF_TWO.items()):
            if amount >= 2**power:
                return f"{amount / 2**power:.4g}{suffix}"
    return str(amount)
