"""Filters of volumes: claims that are bound to a volume of one zone or node, as far as the given files have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inferctl.manifests.kubernetes import fields, selectors
from inferctl.manifests.kubernetes.labels import REGION, ZONE
from inferctl.manifests.preview.cluster import ClusterState, Node, Pod

_OLD = {"failure-domain.beta.kubernetes.io/zone": ZONE, "failure-domain.beta.kubernetes.io/region": REGION}


def problems(cluster: ClusterState, pod: Pod, node: Node) -> Iterator[tuple[str, str]]:
    """Yield why the volumes of `pod` cannot be used on `node`: the scheduler's name of the filter, and the reason."""
    later = []
    for name in pod.claims:
        claim = _find(cluster, "PersistentVolumeClaim", name, pod.namespace)
        if claim is None:
            continue
        volume = _find(cluster, "PersistentVolume", fields.text(claim, "spec", "volumeName"))
        if volume is None:
            if not fields.text(claim, "spec", "volumeName") and (why := _unbound(cluster, claim, node)):
                yield "VolumeBinding", f"claim {name} {why}"
            continue
        required = fields.get(volume, "spec", "nodeAffinity", "required")
        if required is not None and not selectors.node_selector_matches(required, node.name, node.labels):
            yield "VolumeBinding", f"the volume of claim {name} cannot be attached here (node affinity)"
        later.append((name, volume))
    for name, volume in later:
        if text := _other_zone(volume, node):
            yield "VolumeZone", f"the volume of claim {name} is in {text}"


def unknown(cluster: ClusterState, pod: Pod) -> list[str]:
    """Return the claims of `pod` that are not in the given files, so that nothing is known about their zone."""
    return [name for name in pod.claims if _find(cluster, "PersistentVolumeClaim", name, pod.namespace) is None]


def _find(cluster: ClusterState, kind: str, name: str, namespace: str | None = None) -> Mapping[str, Any] | None:
    for each in cluster.of_kind(kind):
        found = fields.text(each, "metadata", "name")
        if name and found == name and namespace in (None, fields.namespace_of(each)):
            return each
    return None


def _unbound(cluster: ClusterState, claim: Mapping[str, Any], node: Node) -> str | None:
    """Return why a claim that is not bound cannot be bound on `node`; None if it can, or if its class is not known."""
    storage_class = _find(cluster, "StorageClass", fields.text(claim, "spec", "storageClassName"))
    if storage_class is None:
        return None
    if (fields.text(storage_class, "volumeBindingMode") or "Immediate") == "Immediate":
        return "is not bound, and its class binds at once"
    volumes = cluster.of_kind("PersistentVolume")
    if any(_offers(volume, claim, node) for volume in volumes):
        return None
    if fields.text(storage_class, "provisioner") == "kubernetes.io/no-provisioner":
        return "finds no free volume of its class here" if volumes else None
    terms = [fields.items(each, "matchLabelExpressions") for each in fields.items(storage_class, "allowedTopologies")]
    if terms and not any(all(_in(each, node) for each in term) for term in terms):
        return "has a class that makes no volume here (allowedTopologies)"
    return None


def _in(requirement: Mapping[str, Any], node: Node) -> bool:
    return node.labels.get(fields.text(requirement, "key")) in fields.strings(requirement, "values")


def _offers(volume: Mapping[str, Any], claim: Mapping[str, Any], node: Node) -> bool:
    """Return whether a volume that no claim has is one that `claim` may get on `node`."""
    spec, wanted = fields.mapping(volume, "spec"), fields.mapping(claim, "spec")
    required = fields.get(spec, "nodeAffinity", "required")
    return (
        spec.get("claimRef") is None
        and fields.text(spec, "storageClassName") == fields.text(wanted, "storageClassName")
        and set(fields.strings(wanted, "accessModes")) <= set(fields.strings(spec, "accessModes"))
        and _bytes(spec, "capacity") >= _bytes(wanted, "resources", "requests")
        and (required is None or selectors.node_selector_matches(required, node.name, node.labels))
    )


def _bytes(value: Any, *path: str) -> int:
    return fields.amounts({"storage": fields.get(value, *path, "storage")}).get("storage", 0)


def _other_zone(volume: Mapping[str, Any], node: Node) -> str | None:
    """Return the zone or region of a volume if the node is in another one. Nodes without such labels accept it."""
    ours = {_OLD.get(key, key): value for key, value in node.labels.items()}
    if ZONE not in ours and REGION not in ours:
        return None
    for key, value in fields.text_map(fields.mapping(volume, "metadata", "labels")).items():
        where = _OLD.get(key, key)
        if where in (ZONE, REGION) and ours.get(where) not in value.split("__"):
            return value.replace("__", " and ")
    return None
