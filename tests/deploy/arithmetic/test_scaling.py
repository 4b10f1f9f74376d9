"""Autoscalers and spare capacity: what each cluster gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from deploy_sources import HALF, IMAGE, plan, spec

from inferctl.deploy import manifest
from inferctl.deploy.objects import scaling, workload
from inferctl.deploy.plan import DeploymentPlan
from tests.processes import execute


def planned(
    cluster: dict[str, Any] | None = None, flavors: list[dict[str, Any]] | None = None, **deploy: Any
) -> DeploymentPlan:
    """Return a plan of half an A100, then L4, in one cluster."""
    listed = flavors or [
        {"hardware": HALF, "name": "half", "tokens_per_second": 100_000, "image": IMAGE},
        {"hardware": "l4", "tokens_per_second": 40_000, "image": IMAGE},
    ]
    section = {
        "flavors": listed,
        "traffic": {"base_rps": 400, "peak_rps": 2000, "tokens_per_request": 250},
        "prometheus": "http://prometheus.monitoring:9090",
        **deploy,
    }
    return plan(spec(section, slo={"p99_ms": 100}), clusters=[{"name": "one", **(cluster or {})}])


def scalers(found: DeploymentPlan) -> list[dict[str, Any]]:
    (model,) = found.models
    objects = scaling.scaling(model, found.clusters[0], found.namespace)
    plain: list[dict[str, Any]] = manifest.plain(objects)
    return plain


def spare(found: DeploymentPlan, flavor: int = 0) -> list[dict[str, Any]]:
    (model,) = found.models
    each = model.flavors[flavor]
    deployment = manifest.plain(workload.deployment(model, each, found.namespace))
    plain: list[dict[str, Any]] = manifest.plain(scaling.overflow(model, each, found.clusters[0], deployment))
    return plain


def test_keda_gets_the_limits_and_never_its_harmful_defaults() -> None:
    half, l4 = scalers(planned())
    # Base 100,000 / 70,000 = 1.4 -> 2. Peak 500,000 / 70,000 = 7.1 -> 8, and 500,000 / 28,000 = 17.9 -> 18 for the L4.
    assert (half["spec"]["minReplicaCount"], half["spec"]["maxReplicaCount"]) == (2, 8)
    assert (l4["spec"]["minReplicaCount"], l4["spec"]["maxReplicaCount"]) == (0, 18)
    for each in (half, l4):
        assert each["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"
        assert [trigger["name"] for trigger in each["spec"]["triggers"]] == ["offered", "backlog", "p99"]
        for trigger in each["spec"]["triggers"]:
            assert trigger["metricType"] == "AverageValue"
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            assert trigger["metadata"]["serverAddress"] == "http://prometheus.monitoring:9090"
            # KEDA accepts only strings here.
            assert all(isinstance(value, str) for value in trigger["metadata"].values())
    assert half["spec"]["fallback"]["replicas"] == 2


def test_replicas_are_removed_only_after_a_cold_start() -> None:
    (half, _) = scalers(planned(cold_start_s=900))
    behavior = half["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 900
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert half["spec"]["cooldownPeriod"] == 900


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool not found: install prometheus")
def test_an_hpa_reads_the_recorded_series_of_the_same_queries(tmp_path: Path) -> None:
    *autoscalers, rule = scalers(planned(scaling="hpa"))
    assert [each["kind"] for each in autoscalers] == ["HorizontalPodAutoscaler"] * 2
    assert not any(each["kind"] == "ScaledObject" for each in autoscalers)
    # Before 1.37, the minimum is 1.
    assert [each["spec"]["minReplicas"] for each in autoscalers] == [2, 1]
    recorded = {
        (each["record"], each["labels"]["deployment"]) for group in rule["spec"]["groups"] for each in group["rules"]
    }
    read = {
        (metric["external"]["metric"]["name"], metric["external"]["metric"]["selector"]["matchLabels"]["deployment"])
        for each in autoscalers
        for metric in each["spec"]["metrics"]
    }
    assert recorded == read
    assert len(read) == 6
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": rule["spec"]["groups"]}))
    execute("promtool", "check", "rules", file, code=0)
    keda = {trigger["metadata"]["query"] for each in scalers(planned()) for trigger in each["spec"]["triggers"]}
    assert {each["expr"] for group in rule["spec"]["groups"] for each in group["rules"]} >= {
        query for query in keda if "kube_deployment" not in query
    }


def test_from_kubernetes_1_37_an_hpa_may_have_no_replicas() -> None:
    *autoscalers, _ = scalers(planned({"kubernetes": "1.37"}, scaling="hpa"))
    assert [each["spec"]["minReplicas"] for each in autoscalers] == [2, 0]


def test_without_a_rate_or_autoscaler_nothing_scales_a_flavor() -> None:
    assert scalers(planned(scaling="none")) == []
    flavors = [
        {"hardware": "l4", "min_replicas": 2, "max_replicas": 4, "image": IMAGE},
        {"hardware": "t4", "tokens_per_second": 10_000, "image": IMAGE},
    ]
    (t4,) = scalers(planned(flavors=flavors))
    assert t4["spec"]["scaleTargetRef"]["name"] == "embed-t4"
    # The L4 has no rate, so what it serves is not known, and is not subtracted.
    assert "embed-l4" not in json.dumps(t4["spec"]["triggers"])


def test_a_buffer_has_the_version_of_the_cluster_and_only_one_size() -> None:
    keys = {"autoscaler": "cluster-autoscaler", "capacity_buffers": True}
    (buffer,) = spare(planned(keys))
    assert (buffer["kind"], buffer["apiVersion"]) == ("CapacityBuffer", "autoscaling.x-k8s.io/v1beta1")
    # (500,000 - 100,000) / 60 x 60 s = 400,000 tokens/s more within a cold start: 4 replicas; 6 can be added.
    assert buffer["spec"] == {
        "scalableRef": {"apiGroup": "apps", "kind": "Deployment", "name": "embed-half"},
        "replicas": 4,
    }
    assert spare(planned(keys), flavor=1) == []


@pytest.mark.parametrize("autoscaler", ["karpenter", "eks-auto"])
@pytest.mark.parametrize("overflow", ["auto", 3])
def test_karpenter_keeps_whole_gpus_only(autoscaler: str, overflow: Any) -> None:
    found = planned({"cloud": "aws", "autoscaler": autoscaler}, overflow=overflow)
    assert spare(found) == []
    (warning,) = (each for each in found.models[0].warnings if "no overflow" in each)
    assert "no overflow for embed-half: Karpenter starts no nodes for sharing: mig" in warning
    whole = planned(
        {"cloud": "aws", "autoscaler": autoscaler},
        overflow=overflow,
        flavors=[{"hardware": "l4", "tokens_per_second": 40_000, "image": IMAGE}],
    )
    assert len(spare(whole)) == 1
    assert not any("no overflow" in each for each in whole.models[0].warnings)


def test_placeholders_take_the_place_of_a_server_and_give_way() -> None:
    found = planned()
    (placeholder,) = spare(found)
    (model,) = found.models
    server = manifest.plain(workload.deployment(model, model.flavors[0], found.namespace))["spec"]["template"]["spec"]
    pod = placeholder["spec"]["template"]["spec"]
    assert placeholder["spec"]["replicas"] == 4
    assert pod["priorityClassName"] == "inferctl-overflow"
    assert pod["terminationGracePeriodSeconds"] == 0
    assert pod["tolerations"] == server["tolerations"]
    assert pod["affinity"]["nodeAffinity"] == server["affinity"]["nodeAffinity"]
    assert pod["containers"][0]["resources"] == server["containers"][0]["resources"]
    # A rollout must not need more GPUs than the quota has.
    assert placeholder["spec"]["strategy"] == {"type": "Recreate"}
    assert placeholder["spec"]["selector"]["matchLabels"] == placeholder["spec"]["template"]["metadata"]["labels"]
    selector = manifest.plain(workload.deployment(model, model.flavors[0], found.namespace))["spec"]["selector"]
    assert not selector["matchLabels"].items() <= placeholder["spec"]["template"]["metadata"]["labels"].items()


def test_placeholders_are_as_large_as_a_pod_with_its_relay() -> None:
    settings = {
        "flavors": [{"hardware": "l4", "tokens_per_second": 40_000, "image": IMAGE}],
        "traffic": {"base_rps": 400, "peak_rps": 2000, "tokens_per_request": 250},
        "ledger_secret": "ledger",
        "tools_image": IMAGE,
    }
    found = plan(spec(settings, metering={"mode": "on"}))
    (placeholder,) = spare(found)
    # Server: 3 - 0.1 cores assumed, and 200 MB + 4 GiB = 4,287 MiB. Relay: 0.1 cores and 256 MiB.
    resources = placeholder["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"cpu": "3000m", "memory": "4543Mi", "nvidia.com/gpu": 1}
    # /tmp: 1,024 MiB; the outbox: 1,024 MiB and 256 MiB.
    assert resources["requests"] == {**resources["limits"], "ephemeral-storage": "2304Mi"}


@pytest.mark.parametrize("overflow", ["none", 0])
def test_the_overflow_can_be_switched_off(overflow: Any) -> None:
    assert spare(planned(overflow=overflow)) == []
