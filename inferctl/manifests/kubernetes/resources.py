"""What a pod requests, as the scheduler and quotas count it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from inferctl.manifests.kubernetes import fields

Kind = Literal["requests", "limits"]


Exact = dict[str, Fraction]


def of_container(container: Mapping[str, Any], kind: Kind) -> Exact:
    """Return the requests or limits of a container. A limit without a request is the request. Raises `ValueError`."""
    limits = fields.exact(fields.mapping(container, "resources", "limits"))
    if kind == "limits":
        return limits
    return limits | fields.exact(fields.mapping(container, "resources", "requests"))


def of_pod(spec: Mapping[str, Any], kind: Kind) -> dict[str, int]:
    """Return the requests or limits of a pod. Raises `ValueError` for an invalid quantity.

    It is the larger, for each resource, of what all containers need together and of what is needed while an init
    container runs; sidecars that started before count in both. The overhead of the runtime class is added.
    """
    running: Exact = {}
    for container in fields.items(spec, "containers"):
        _add(running, of_container(container, kind))
    sidecars: Exact = {}
    starting: Exact = {}
    for container in fields.items(spec, "initContainers"):
        own = of_container(container, kind)
        if fields.is_sidecar(container):
            _add(running, own)
            _add(sidecars, own)
            need = sidecars
        else:
            need = own
            _add(need, sidecars)
        starting = _larger(starting, need)
    total = _larger(running, starting)
    _apply_pod_level(total, spec, kind)
    overhead = fields.exact(fields.mapping(spec, "overhead"))
    # What has no limit does not get one from the overhead.
    _add(total, {name: amount for name, amount in overhead.items() if kind == "requests" or total.get(name)})
    return {name: math.ceil(amount) for name, amount in total.items()}


def _add(total: Exact, more: Mapping[str, Fraction]) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, Fraction(0)) + amount


def _larger(one: Exact, other: Exact) -> Exact:
    return {name: max(one.get(name, Fraction(0)), other.get(name, Fraction(0))) for name in {**one, **other}}


def _apply_pod_level(total: Exact, spec: Mapping[str, Any], kind: Kind) -> None:
    """Replace CPU, memory and huge pages by those of the whole pod, if the pod states them (on from 1.34)."""
    stated = fields.exact(fields.mapping(spec, "resources", kind))
    if kind == "requests":
        # The API server fills in a missing request of the pod: the sum of its containers, else the limit of the pod.
        limits = fields.exact(fields.mapping(spec, "resources", "limits"))
        stated = {name: total.get(name) or amount for name, amount in limits.items()} | stated
    for name, amount in stated.items():
        if name in ("cpu", "memory") or name.startswith("hugepages-"):
            total[name] = amount


def best_effort(spec: Mapping[str, Any]) -> bool:
    """Return whether the quality of service is BestEffort: no container states CPU or memory."""
    containers = [*fields.items(spec, "containers"), *fields.items(spec, "initContainers"), spec]
    stated = (
        amount
        for each in containers
        for kind in ("requests", "limits")
        for name, amount in fields.amounts(fields.mapping(each, "resources", kind)).items()
        if name in ("cpu", "memory")
    )
    return not any(stated)
