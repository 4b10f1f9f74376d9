"""Tests for the nodes file: what kubectl prints, the short form, and their errors."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.core import document
from inferctl.core.errors import InferctlError, SpecError, UsageError
from inferctl.manifests.kubernetes import fields
from inferctl.manifests.manifests_file import Located
from inferctl.manifests.preview import admission, filters, nodes_file
from tests.manifests import kube

GROUPS = """
nodes:
- name: gpu
  count: 3
  cluster: one
  region: r1
  zones: [a, b]
  labels: {pool: big, spot: true}
  taints: ["nvidia.com/gpu=present:NoSchedule", "late:NoExecute"]
  allocatable: {cpu: 3.5, memory: 10Gi, nvidia.com/gpu: 2}
- name: cpu
  cluster: two
  ready: false
  unschedulable: true
  allocatable: {cpu: 500m, pods: 7}
"""


def write(folder: Path, text: str, name: str = "nodes.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_the_short_form_makes_nodes_of_groups(tmp_path: Path) -> None:
    one, two = nodes_file.read([write(tmp_path, GROUPS)])
    assert (one.name, two.name) == ("one", "two")
    assert list(one.nodes) == ["gpu-1", "gpu-2", "gpu-3"]
    assert [node.zone for node in one.nodes.values()] == ["a", "b", "a"]
    gpu, disk = one.nodes["gpu-2"], {"ephemeral-storage": 2**60}  # which people do not write
    assert gpu.labels["kubernetes.io/hostname"] == "gpu-2"
    assert (gpu.labels["pool"], gpu.labels["spot"]) == ("big", "true")
    assert [str(taint) for taint in gpu.taints] == ["nvidia.com/gpu=present:NoSchedule", "late:NoExecute"]
    assert gpu.allocatable == {"pods": 110, "cpu": 3500, "memory": 10 * 2**30, "nvidia.com/gpu": 2, **disk}
    cpu = two.nodes["cpu"]
    assert cpu.unschedulable
    assert {taint.key for taint in cpu.taints} == {"node.kubernetes.io/not-ready", "node.kubernetes.io/unschedulable"}
    assert cpu.allocatable == {"pods": 7, "cpu": 500, **disk}


def test_objects_next_to_groups_belong_to_their_clusters(tmp_path: Path) -> None:
    quota = "---\napiVersion: v1\nkind: ResourceQuota\nmetadata: {name: q}\nspec: {hard: {pods: 1}}\n"
    clusters = nodes_file.read([write(tmp_path, GROUPS + quota)])
    assert [len(cluster.of_kind("ResourceQuota")) for cluster in clusters] == [1, 1]


def kubectl_list(*items: dict[str, object]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


NODE = kube.thing(
    "Node",
    "n1",
    {"taints": [{"key": "k", "effect": "NoSchedule"}]},
    labels={"kubernetes.io/hostname": "n1"},
    status={"allocatable": {"cpu": "3920m", "memory": "15842Mi", "pods": "110"}, "capacity": {"cpu": "4"}},
)


ONE_CORE = {"priority": 7, "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}
POD = kube.running("p1", "n1", {"app": "x"}, ONE_CORE, namespace="a", startTime="2026-11-01T00:00:10Z")


def test_the_output_of_kubectl_is_a_cluster_named_as_the_file(tmp_path: Path) -> None:
    done = {**POD, "metadata": {"name": "done", "namespace": "a"}, "status": {"phase": "Succeeded"}}
    (cluster,) = nodes_file.read([write(tmp_path, kubectl_list(NODE, POD, done), "frankfurt.yaml")])
    assert cluster.name == "frankfurt"
    assert cluster.nodes["n1"].allocatable["cpu"] == 3920
    (pod,) = cluster.on("n1")
    assert (pod.name, pod.priority, pod.requests) == ("p1", 7, {"cpu": 1000})
    assert cluster.used("n1")["cpu"] == 1000


def test_the_manifests_replace_objects_of_the_cluster(tmp_path: Path) -> None:
    old = kube.thing("PriorityClass", "c", value=1)
    (cluster,) = nodes_file.read(
        [write(tmp_path, kubectl_list(NODE, old))], [Located({**old, "value": 2}), Located(POD)]
    )
    assert [each["value"] for each in cluster.of_kind("PriorityClass")] == [2]
    # Pods among the manifests do not run yet.
    assert list(cluster.pods()) == []


BROKEN = {**NODE, "status": {"allocatable": {"cpu": "1banana"}}}


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("nodes: []", "nodes", 1),
        ("nodes:\n- {name: a, allocatable: {cpu: 1}, colour: red}", "unknown key 'colour'", 2),
        ("nodes:\n- {name: a}", "allocatable is missing", 2),
        ("nodes:\n- {name: a, allocatable: {cpu: lots}}", "'lots' is not a quantity", 2),
        ("nodes:\n- {name: a, allocatable: {cpu: 1}, taints: [gpu]}", "'gpu' is not a taint", 2),
        ("nodes:\n- {name: a, count: -1, allocatable: {cpu: 1}}", "count", 2),
        (kubectl_list(POD), "has no nodes", None),
        (kubectl_list(BROKEN), "node n1: '1banana' is not a quantity", 1),
    ],
)
def test_errors_name_the_key_and_the_line(tmp_path: Path, text: str, message: str, line: int | None) -> None:
    with pytest.raises(InferctlError) as caught:
        nodes_file.read([write(tmp_path, text)])
    problems = caught.value.problems if isinstance(caught.value, SpecError) else []
    assert message in " ".join([caught.value.message, *(problem.message for problem in problems)])
    assert [problem.line for problem in problems] == ([line] if line else [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("100m", Fraction(1, 10)), ("0.5", Fraction(1, 2)), (".5", Fraction(1, 2)), ("1.", 1), ("1k", 1000),
        ("1Ki", 1024), ("1.5Gi", 3 * 2**29), ("1E", 10**18), ("1E3", 1000), ("2e-3", Fraction(1, 500)),
        ("1u", Fraction(1, 10**6)), ("1n", Fraction(1, 10**9)), ("+3", 3), (2, 2), (0.25, Fraction(1, 4)),
        *((text, None) for text in ("", "1 Gi", "Gi", "1KB", "1K", "1banana", "0x10", "--1", None, True, [], "1_000")),
        *((text, None) for text in ("1e999", "1e99999x")),
    ],
)  # fmt: skip
def test_quantities(text: object, value: Any) -> None:
    assert fields.as_float(text) == (None if value is None else float(value))
    if value is not None:
        assert fields.quantity(text) == value
        return
    with pytest.raises(ValueError, match=r"is not a quantity|is out of range"):
        fields.quantity(text)


def test_amounts_are_rounded_up() -> None:
    assert fields.amounts({"cpu": "0.0001", "memory": "100m"}) == {"cpu": 1, "memory": 1}


def test_manifests_with_wrong_types_do_not_crash(tmp_path: Path) -> None:
    (cluster,) = nodes_file.read([write(tmp_path, kubectl_list(NODE))])
    spec = {
        "containers": "none",
        "tolerations": {"key": 1},
        "affinity": {"podAffinity": [], "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": 3}},
        "topologySpreadConstraints": [{"maxSkew": "1", "whenUnsatisfiable": "DoNotSchedule"}, 5],
        "volumes": [{"persistentVolumeClaim": "x"}],
    }
    pod = admission.admitted(cluster.objects, "a", "odd", {}, spec)
    cluster.add(pod)
    assert filters.feasible(cluster, pod)["n1"]


def test_large_json_is_read_where_yaml_of_its_size_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "MAX_BYTES", 100)
    monkeypatch.setattr(document, "MAX_MANIFEST_BYTES", 200)
    items = [kube.thing("Node", f"n{i}", status={"allocatable": {"cpu": "3500m"}}) for i in range(5)]
    listed = {"apiVersion": "v1", "kind": "List", "items": items}
    (cluster,) = nodes_file.read([write(tmp_path, json.dumps(listed), "one.json")])
    assert list(cluster.nodes) == ["n0", "n1", "n2", "n3", "n4"]
    assert cluster.nodes["n4"].allocatable["cpu"] == 3500
    with pytest.raises(UsageError, match="larger than 200 bytes, the limit for YAML") as caught:
        nodes_file.read([write(tmp_path, yaml.safe_dump(listed), "one.yaml")])
    assert "-o json" in str(caught.value.hint) and "256,000,000" in str(caught.value.hint)
    with pytest.raises(SpecError, match="not valid JSON"):
        nodes_file.read([write(tmp_path, json.dumps(listed)[:-1], "cut.json")])
    with pytest.raises(SpecError, match="nested too deeply"):
        nodes_file.read([write(tmp_path, '{"a":' * 100_000, "deep.json")])
    monkeypatch.setattr(document, "MAX_JSON_BYTES", 300)
    with pytest.raises(UsageError, match="larger than 300 bytes") as caught:
        nodes_file.read([write(tmp_path, json.dumps(listed), "one.json")])
    assert "--field-selector" in str(caught.value.hint)
