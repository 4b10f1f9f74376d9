"""Filters of volumes: claims that are bound to a volume of one zone or node, as far as the given files have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inferctl.deploy.preview import fields, selectors
from inferctl.deploy.preview.cluster import REGION, ZONE, Cluster, Node, Pod

_OLD = {"failure-domain.beta.kubernetes.io/zone": ZONE, "failure-domain.beta.kubernetes.io/region": REGION}


def problems(cluster: Cluster, pod: Pod, node: Node) -> Iterator[tuple[str, str]]:
    """Yield why the volumes of `pod` cannot be used on `node`: the scheduler's name of the filter, and the reason."""
    later = []
    for name in pod.claims:
        claim = _find(cluster, "PersistentVolumeClaim", name, pod.namespace)
        if claim is None:
            continue
        volume = _find(cluster, "PersistentVolume", fields.text(claim, "spec", "volumeName"))
        if volume is None:
            if not fields.text(claim, "spec", "volumeName") and _immediate(cluster, claim):
                yield "VolumeBinding", f"claim {name} is not bound, and its class binds at once"
            continue
        required = fields.get(volume, "spec", "nodeAffinity", "required")
        if required is not None and not selectors.node_selector_matches(required, node.name, node.labels):
            yield "VolumeBinding", f"the volume of claim {name} cannot be attached here (node affinity)"
        later.append((name, volume))
    for name, volume in later:
        if text := _other_zone(volume, node):
            yield "VolumeZone", f"the volume of claim {name} is in {text}"


def unknown(cluster: Cluster, pod: Pod) -> list[str]:
    """Return the claims of `pod` that are not in the given files, so that nothing is known about their zone."""
    return [name for name in pod.claims if _find(cluster, "PersistentVolumeClaim", name, pod.namespace) is None]


def _find(cluster: Cluster, kind: str, name: str, namespace: str | None = None) -> Mapping[str, Any] | None:
    for each in cluster.of_kind(kind):
        found = fields.text(each, "metadata", "name")
        if name and found == name and namespace in (None, fields.text(each, "metadata", "namespace") or "default"):
            return each
    return None


def _immediate(cluster: Cluster, claim: Mapping[str, Any]) -> bool:
    storage_class = _find(cluster, "StorageClass", fields.text(claim, "spec", "storageClassName"))
    mode = fields.text(storage_class, "volumeBindingMode") if storage_class else "WaitForFirstConsumer"
    return (mode or "Immediate") == "Immediate"


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
