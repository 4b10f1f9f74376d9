"""Rules on versions: fields that a version of Kubernetes has not switched on."""

from __future__ import annotations

from collections.abc import Iterator

from inferctl.manifests import versions
from inferctl.manifests.kubernetes.fields import get, integer
from inferctl.manifests.lint.finding import Hit, rule
from inferctl.manifests.lint.manifests import Manifests
from inferctl.manifests.manifests_file import FieldPath, Located


@rule(
    "field-needs-version",
    "error",
    "versions",
    finds="a field whose feature gate is off in the version of Kubernetes",
    consequence="schemas accept it; the API server drops the field or refuses the object",
    fix="use the alternative, or a newer version of Kubernetes",
)
def _fields(manifests: Manifests) -> Iterator[Hit]:
    for each, path, feature in _used(manifests):
        known = versions.FEATURES[feature]
        if not known.works(manifests.minor):
            what = f"{known.field} works by default from 1.{known.since} on, and this is 1.{manifests.minor}"
            yield Hit(each, path, what, fix=f"before 1.{known.since} use {known.instead}")


def _used(manifests: Manifests) -> Iterator[tuple[Located, FieldPath, str]]:
    """Yield each use of a field in the table, with its key there."""
    for workload in manifests.workloads:
        for path, _ in workload.image_volumes:
            yield workload.object, path, "image-volume"
        for container in workload.all_containers:
            if get(container.data, "resizePolicy"):
                yield workload.object, (*container.path, "resizePolicy"), "in-place-resize"
    for each in manifests.of("HorizontalPodAutoscaler"):
        if integer(each.data, "spec", "minReplicas") == 0:
            yield each, ("spec", "minReplicas"), "hpa-scale-to-zero"
        for direction in ("scaleUp", "scaleDown"):
            if get(each.data, "spec", "behavior", direction, "tolerance") is not None:
                yield each, ("spec", "behavior", direction, "tolerance"), "hpa-tolerance"
    for each in manifests.of("Service"):
        if get(each.data, "spec", "trafficDistribution") in ("PreferSameZone", "PreferSameNode"):
            yield each, ("spec", "trafficDistribution"), "prefer-same-zone"
