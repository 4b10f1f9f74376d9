"""Fields, selectors, taints and images as Kubernetes reads them: shared by lint and preview."""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.manifests.kubernetes import fields, selectors, taints
from inferctl.manifests.kubernetes.taints import Taint

LABELS = {"a": "1", "size": "10"}


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"key": key, "operator": operator, "values": list(values)}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (None, False),
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchLabels": {"a": 1}}, True),  # YAML reads a number where Kubernetes has text
        ({"matchExpressions": [expression("a", "In", "1", "2")]}, True),
        ({"matchExpressions": [expression("b", "NotIn", "1")]}, True),
        ({"matchExpressions": [expression("a", "NotIn", "1")]}, False),
        ({"matchExpressions": [expression("b", "Exists")]}, False),
        ({"matchExpressions": [expression("b", "DoesNotExist")]}, True),
        ({"matchExpressions": [expression("a", "Unknown")]}, False),
        ({"matchLabels": {"a": "1"}, "matchExpressions": [expression("a", "DoesNotExist")]}, False),
    ],
)
def test_label_selectors(selector: Any, expected: bool) -> None:
    assert selectors.matches(selector, LABELS) is expected


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([], False),
        ([{}], False),
        ([{"matchExpressions": [expression("size", "Gt", "9")]}], True),
        ([{"matchExpressions": [expression("size", "Gt", "10")]}], False),
        ([{"matchExpressions": [expression("size", "Lt", "11")]}], True),
        ([{"matchExpressions": [expression("size", "Lt", "10")]}], False),
        ([{"matchExpressions": [expression("absent", "Lt", "10")]}], False),
        ([{"matchExpressions": [expression("size", "Gt", "nine")]}], False),
        ([{"matchFields": [expression("metadata.name", "In", "n1")]}], True),
        ([{"matchFields": [expression("metadata.name", "In", "n2")]}], False),
        ([{}, {"matchExpressions": [expression("a", "Exists")]}], True),
    ],
)
def test_terms_of_a_node_selector_are_alternatives(terms: list[Any], expected: bool) -> None:
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    spec = {"nodeSelector": {"a": "1"}, "affinity": {"nodeAffinity": required}}
    assert selectors.node_matches(spec, "n1", LABELS) is expected
    assert not selectors.node_matches({**spec, "nodeSelector": {"a": "2"}}, "n1", LABELS)


@pytest.mark.parametrize(
    ("toleration", "expected"),
    [
        ({"key": "gpu", "operator": "Exists"}, True),
        ({"key": "gpu", "value": "yes"}, True),
        ({"key": "gpu", "operator": "Equal", "value": "no"}, False),
        ({"operator": "Exists"}, True),
        ({"operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
        ({"key": "gpu", "operator": "Sometimes"}, False),
    ],
)
def test_tolerations(toleration: dict[str, Any], expected: bool) -> None:
    taint = Taint("gpu", "yes", "NoSchedule")
    assert taints.tolerates([toleration], taint) is expected
    assert taints.untolerated([toleration], [taint]) == (None if expected else taint)


def test_preferences_keep_no_pod_away() -> None:
    assert taints.untolerated([], [Taint("gpu", "", "PreferNoSchedule")]) is None
    assert taints.of_node({"taints": [{"key": "a", "effect": "NoExecute"}, None]}) == (Taint("a", "", "NoExecute"),)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("registry.k8s.io/pause:3.10", True),
        ("pause", True),
        ("localhost:5000/pause-amd64@sha256:00", True),
        ("pause@sha256:0", True),
        ("gcr.io/google_containers/pause-amd64:3.1", True),
        ("server:1", False),
        ("example.com/pause/server:1", False),
        ("example.com/pauses:1", False),
    ],
)
def test_pause_images(image: str, expected: bool) -> None:
    assert fields.is_pause(image) is expected


def test_fields_of_other_types_are_absent() -> None:
    data: Any = {"list": [{"a": 1}, "text", {"a": True}], "text": "x", "zero": 0}
    assert fields.get(data, "list", 0, "a") == 1 and fields.get(data, "list", -1, "a") is True
    assert fields.get(data, "list", 3) is fields.get(data, "text", "a") is fields.get(data, "list", "a") is None
    assert fields.integer(data, "zero", default=7) == 0 and fields.integer(data, "text", default=7) == 7
    assert fields.integer(data, "list", 2, "a") is None  # a boolean is no number
    assert fields.items(data, "list") == [{"a": 1}, {"a": True}] and fields.sequence(data, "text") == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), (0, 0), ("25%", 3), ("20%", 2), ("100%", 10), ("half", None), (None, None), (True, None)],
)
def test_percentages_of_pods_are_rounded_up(value: object, expected: int | None) -> None:
    assert fields.count_of(value, 10) == expected


@pytest.mark.parametrize(
    ("kind", "spec", "expected"),
    [
        ("HorizontalPodAutoscaler", {"minReplicas": 2, "maxReplicas": 5}, (2, 5)),
        ("HorizontalPodAutoscaler", {"maxReplicas": 5}, (1, 5)),
        ("HorizontalPodAutoscaler", {"minReplicas": 3}, (3, 3)),
        ("ScaledObject", {}, (0, 100)),
        ("ScaledObject", {"minReplicaCount": 2, "maxReplicaCount": 1}, (2, 2)),
        ("Deployment", {"replicas": 2}, None),
    ],
)
def test_limits_of_autoscalers(kind: str, spec: dict[str, int], expected: tuple[int, int] | None) -> None:
    assert fields.replica_limits({"kind": kind, "spec": spec}) == expected
