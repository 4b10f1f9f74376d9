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
        volume = _volume(cluster, name, pod.namespace)
        if volume is None:
            continue
        required = fields.get(volume, "spec", "nodeAffinity", "required")
        if required is not None and not selectors.node_selector_matches(required, node.name, node.labels):
            yield "VolumeBinding", f"the volume of claim {name} cannot be attached here (node affinity)"
        later.append((name, volume))
    for name, volume in later:
        if text := _other_zone(volume, node):
            yield "VolumeZone", f"the volume of claim {name} is in {text}"


def unknown(cluster: ClusterState, pod: Pod) -> list[str]:
    """Return the claims of `pod` without a volume in the given files, so that nothing is known about their zone."""
    return [name for name in pod.claims if _volume(cluster, name, pod.namespace) is None]


def _volume(cluster: ClusterState, claim: str, namespace: str) -> Mapping[str, Any] | None:
    """Return the volume that a claim is bound to; None without one in the given files."""
    found = _find(cluster, "PersistentVolumeClaim", claim, namespace)
    return _find(cluster, "PersistentVolume", fields.text(found, "spec", "volumeName"))


def _find(cluster: ClusterState, kind: str, name: str, namespace: str | None = None) -> Mapping[str, Any] | None:
    for each in cluster.of_kind(kind):
        found = fields.text(each, "metadata", "name")
        if name and found == name and namespace in (None, fields.namespace_of(each)):
            return each
    return None


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
