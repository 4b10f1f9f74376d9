"""The validators of the tests of manifests find faults, so that their silence means something."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.deploy.validation import custom_resources, problems
from tests.manifests import kube

HOOK = {"preStop": {"sleep": {"seconds": 5}}}
CONTAINER = {"name": "a", "image": "a:1", "resources": {"limits": {"cpu": "1"}}, "lifecycle": HOOK}


TRIGGER = {"type": "prometheus", "metadata": {"query": "x", "threshold": "1"}}
GOOD: dict[str, dict[str, Any]] = {
    "deployment": kube.deployment("a", {"a": "b"}, {"containers": [CONTAINER]}),
    "scaled": kube.thing("ScaledObject", "a", {"scaleTargetRef": {"name": "a"}, "triggers": [TRIGGER]}),
}


# Fault: object, path, value (None removes), a part of the problem.
FAULTS: dict[str, tuple[str, str, Any, str]] = {
    "unknown field": ("deployment", "spec.replica", 3, "replica"),
    "wrong type": ("deployment", "spec.replicas", "three", "three"),
    "missing selector": ("deployment", "spec.selector", None, "selector"),
    "dead version": ("deployment", "apiVersion", "apps/v1beta1", "no schema"),
    "unknown kind": ("deployment", "kind", "Deploymint", "no schema"),
    "unknown group": ("deployment", "apiVersion", "example.com/v1", "no schema"),
    "unknown field of a custom resource": ("scaled", "spec.replica", 3, "replica"),
    "unknown version of a custom resource": ("scaled", "apiVersion", "keda.sh/v9", "no schema"),
    "metadata of a trigger as a number": ("scaled", "spec.triggers.0.metadata.threshold", 1, "is not of type"),
}


def changed(found: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(found)
    *parents, last = path.split(".")
    inner: Any = copied
    for key in parents:
        inner = inner[int(key)] if key.isdecimal() else inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copied


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    name, path, value, part = FAULTS[fault]
    found = problems(changed(GOOD[name], path, value), "1.37")
    assert found
    assert part in "; ".join(found)


def test_all_copied_definitions_are_read() -> None:
    kinds = {kind for _, kind in custom_resources()}
    assert kinds == {"PrometheusRule", "ScaledObject", "ServiceMonitor"}
