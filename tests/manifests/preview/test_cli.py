"""Tests for `inferctl deploy --preview` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inferctl import cli

NODES = """
nodes:
- name: a100
  count: 2
  cluster: one
  zones: [a, b]
  labels: {gpu: a100}
  taints: ["nvidia.com/gpu=present:NoSchedule"]
  allocatable: {cpu: 11, memory: 80Gi, nvidia.com/mig-3g.20gb: 2}
- name: l4
  cluster: one
  labels: {gpu: l4}
  allocatable: {cpu: 11, memory: 80Gi, nvidia.com/gpu: 1}
"""
MANIFESTS = """
apiVersion: scheduling.k8s.io/v1
kind: PriorityClass
metadata: {name: overflow}
value: -10
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: embed
  annotations: {inferctl.io/tokens-per-second: "100", inferctl.io/load-seconds: "45"}
spec:
  selector: {matchLabels: {app: embed}}
  template:
    metadata: {labels: {app: embed}}
    spec:
      nodeSelector: {gpu: a100}
      tolerations: [{key: nvidia.com/gpu, operator: Exists}]
      containers: [{name: main, image: server, resources: {limits: {nvidia.com/mig-3g.20gb: 1}}}]
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {name: embed}
spec: {scaleTargetRef: {name: embed}, minReplicaCount: LEAST, maxReplicaCount: 4}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: overflow}
spec:
  replicas: 1
  selector: {matchLabels: {app: overflow}}
  template:
    metadata: {labels: {app: overflow}}
    spec:
      priorityClassName: overflow
      nodeSelector: {gpu: a100}
      tolerations: [{key: nvidia.com/gpu, operator: Exists}]
      containers: [{name: main, image: "registry.k8s.io/pause:3.10", resources: {limits: {nvidia.com/mig-3g.20gb: 1}}}]
"""


def files(folder: Path, least: int = 1) -> list[str]:
    (folder / "nodes.yaml").write_text(NODES)
    (folder / "manifests.yaml").write_text(MANIFESTS.replace("LEAST", str(least)))
    return ["deploy", "--preview", str(folder / "nodes.yaml"), str(folder / "manifests.yaml")]


def test_the_preview_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*files(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["fits_at_rest"], result["fits_at_peak"]) == (True, True)
    (cluster,) = result["clusters"]
    embed = cluster["deployments"][0]
    # The placeholder is put on a100-2, and the second pod into its zone, which has none of embed.
    assert [(group["phase"], group["names"], group["feasible"]) for group in embed["pods"]] == [
        ("rest", ["embed-1"], ["a100-1", "a100-2"]),
        ("spike", ["embed-2"], ["a100-1", "a100-2"]),
        ("spike", ["embed-3"], ["a100-1"]),
        ("spike", ["embed-4"], []),
    ]
    assert embed["pods"][-1]["evicted"] == ["overflow-1"]
    (why,) = [each for each in embed["pods"][0]["infeasible"] if each["nodes"] == ["l4"]]
    assert [reason["filter"] for reason in why["reasons"]] == ["NodeAffinity", "NodeResourcesFit"]
    drills = [(drill["scope"], drill["place"], drill["nodes_alike"]) for drill in result["drills"]]
    assert drills == [("node", "a100-1", 2), ("zone", "a", 1), ("zone", "b", 1)]


def test_the_preview_as_text_fits_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(files(tmp_path)) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    words = " ".join(text.split())
    assert "embed: 1 to 4 replicas; each 1 nvidia.com/mig-3g.20gb" in words
    assert "not l4: NodeAffinity: gpu is l4, not a100 spike" in words
    assert "evicts 1 pod (priority -10)" in words
    assert "The spike evicts 1 pod of overflow: 0 fit elsewhere, 1 wait for new nodes of an autoscaler." in words
    assert "Losses at the peak: share of all replicas that is served at once" in words


def test_pods_that_do_not_fit_at_rest_fail_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = files(tmp_path, least=4)
    manifests = Path(arguments[-1])
    manifests.write_text(manifests.read_text().replace("value: -10", "value: 10"))
    assert cli.run(arguments) == 1
    printed = capsys.readouterr()
    assert "waits: no feasible node, and no pods to evict" in " ".join(printed.out.split())
    # The placeholder has one slice, and embed cannot evict it now: the fourth pod waits.
    assert "1 pod at rest does not fit on the nodes" in printed.err


def test_the_pods_of_a_job_are_placed_and_serve_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = files(tmp_path)
    job = MANIFESTS.split("---")[1].replace("apps/v1", "batch/v1").replace("kind: Deployment", "kind: Job")
    Path(arguments[-1]).write_text(job.replace("selector: {matchLabels: {app: embed}}", "parallelism: 5"))
    assert cli.run([*arguments, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    (found,) = result["clusters"][0]["deployments"]
    placed = [(name, len(each["nodes"])) for each in found["pods"] for name in each["names"][-1:]]
    assert placed[-1] == ("embed-5", 0) and sum(len(each["nodes"]) for each in found["pods"]) == 4
    assert result["drills"] == []


def test_manifests_without_a_deployment_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = files(tmp_path)
    Path(arguments[-1]).write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: x}\n")
    assert cli.run(arguments) == 2
    assert "have no Deployment" in capsys.readouterr().err


def test_manifests_need_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = files(tmp_path)[-1]
    assert cli.run(["deploy", manifests]) == 2
    assert "--preview" in capsys.readouterr().err
