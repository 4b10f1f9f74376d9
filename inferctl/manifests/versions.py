"""The fields of manifests that only work from some version of Kubernetes on. Schemas do not know this.

A field whose feature gate is off passes every schema, and the API server drops it or refuses the object. The states are
those of `pkg/features/kube_features.go` in Kubernetes 1.36 and 1.37.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from inferctl.core.errors import UsageError

# The versions that manifests are written for and tested against.
TESTED = tuple(range(32, 38))
# The oldest version that has releases with security fixes in November 2026: each gets them for 14 months.
OLDEST_SUPPORTED = 35

State = Literal["absent", "off", "on", "stable"]


@dataclass(frozen=True)
class Feature:
    """A field and its state by minor version. `instead`: what to use in older versions.

    `on` means switched on by default. A cluster can switch on what is `off`, but managed clusters cannot.
    """

    field: str
    states: Mapping[int, State]
    instead: str

    @property
    def since(self) -> int:
        """First minor version in which the field works by default."""
        return min(minor for minor, state in self.states.items() if state in ("on", "stable"))

    def works(self, minor: int) -> bool:
        """Return whether the field works by default in 1.`minor`, also for versions after the table."""
        return minor >= self.since


def _states(*states: State) -> dict[int, State]:
    return dict(zip(TESTED, states, strict=True))


FEATURES: Mapping[str, Feature] = {
    "image-volume": Feature(
        "volumes[].image",
        _states("off", "off", "off", "on", "stable", "stable"),
        "a PersistentVolumeClaim, or an init container that copies the weights",
    ),
    "dra": Feature(
        "resource.k8s.io/v1",
        _states("absent", "absent", "stable", "stable", "stable", "stable"),
        "the device plugin (resources.limits) instead of resource claims",
    ),
    "dra-first-available": Feature(
        "ResourceClaim firstAvailable",
        _states("absent", "off", "on", "on", "stable", "stable"),
        "`exactly` with one device class, and one Deployment per kind of GPU",
    ),
    "dra-extended-resource": Feature(
        "DeviceClass extendedResourceName",
        _states("absent", "absent", "off", "off", "on", "stable"),
        "the device plugin, or resource claims",
    ),
    "dra-device-taints": Feature(
        "DeviceTaintRule",
        _states("absent", "absent", "off", "off", "off", "stable"),
        "taints of the node",
    ),
    "hpa-tolerance": Feature(
        "HorizontalPodAutoscaler behavior.*.tolerance",
        _states("absent", "off", "off", "on", "on", "on"),
        "stabilizationWindowSeconds",
    ),
    "hpa-scale-to-zero": Feature(
        "HorizontalPodAutoscaler minReplicas: 0",
        _states("off", "off", "off", "off", "off", "on"),
        "a KEDA ScaledObject with minReplicaCount: 0, or minReplicas: 1",
    ),
    "prefer-same-zone": Feature(
        "Service trafficDistribution: PreferSameZone",
        _states("off", "off", "on", "stable", "stable", "stable"),
        "trafficDistribution: PreferClose",
    ),
    "pre-stop-sleep": Feature(
        "lifecycle.preStop.sleep",
        _states("on", "on", "stable", "stable", "stable", "stable"),
        "preStop.exec with `sleep`",
    ),
    "in-place-resize": Feature(
        "containers[].resizePolicy",
        _states("off", "on", "on", "stable", "stable", "stable"),
        "a rollout with new resources",
    ),
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


def works(feature: str, version: str) -> bool:
    """Return whether a field of `FEATURES` works by default in a version such as `1.35`. Raises `UsageError`."""
    return FEATURES[feature].works(minor_of(version))
