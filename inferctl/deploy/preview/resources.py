"""What a pod requests, as the scheduler and quotas count it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from inferctl.deploy.kubernetes import fields

Kind = Literal["requests", "limits"]


def of_container(container: Mapping[str, Any], kind: Kind) -> dict[str, int]:
    """Return the requests or limits of a container. A limit without a request is the request. Raises `ValueError`."""
    limits = fields.amounts(fields.mapping(container, "resources", "limits"))
    if kind == "limits":
        return limits
    return limits | fields.amounts(fields.mapping(container, "resources", "requests"))


def of_pod(spec: Mapping[str, Any], kind: Kind) -> dict[str, int]:
    """Return the requests or limits of a pod. Raises `ValueError` for an invalid quantity.

    It is the larger, for each resource, of what all containers need together and of what is needed while an init
    container runs; sidecars that started before count in both. The overhead of the runtime class is added.
    """
    running: Counter[str] = Counter()
    for container in fields.items(spec, "containers"):
        running.update(of_container(container, kind))
    sidecars: Counter[str] = Counter()
    starting: Counter[str] = Counter()
    for container in fields.items(spec, "initContainers"):
        own = of_container(container, kind)
        if fields.is_sidecar(container):
            running.update(own)
            sidecars.update(own)
            need = sidecars
        else:
            need = Counter(own)
            need.update(sidecars)
        starting |= need
    total = running | starting
    _apply_pod_level(total, spec, kind)
    total.update(fields.amounts(fields.mapping(spec, "overhead")))
    return dict(total)


def _apply_pod_level(total: Counter[str], spec: Mapping[str, Any], kind: Kind) -> None:
    """Replace CPU, memory and huge pages by those of the whole pod, if the pod states them (on from 1.34)."""
    stated = fields.amounts(fields.mapping(spec, "resources", kind))
    if kind == "requests":
        # The API server fills in a missing request of the pod: the sum of its containers, else the limit of the pod.
        limits = fields.amounts(fields.mapping(spec, "resources", "limits"))
        stated = {name: total.get(name) or amount for name, amount in limits.items()} | stated
    for name, amount in stated.items():
        if name in ("cpu", "memory") or name.startswith("hugepages-"):
            total[name] = amount


def is_extended(resource: str) -> bool:
    """Return whether a resource is an extended one, such as `nvidia.com/gpu`."""
    domain, slash, _ = resource.partition("/")
    return bool(slash) and not (domain == "kubernetes.io" or domain.endswith(".kubernetes.io"))


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
