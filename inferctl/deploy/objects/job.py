"""What the Jobs of a model share: its container without keys and metering, on the nodes of its flavor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.config.settings import OPEN_ACCESS
from inferctl.deploy.endpoints import Endpoint
from inferctl.deploy.objects import access, metering, workload
from inferctl.deploy.objects.containers import pod_base, reserve_disk
from inferctl.deploy.objects.metadata import Object, labels_of, metadata
from inferctl.deploy.objects.policy import egress_policy, service_account
from inferctl.deploy.plan import FlavorPlan, ModelPlan
from inferctl.models.weights_folders import downloads

_KEPT_S = 86_400


def shared(model: ModelPlan, component: str, namespace: str) -> list[Object]:
    """Return the account and the network policy of the Jobs of `model`: they only connect to the hub, to download."""
    name, egress = f"{model.name}-{component}", [Endpoint(443, None)] if downloads(model.spec) else []
    policy = egress_policy(name, namespace, labels_of(model.name, component), egress)
    return [service_account(name, namespace), policy]


def job(
    model: ModelPlan,
    flavor: FlavorPlan,
    component: str,
    namespace: str,
    settings: Mapping[str, Any],
    pod: Mapping[str, Any],
    volumes: Sequence[Object],
) -> Object:
    """Return a Job. `settings`, `pod`: what its spec and its pod spec have of their own. `volumes`: its own ones."""
    labels, server = labels_of(model.name, component, flavor.label), workload.pod(model, flavor)
    affinity = {key: value for key, value in server["affinity"].items() if key == "nodeAffinity"}
    spec = {
        "restartPolicy": "Never",
        **pod_base(f"{model.name}-{component}"),
        **({"affinity": affinity} if affinity else {}),
        **({"tolerations": server["tolerations"]} if "tolerations" in server else {}),
        **pod,
        "volumes": [*(each for each in server["volumes"] if each["name"] not in _left_out(model)), *volumes],
    }
    template = {"metadata": {"labels": labels}, "spec": reserve_disk(spec)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(f"{component}-{flavor.name}", namespace, labels),
        "spec": {**settings, "ttlSecondsAfterFinished": _KEPT_S, "template": template},
    }


def container(model: ModelPlan, flavor: FlavorPlan) -> Object:
    """Return the server container of `flavor`. It asks for no keys, and records no usage events."""
    found = workload.container(model, flavor)
    open_access = {**OPEN_ACCESS, **({"INFERCTL_METERING_MODE": "off"} if metering.volumes(model.spec) else {})}
    env = [each for each in found["env"] if not each["name"].startswith(("INFERCTL_ACCESS_", "INFERCTL_METERING_"))]
    env += [{"name": name, "value": value} for name, value in sorted(open_access.items())]
    mounts = [mount for mount in found["volumeMounts"] if mount["name"] not in _left_out(model)]
    return {**found, "env": env, "volumeMounts": mounts}


def _left_out(model: ModelPlan) -> set[str]:
    return {volume["name"] for volume, _ in (*access.volumes(model.spec), *metering.volumes(model.spec))}
