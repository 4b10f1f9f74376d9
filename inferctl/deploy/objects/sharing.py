"""How a pod gets its GPU, a part of one, or a device that DRA selects, and on which nodes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from inferctl.deploy.figure import Noted
from inferctl.deploy.objects.metadata import Object, labels_of, metadata
from inferctl.deploy.plan import FlavorPlan, GpuResource, ModelPlan

_CLAIM = "gpu"
_DRIVER = "gpu.nvidia.com"
# The most alternatives that the API server accepts in one request.
_MOST_DEVICES = 8


def limits(resource: GpuResource | None) -> dict[str, Any]:
    """Return the extended resource of a container. Requests and limits of these must be equal."""
    return {resource.name: resource.count} if resource else {}


def placement(flavor: FlavorPlan, resource: GpuResource | None) -> Object:
    """Return the fields of a pod spec that send it to the nodes of its hardware: affinity and tolerations.

    With DRA, the device class selects the device, and so the node: only labels of the cluster are left.
    """
    if resource is None:
        return {"affinity": node_affinity(flavor.node_labels)} if flavor.node_labels else {}
    found: Object = {}
    if resource.labels:
        found["affinity"] = node_affinity(resource.labels)
    found["tolerations"] = [{"key": resource.toleration, "operator": "Exists", "effect": "NoSchedule"}]
    return found


def node_affinity(labels: Mapping[str, Sequence[str]]) -> Object:
    """Return a required affinity to nodes that have one of the values of each label, or not a label without values."""
    terms: list[Object] = [
        {"key": key, "operator": "In", "values": list(values)} if values else {"key": key, "operator": "DoesNotExist"}
        for key, values in labels.items()
    ]
    required = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}


def claims(model: ModelPlan, flavor: FlavorPlan) -> tuple[Object, Object]:
    """Return the fields of a pod spec and of a container's resources that claim a device with DRA."""
    if flavor.sharing != "dra":
        return {}, {}
    template = {"name": _CLAIM, "resourceClaimTemplateName": _template_name(flavor, _requests(model, flavor))}
    return {"resourceClaims": [template]}, {"claims": [{"name": _CLAIM}]}


def claim_template(model: ModelPlan, flavor: FlavorPlan, namespace: str) -> Object:
    """Return the template of the claim of each pod: the device of its flavor, else the next one that runs its image.

    The alternatives are the later flavors with DRA that have the same image and precision.
    """
    requests = _requests(model, flavor)
    labels = labels_of(model.name, "server", flavor.label)
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": metadata(_template_name(flavor, requests), namespace, labels),
        "spec": {"metadata": {"labels": labels}, "spec": {"devices": {"requests": requests}}},
    }


def _template_name(flavor: FlavorPlan, requests: Sequence[Object]) -> str:
    """Return a name with a hash of the content: a template cannot be changed, so other requests need another one."""
    digest = hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()
    return f"{flavor.name}-{digest[:8]}"


def _requests(model: ModelPlan, flavor: FlavorPlan) -> list[Object]:
    """Return the requests of a claim: one device, or the first available one of several."""
    place = [each.name for each in model.flavors].index(flavor.name)
    later = model.flavors[place + 1 :]
    same = [
        each for each in later if (each.sharing, each.image, each.precision) == ("dra", flavor.image, flavor.precision)
    ]
    same = same[: _MOST_DEVICES - 1]
    devices = [_device(each) for each in (flavor, *same)]
    if len(devices) == 1:
        request: Object = {"name": _CLAIM, "exactly": devices[0]}
    else:
        names = (each.label for each in (flavor, *same))
        request = {
            "name": _CLAIM,
            "firstAvailable": [{"name": name, **device} for name, device in zip(names, devices, strict=True)],
        }
    return [request]


def _device(flavor: FlavorPlan) -> Object:
    part = flavor.hardware
    products = sorted({name.partition(" MIG ")[0] for name in part.device_names})
    listed = ", ".join(f"'{product}'" for product in products)
    expressions = [f"device.attributes['{_DRIVER}'].productName in [{listed}]"]
    if part.mig:
        expressions.append(f"device.attributes['{_DRIVER}'].profile == '{part.mig.profile}'")
    count = flavor.resource.count if flavor.resource else 1
    return {
        "deviceClassName": "mig.nvidia.com" if part.mig else _DRIVER,
        "selectors": [{"cel": {"expression": " && ".join(expressions)}}],
        **({"count": count} if count > 1 else {}),
    }


def device_plugin_configs(flavors: Sequence[FlavorPlan]) -> dict[str, Object]:
    """Return the configurations of NVIDIA's device plugin for shared GPUs by name, such as `time-slicing-4`.

    A node has one of them. With `renameByDefault`, a shared GPU is another resource (`nvidia.com/gpu.shared`), so that
    no pod gets a part of a GPU by mistake. With `failRequestsGreaterThanOne`, a request for two parts fails instead of
    getting one.
    """
    found: dict[str, Object] = {}
    for kind, key in (("time-slicing", "timeSlicing"), ("mps", "mps")):
        shared = [flavor for flavor in flavors if flavor.sharing == kind]
        for parts in sorted({flavor.shared_by for flavor in shared}):
            names = ", ".join(flavor.name for flavor in shared if flavor.shared_by == parts)
            resource = {"name": "nvidia.com/gpu", "replicas": Noted(parts, f"deploy.flavors[].shared_by of {names}")}
            sharing = {"renameByDefault": True, "failRequestsGreaterThanOne": True, "resources": [resource]}
            found[f"{kind}-{parts}"] = {"version": "v1", "sharing": {key: sharing}}
    return found
