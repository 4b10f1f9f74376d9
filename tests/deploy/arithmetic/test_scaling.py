"""Autoscalers and spare capacity: what each cluster gets."""

from __future__ import annotations

import json
from typing import Any

from inferctl.deploy import manifest
from inferctl.deploy.objects import scaling, workload
from inferctl.deploy.plan import DeploymentPlan
from tests.deploy.arithmetic.sources import HALF, IMAGE, plan, spec


def planned(flavors: list[dict[str, Any]] | None = None, **deploy: Any) -> DeploymentPlan:
    """Return a plan of half an A100, then L4, in one cluster."""
    listed = flavors or [
        {"hardware": HALF, "name": "half", "tokens_per_second": 100_000, "image": IMAGE},
        {"hardware": "l4", "tokens_per_second": 40_000, "image": IMAGE},
    ]
    section = {
        "flavors": listed,
        "traffic": {"base_rps": 400, "peak_rps": 2000, "tokens_per_request": 250},
        **deploy,
    }
    cluster = {"name": "one", "prometheus": "http://prometheus.monitoring:9090"}
    return plan(spec(section, slo={"p99_ms": 100}), clusters=[cluster])


def scalers(found: DeploymentPlan) -> list[dict[str, Any]]:
    (model,) = found.models
    objects = scaling.scaled_objects(model, found.clusters[0], found.namespace)
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


def test_placeholders_take_the_place_of_a_server_and_give_way() -> None:
    found = planned()
    (placeholder,) = spare(found)
    (model,) = found.models
    server = manifest.plain(workload.deployment(model, model.flavors[0], found.namespace))["spec"]["template"]["spec"]
    pod = placeholder["spec"]["template"]["spec"]
    # (500,000 - 100,000) / 60 x 60 s = 400,000 tokens/s more within a cold start: 4 replicas; 6 can be added.
    assert placeholder["spec"]["replicas"] == 4
    assert spare(found, flavor=1) == []
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
