"""Reads values of manifests, of which none need have the type that it should have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_QUANTITY = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d+))?$")
_LONGEST_QUANTITY = 100
_FACTORS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18} | {
    f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)
}


def get(value: Any, *path: str | int) -> Any:
    """Return the value at `path`; None if it is absent or something else is in the way."""
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and -len(value) <= part < len(value):
            value = value[part]
        else:
            return None
    return value


def mapping(value: Any, *path: str | int) -> dict[str, Any]:
    """Return the mapping at `path`; an empty one if there is none."""
    found = get(value, *path)
    return found if isinstance(found, dict) else {}


def sequence(value: Any, *path: str | int) -> list[Any]:
    """Return the list at `path`; an empty one if there is none."""
    found = get(value, *path)
    return found if isinstance(found, list) else []


def text(value: Any, *path: str | int) -> str:
    """Return the text at `path`; "" if there is none."""
    found = get(value, *path)
    return found if isinstance(found, str) else ""


def integer(value: Any, *path: str | int) -> int | None:
    """Return the integer at `path`; None if there is none."""
    found = get(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def quantity(value: Any) -> float | None:
    """Return a Kubernetes quantity such as `500m` or `16Gi` as a number; None if it is not one."""
    found = _QUANTITY.match(str(value)) if isinstance(value, (str, int, float)) else None
    if not found or isinstance(value, bool) or len(found[0]) > _LONGEST_QUANTITY:
        return None
    number = float(found[1]) * (-1 if found[0].startswith("-") else 1)
    return number * (_FACTORS.get(found[2] or "", 1.0) if not found[3] else 10.0 ** min(int(found[3]), 30))


def selects(selector: Any, labels: Mapping[str, Any]) -> bool:
    """Return whether a label selector (matchLabels, matchExpressions) selects `labels`. An empty one selects all."""
    if any(labels.get(key) != value for key, value in mapping(selector, "matchLabels").items()):
        return False
    for each in sequence(selector, "matchExpressions"):
        key, values, operator = text(each, "key"), sequence(each, "values"), get(each, "operator")
        present, value = key in labels, labels.get(key)
        ok = {
            "In": present and value in values,
            "NotIn": not present or value not in values,
            "Exists": present,
            "DoesNotExist": not present,
        }
        if not (isinstance(operator, str) and ok.get(operator, False)):
            return False
    return True
