"""Rules on where pods land: selectors, volumes, anti-affinity, zones."""

from __future__ import annotations

from collections.abc import Iterator

from inferctl.manifests.kubernetes import selectors
from inferctl.manifests.kubernetes.fields import get, integer, sequence, text
from inferctl.manifests.kubernetes.labels import HOSTNAME, ZONE
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import Manifests, ManifestWorkload, same_namespace
from inferctl.manifests.manifests_file import FieldPath

_TERM = "requiredDuringSchedulingIgnoredDuringExecution"


@rule(
    "volume-of-one-node",
    "warning",
    "placement",
    finds="several pods of one workload, also in a rollout, that mount one claim with only ReadWriteOnce or "
    "ReadWriteOncePod",
    consequence="pods on other nodes wait forever for the volume; with ReadWriteOncePod, each pod but the first waits",
    fix="use a claim with ReadOnlyMany or ReadWriteMany, an image volume, a claim for each pod (volumeClaimTemplates), "
    "or for one replica the strategy Recreate",
)
def _one_node(manifests: Manifests) -> Iterator[Hit]:
    claims = manifests.of("PersistentVolumeClaim")
    for workload in manifests.workloads:
        most = manifests.replicas(workload)[1] + manifests.surge(workload)
        for index, volume in enumerate(sequence(workload.spec, "volumes") if most > 1 else ()):
            name = text(volume, "persistentVolumeClaim", "claimName")
            claim = next((each for each in claims if each.name == name and same_namespace(each, workload.object)), None)
            modes = {str(mode) for mode in sequence(claim.data, "spec", "accessModes")} if claim else set()
            if modes and modes <= {"ReadWriteOnce", "ReadWriteOncePod"}:
                path = (*workload.spec_path, "volumes", index, "persistentVolumeClaim")
                what = f"up to {most} pods mount the claim {name} with {' and '.join(sorted(modes))}"
                yield Hit(workload.object, path, what, level="error" if modes == {"ReadWriteOncePod"} else None)


@rule(
    "hostname-anti-affinity",
    "warning",
    "placement",
    finds="required anti-affinity between replicas on one host that keeps shares of a GPU from being used",
    consequence="each replica needs its own node: the other slices of its GPU stay empty",
    fix="use preferredDuringSchedulingIgnoredDuringExecution, or topologySpreadConstraints",
)
def _anti_affinity(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        for index, term in enumerate(sequence(workload.spec, "affinity", "podAntiAffinity", _TERM)):
            selector = get(term, "labelSelector")
            if get(term, "topologyKey") != HOSTNAME or not selectors.matches(selector, workload.labels):
                continue
            if manifests.replicas(workload)[1] > 1 and (share := _share_of(workload)):
                path = (*workload.spec_path, "affinity", "podAntiAffinity", _TERM, index)
                yield Hit(workload.object, path, f"two replicas cannot use two shares of a GPU ({share})")


def _share_of(workload: ManifestWorkload) -> str | None:
    """Return what says that a workload has a share of a GPU; None if it has whole ones."""
    for name in workload.gpus:
        if "/mig-" in name or name.endswith(".shared"):
            return name
    products = workload.node_labels.get("nvidia.com/gpu.product", set())
    return next((value for value in sorted(products) if "-MIG-" in value or value.endswith("-SHARED")), None)


@rule(
    "one-zone",
    "note",
    "regions",
    finds="several replicas of a model server without topology spread over zones",
    consequence="the scheduler prefers to spread pods, but may put all of them into one zone, and it can fail",
    fix="add a topologySpreadConstraint with topologyKey: topology.kubernetes.io/zone",
)
def _one_zone(manifests: Manifests) -> Iterator[Hit]:
    for workload in manifests.model_servers:
        spread = [get(each, "topologyKey") for each in sequence(workload.spec, "topologySpreadConstraints")]
        pinned = ZONE in workload.node_labels
        if workload.object.kind in ("Deployment", "StatefulSet") and ZONE not in spread and not pinned:
            most = manifests.replicas(workload)[1]
            if most > 1:
                yield Hit(workload.object, workload.spec_path, f"up to {most} replicas, and no spread over zones")


def replicas_path(workload: ManifestWorkload) -> FieldPath:
    """Return the path of `spec.replicas`, or of `spec` if it is absent."""
    present = integer(workload.object.data, "spec", "replicas") is not None
    return ("spec", "replicas") if present else ("spec",)
