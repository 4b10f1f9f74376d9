"""Fields, selectors, taints and images as Kubernetes reads them: shared by lint and preview."""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.manifests.kubernetes import fields, selectors, taints
from inferctl.manifests.kubernetes.taints import Taint


def test_selectors_and_taints_with_other_values() -> None:
    """What the API server refuses or YAML reads as another type; the rest is in the cases of the preview."""
    unknown = {"key": "a", "operator": "Unknown"}
    assert selectors.matches({"matchLabels": {"a": 1}}, {"a": "1"})  # YAML reads a number where Kubernetes has text
    assert not selectors.matches({"matchExpressions": [unknown]}, {"a": "1"})
    assert not taints.tolerates([unknown], Taint("a", "", "NoSchedule"))
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
