"""Reads fields of Kubernetes objects, which may be absent or of another type, and quantities such as `500m`.

Lint and preview run on anyone's files, so nothing here assumes that a field has the type that it should have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, overload

from inferctl.core.errors import shown

_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d{1,2}))?")
_POWERS_OF_TEN = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_POWERS_OF_TWO = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_PERCENT = re.compile(r"(\d{1,4})%")
_PAUSE = re.compile(r"(?:^|/)pause(?:-[a-z0-9]+)?(?::|@|$)")
_MAX_EXPONENT = 30
# A longer number takes seconds to compute with.
_LONGEST_QUANTITY = 100
# Kubernetes caps quantities.
_MOST = 2**63 - 1


def get(value: Any, *path: str | int) -> Any:
    """Return the value at `path` (keys and indexes); None if a part of the path is absent or of another type."""
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and -len(value) <= part < len(value):
            value = value[part]
        else:
            return None
    return value


def mapping(value: Any, *path: str | int) -> dict[str, Any]:
    """Return the mapping at `path` in `value`; an empty one if it is absent or something else."""
    found = get(value, *path)
    return found if isinstance(found, dict) else {}


def optional(value: Any, *path: str | int) -> dict[str, Any] | None:
    """Return the mapping at `path` in `value`; None if it is absent or something else, where {} has a meaning."""
    found = get(value, *path)
    return found if isinstance(found, dict) else None


def sequence(value: Any, *path: str | int) -> list[Any]:
    """Return the list at `path` in `value`; an empty one if it is absent or something else."""
    found = get(value, *path)
    return found if isinstance(found, list) else []


def items(value: Any, *path: str | int) -> list[dict[str, Any]]:
    """Return the mappings in the list at `path` in `value`; an empty list if it is absent or something else."""
    return [each for each in sequence(value, *path) if isinstance(each, dict)]


def strings(value: Any, *path: str | int) -> list[str]:
    """Return the items of the list at `path` in `value` as text."""
    return [str(each) for each in sequence(value, *path)]


def text(value: Any, *path: str | int) -> str:
    """Return the value at `path` as text; "" if it is absent or null."""
    found = get(value, *path)
    return "" if found is None or isinstance(found, dict | list) else str(found)


@overload
def integer(value: Any, *path: str | int) -> int | None: ...
@overload
def integer(value: Any, *path: str | int, default: int) -> int: ...
def integer(value: Any, *path: str | int, default: int | None = None) -> int | None:
    """Return the integer at `path`; `default` if it is absent or something else."""
    found = get(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else default


def namespace_of(item: Any, default: str = "default") -> str:
    """Return the namespace of an object; `default` if it names none."""
    return text(item, "metadata", "namespace") or default


def key_of(item: Any) -> tuple[str, str]:
    """Return the namespace and the name of an object."""
    return namespace_of(item), text(item, "metadata", "name")


def count_of(value: Any, total: int) -> int | None:
    """Return a number of pods: a number, or a percentage of `total` rounded up (`25%`); None if it is neither."""
    if isinstance(value, str) and (percent := _PERCENT.fullmatch(value)):
        return -(-int(percent[1]) * total // 100)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def replica_limits(autoscaler: Any) -> tuple[int, int] | None:
    """Return the lowest and the highest number of replicas of an HPA or a ScaledObject; None for other objects.

    Absent values are the defaults of Kubernetes and KEDA.
    """
    match get(autoscaler, "kind"):
        case "HorizontalPodAutoscaler":
            least = integer(autoscaler, "spec", "minReplicas", default=1)
            most = integer(autoscaler, "spec", "maxReplicas", default=least)
        case "ScaledObject":
            least = integer(autoscaler, "spec", "minReplicaCount", default=0)
            most = integer(autoscaler, "spec", "maxReplicaCount", default=100)
        case _:
            return None
    return least, max(least, most)


def text_map(value: Mapping[str, Any]) -> dict[str, str]:
    """Return labels or annotations as text. A YAML file may have `true` or 1 where Kubernetes has text."""
    return {str(key): _text(each) for key, each in value.items() if each is not None}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def quantity(value: Any) -> Fraction:
    """Return a quantity of Kubernetes (`2`, `500m`, `1Gi`, `129e6`) as a number. Raises `ValueError`."""
    return max(Fraction(-_MOST), min(Fraction(_MOST), _uncapped(value)))


def _uncapped(value: Any) -> Fraction:
    text = "" if isinstance(value, bool) or not isinstance(value, str | int | float) else str(value)
    match = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST_QUANTITY else None
    if match is None:
        raise ValueError(f"{shown(value)} is not a quantity such as 500m, 2 or 1Gi")
    number, suffix, exponent = match.groups()
    amount = Fraction(number)
    if exponent is not None:
        if abs(int(exponent)) > _MAX_EXPONENT:
            raise ValueError(f"{value!r} is out of range")
        return amount * Fraction(10) ** int(exponent)
    if suffix in _POWERS_OF_TWO:
        return amount * int(2 ** _POWERS_OF_TWO[suffix])
    return amount * Fraction(10) ** _POWERS_OF_TEN.get(suffix or "", 0)


def as_float(value: Any) -> float | None:
    """Return a quantity as a number; None if it is not one."""
    try:
        return float(quantity(value))
    except ValueError:
        return None


def amounts(values: Mapping[str, Any]) -> dict[str, int]:
    """Return a resource list as the scheduler counts it: CPU in thousandths, others in units, both rounded up.

    Raises `ValueError` for an invalid quantity.
    """
    return {name: math.ceil(amount) for name, amount in exact(values).items()}


def exact(values: Mapping[str, Any]) -> dict[str, Fraction]:
    """Return a resource list before it is rounded: CPU in thousandths, others in units. Raises `ValueError`."""
    return {
        str(name): quantity(value) * (1000 if name == "cpu" else 1)
        for name, value in values.items()
        if value is not None
    }


def is_extended(resource: str) -> bool:
    """Return whether a resource is one of devices, such as `nvidia.com/gpu`."""
    domain, slash, _ = resource.partition("/")
    return bool(slash) and domain != "kubernetes.io" and not domain.endswith(".kubernetes.io")


def show(resource: str, amount: int) -> str:
    """Return an amount of `amounts` for people: `2.5` CPUs, `1.5Gi` of memory, `2` GPUs."""
    if resource.rpartition(".")[2] == "cpu":
        return f"{amount / 1000:g}"
    if "memory" in resource or "storage" in resource or "hugepages" in resource:
        for suffix, power in reversed(_POWERS_OF_TWO.items()):
            if amount >= 2**power:
                return f"{amount / 2**power:.4g}{suffix}"
    return str(amount)


def is_sidecar(container: Any) -> bool:
    """Return whether an init container runs as long as the pod."""
    return bool(get(container, "restartPolicy") == "Always")


def is_pause(image: str) -> bool:
    """Return whether an image only holds a place: `registry.k8s.io/pause:3.10`, `pause-amd64`."""
    return _PAUSE.search(image) is not None
