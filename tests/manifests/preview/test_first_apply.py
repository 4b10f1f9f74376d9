"""The first apply: a Deployment without `replicas` starts one pod, also if its autoscaler starts from zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl import cli
from tests.manifests import kube


def manifests(scaler: dict[str, Any] | None, replicas: int | None) -> list[dict[str, Any]]:
    gpu = {"nvidia.com/gpu": 1}
    container = {"name": "server", "image": "server:1.0", "resources": {"requests": gpu, "limits": gpu}}
    found = [kube.deployment("embed", {"app": "embed"}, {"containers": [container]}, replicas)]
    if scaler:
        kind = "ScaledObject" if "maxReplicaCount" in scaler else "HorizontalPodAutoscaler"
        target = {"name": "embed"} if kind == "ScaledObject" else {"name": "embed", "kind": "Deployment"}
        found.append(kube.thing(kind, "embed", {"scaleTargetRef": target, **scaler}))
    return found


POD = kube.running("embed-0", "g", {"app": "embed"}, {"containers": [{"name": "server"}]})


@pytest.mark.parametrize(
    ("scaler", "replicas", "running", "first"),
    [
        ({"minReplicaCount": 0, "maxReplicaCount": 3}, None, False, 1),
        ({"maxReplicaCount": 3}, None, False, 1),  # the default of KEDA is 0
        ({"minReplicaCount": 0, "maxReplicaCount": 3}, 0, False, 0),
        ({"minReplicaCount": 0, "maxReplicaCount": 3}, 2, False, 2),
        ({"minReplicaCount": 1, "maxReplicaCount": 3}, None, False, 0),
        ({"minReplicaCount": 1, "maxReplicaCount": 3}, 3, False, 2),
        ({"minReplicas": 0, "maxReplicas": 3}, None, False, 1),  # an HPA of Kubernetes 1.37
        ({"minReplicas": 1, "maxReplicas": 3}, None, False, 0),
        ({"minReplicaCount": 0, "maxReplicaCount": 3}, None, True, 0),  # not the first apply
        (None, None, False, 0),
        (None, 0, False, 0),
    ],
)
def test_pods_of_the_first_apply(
    scaler: dict[str, Any] | None,
    replicas: int | None,
    running: bool,
    first: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = {"name": "g", "allocatable": {"cpu": 4, "nvidia.com/gpu": 2}}
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text(yaml.safe_dump_all([{"nodes": [node]}, *([POD] if running else [])]))
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all(manifests(scaler, replicas)))
    assert cli.run(["deploy", "--preview", str(nodes), str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (cluster,) = found["clusters"]
    (deployment,) = cluster["deployments"]
    groups = [each for each in deployment["pods"] if each["phase"] == "first"]
    assert sum(len(each["names"]) for each in groups) == first
    assert found["fits_at_rest"] and deployment["min_replicas"] <= 1
    if first:
        assert [name for each in groups for name in each["feasible"]] == ["g"]
        assert any("first apply" in note and "embed" in note for note in cluster["notes"])
        # They are gone when the spike comes.
        rest = [each for each in deployment["pods"] if each["phase"] == "rest"]
        assert sum(len(each["names"]) for each in rest) == deployment["min_replicas"]
        assert cli.run(["deploy", "--preview", str(nodes), str(file)]) == 0
        assert "first apply" in capsys.readouterr().out


def test_what_no_node_has_makes_an_autoscaler_buy_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes, file = tmp_path / "nodes.yaml", tmp_path / "all.yaml"
    nodes.write_text("nodes: [{name: a, allocatable: {cpu: 4}}]\n")
    file.write_text(yaml.safe_dump_all(manifests({"minReplicaCount": 0, "maxReplicaCount": 3}, None)))
    assert cli.run(["deploy", "--preview", str(nodes), str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (group,) = (each for each in found["clusters"][0]["deployments"][0]["pods"] if each["phase"] == "first")
    assert group["waits"] and found["fits_at_rest"]
    assert any("new node" in note for note in found["clusters"][0]["notes"])
