"""What the containers of all pods share: security contexts for the level `restricted`, spread, and empty volumes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from inferctl.deploy.objects.metadata import Object
from inferctl.manifests.kubernetes.fields import quantity

# User and group of the images that inferctl builds.
USER = 10001


def pod_security() -> Object:
    """Return the security context of a pod: the user of the image, without privileges."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",  # changing the group of all weights would take minutes
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def pod_base(account: str, grace_s: object = None) -> Object:
    """Return what the specs of all pods have: an account without a token, a grace period, no privileges."""
    return {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **({} if grace_s is None else {"terminationGracePeriodSeconds": grace_s}),
        "securityContext": pod_security(),
    }


def spread(labels: Mapping[str, str]) -> Object:
    """Return the spread over zones. It is soft: when GPUs run out in one zone, the others must serve.

    Each revision is spread on its own. Otherwise, pods of the old version count during a rollout, and the new ones end
    up uneven.
    """
    constraint = {
        "maxSkew": 1,
        "topologyKey": "topology.kubernetes.io/zone",
        "whenUnsatisfiable": "ScheduleAnyway",
        "nodeTaintsPolicy": "Honor",
        "matchLabelKeys": ["pod-template-hash"],
        "labelSelector": {"matchLabels": dict(labels)},
    }
    return {"topologySpreadConstraints": [constraint]}


def container_security() -> Object:
    """Return the security context of a container: no capabilities, and a root file system that is read-only."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def resources(cpu: object, memory: object) -> Object:
    """Return equal requests and limits, so that a container is not throttled by neighbors and is evicted last."""
    found = {"cpu": cpu, "memory": memory}
    return {"requests": found, "limits": dict(found)}


def reserve_disk(pod: Object) -> Object:
    """Return `pod` with a request for its empty volumes on the disk of the node, by its first container.

    Without it, the scheduler puts pods on nodes whose disk is full, where they are evicted. There is no limit, because
    it would count logs too.
    """
    volumes = [each["emptyDir"] for each in pod["volumes"] if "emptyDir" in each]
    if total := sum(quantity(each["sizeLimit"]) for each in volumes if "medium" not in each):
        pod["containers"][0]["resources"]["requests"]["ephemeral-storage"] = f"{math.ceil(total / 1024**2)}Mi"
    return pod


def empty(name: str, path: str, limit: str, medium: str | None = None) -> tuple[Object, Object]:
    """Return an empty volume with a size limit, and its mount. Above the limit, the pod is evicted."""
    content = {"sizeLimit": limit} | ({"medium": medium} if medium else {})
    return {"name": name, "emptyDir": content}, {"name": name, "mountPath": path}
