"""What the lint finds in manifests written after those that authors of model servers publish, each finding judged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.manifests import lint, manifests_file
from inferctl.manifests.manifests_file import Located
from tests.manifests import kube

PUBLIC, SERVERS = Path(__file__).with_name("public"), Path(__file__).with_name("servers.yaml")
# All errors and warnings of each file, and why each is right.
FINDINGS = {
    # One of five replicas more in a rollout; the pull of the model into an emptyDir; scaled on its queue alone.
    "tei.yaml": {
        "surge-needs-gpu",
        "replicas-and-autoscaler",
        "gpu-toleration-missing",
        "empty-dir-unbounded",
        "backlog-only",
    },
    # `sku=gpu` is the taint of Azure. A volume without a source
    # is an emptyDir.
    "ollama.yaml": {"empty-dir-unbounded"},
    # KServe makes the pods, and the lint says that it does not read them.
    "kserve.yaml": set(),
    # The operator of Ray adds the port `metrics`.
    "ray.yaml": set(),
    "leader-worker-set.yaml": {"gpu-toleration-missing"},
    "llama-cpp.yaml": set(),
    # A monitor may have one port for each of its Services.
    "nim.yaml": set(),
    "sglang.yaml": {"surge-needs-gpu", "gpu-toleration-missing", "image-unpinned"},
    # The picker has the name of the pool in its arguments. It is no model server.
    "inference-gateway.yaml": {"surge-needs-gpu", "gpu-toleration-missing", "empty-dir-unbounded"},
    "prometheus-stack.yaml": set(),
    # Neither a pod that ends nor a client of a model server is a model server.
    "test-pod.yaml": set(),
}


def test_every_file_is_judged() -> None:
    assert {file.name for file in PUBLIC.iterdir()} == set(FINDINGS)
    assert len(FINDINGS) >= 10


@pytest.mark.parametrize("name", FINDINGS)
def test_the_findings_are_right_and_complete(name: str) -> None:
    found = lint.lint(manifests_file.read([PUBLIC / name]))
    assert {each.rule for each in found if each.level != "note"} == FINDINGS[name]
    assert not [each for each in found if each.level == "error"]


def test_only_the_server_behind_a_pool_is_a_model_server() -> None:
    found = lint.lint(manifests_file.read([PUBLIC / "inference-gateway.yaml"]))
    assert {each.object for each in found} == {"Deployment/vllm-llama3"}


def parsed(name: str) -> list[dict[str, Any]]:
    return [copy.deepcopy(each.data) for each in manifests_file.read([PUBLIC / name])]


def rules(objects: list[dict[str, Any]], minor: int = 35) -> dict[str, str]:
    """Return the findings by rule, each with what it says."""
    found = lint.lint([Located(each) for each in objects], minor)
    return {each.rule: each.what for each in found if each.level != "note"}


def server(args: list[str] | None = None, kind: str = "Deployment", **more: Any) -> dict[str, Any]:
    """Return a workload with one container on an H100 with 80 GB. `more`: of the container."""
    container = {
        "name": "main",
        "image": "vllm/vllm-openai:v0.11.0",
        "args": args or [],
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "64Gi"}},
        **more,
    }
    pod = {"containers": [container], "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}
    return kube.deployment("server", {"app": "server"}, pod, 2) | {"kind": kind}


def pod(item: dict[str, Any]) -> Any:
    return item["spec"]["template"]["spec"]


@pytest.mark.parametrize("case", yaml.safe_load(SERVERS.read_text(encoding="utf-8")), ids=str)
def test_a_container_has_a_fault_or_only_looks_like_it(case: dict[str, Any]) -> None:
    variables = [{"name": name, "value": value} for name, value in case.get("env", {}).items()]
    item = server(case.get("args"), case.get("kind", "Deployment"), env=variables)
    assert (case["rule"] in rules([item])) == case["found"]


@pytest.mark.parametrize(("address", "found"), [(None, True), ("None", False)])
def test_a_headless_service_sets_no_environment(address: str | None, found: bool) -> None:
    spec = {"clusterIP": address, "selector": {"app": "server"}, "ports": [{"port": 8000}]}
    assert ("service-links" in rules([server(), kube.thing("Service", "vllm", spec)])) == found


def service(target: object, **more: Any) -> dict[str, Any]:
    """Return a Service of `server`. `more`: of its spec."""
    spec = {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": target}], **more}
    return kube.thing("Service", "front", spec)


def test_names_of_ports_are_those_of_any_container_of_the_pods() -> None:
    item = server(ports=[{"containerPort": 8000, "name": "http"}])
    sidecar = {"name": "proxy", "image": "proxy:1", "ports": [{"containerPort": 9000, "name": "metrics"}]}
    pod(item)["containers"].append(sidecar)
    assert "port-name-unknown" not in rules([item, service("metrics")])
    assert "port-name-unknown" in rules([item, service("web")])
    # The operator of Ray adds ports, and the pods of another Service are not known.
    ray = {"kind": "RayCluster", "spec": {"headGroupSpec": {"template": server()["spec"]["template"]}}}
    assert "port-name-unknown" not in rules([ray, service("serve")])
    assert "port-name-unknown" not in rules([service("http")])


@pytest.mark.parametrize(("port", "found"), [("http", False), (8000, False), ("8000", False), ("metrics", True)])
def test_the_name_of_the_port_of_a_probe_is_one_of_its_container(port: object, found: bool) -> None:
    """The kubelet looks in this container only (pkg/probe/util.go, ResolveContainerPort)."""
    item = server(ports=[{"containerPort": 8000, "name": "http"}], livenessProbe={"httpGet": {"port": port}})
    sidecar = {"name": "proxy", "image": "proxy:1", "ports": [{"containerPort": 9000, "name": "metrics"}]}
    pod(item)["containers"].append(sidecar)
    assert ("port-name-unknown" in rules([item])) == found


def test_an_activity_of_the_gpu_is_no_load() -> None:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "server"}
    metrics = [{"type": "Pods", "pods": {"metric": {"name": "DCGM_FI_PROF_GR_ENGINE_ACTIVE"}}}]
    spec = {"scaleTargetRef": target, "maxReplicas": 3, "metrics": metrics}
    hpa = kube.thing("HorizontalPodAutoscaler", "server", spec)
    assert "scale-on-gpu-utilization" in rules([server(), hpa])


def test_a_monitor_without_the_port_of_any_service_is_found() -> None:
    objects = parsed("nim.yaml")
    objects[-1]["spec"]["endpoints"].append({"port": "metrics"})
    found = [each for each in lint.lint([Located(each) for each in objects]) if each.rule == "monitor-port"]
    assert [each.field for each in found] == ["spec.endpoints.2.port"]
    assert found[0].what == "its Services have no port named 'metrics', but http-openai, first"
