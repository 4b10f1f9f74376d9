"""The fields of manifests that only work from some version of Kubernetes on. Schemas do not know this.

A field whose feature gate is off passes every schema, and the API server drops it or refuses the object. The versions
are those of `pkg/features/kube_features.go` in Kubernetes 1.36 and 1.37.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from inferctl.core.errors import UsageError

# The versions that manifests are written for and tested against.
TESTED = tuple(range(32, 38))
# The oldest version that has releases with security fixes in November 2026: each gets them for 14 months.
OLDEST_SUPPORTED = 35


@dataclass(frozen=True)
class Feature:
    """A field, and the first 1.`since` in which it works by default. `instead`: what to use in older versions.

    A cluster can switch on what is off in an older version, but managed clusters cannot.
    """

    field: str
    since: int
    instead: str

    def works(self, minor: int) -> bool:
        """Return whether the field works by default in 1.`minor`, also for versions after the table."""
        return minor >= self.since


FEATURES: Mapping[str, Feature] = {
    "image-volume": Feature(
        "volumes[].image", 35, "a PersistentVolumeClaim, or an init container that copies the weights"
    ),
    "hpa-tolerance": Feature("HorizontalPodAutoscaler behavior.*.tolerance", 35, "stabilizationWindowSeconds"),
    "hpa-scale-to-zero": Feature(
        "HorizontalPodAutoscaler minReplicas: 0", 37, "a KEDA ScaledObject with minReplicaCount: 0, or minReplicas: 1"
    ),
    "prefer-same-zone": Feature("Service trafficDistribution: PreferSameZone", 34, "trafficDistribution: PreferClose"),
    "in-place-resize": Feature("containers[].resizePolicy", 33, "a rollout with new resources"),
}


def minor_of(version: str) -> int:
    """Return the minor version of `1.35`, `v1.35.2` or `1.35.2-gke.1842000`. Raises `UsageError`."""
    found = re.match(r"v?1\.(\d{1,3})(?:[.+-].*)?$", version)
    if not found:
        raise UsageError(f"{version!r} is not a version of Kubernetes", "write it as in `1.35`")
    return int(found[1])


def tested(version: str) -> str:
    """Return a version such as `v1.35.2` as `1.35`. Raises `UsageError` if manifests are not tested against it."""
    minor = minor_of(version)
    if minor not in TESTED:
        raise UsageError(
            f"{version!r} is not supported", f"use a version from 1.{TESTED[0]} to 1.{TESTED[-1]}, such as `1.35`"
        )
    return f"1.{minor}"
