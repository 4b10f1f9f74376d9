"""Reads `clusters.yaml`, the file of the platform team: where models run, and what each cluster can do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from inferctl.config.deploy_spec import DnsLabel, Replicas, Url
from inferctl.config.spec_types import OneLine, Section
from inferctl.core import document, validation
from inferctl.core.errors import SpecError, UsageError, did_you_mean
from inferctl.facts.catalog import hardware_profiles
from inferctl.manifests import versions

Autoscaler = Literal["cluster-autoscaler", "karpenter", "gke", "eks-auto", "none"]
Cloud = Literal["aws", "gcp", "azure", "on-premises"]
# What the API server accepts as the key and the value of a label.
_LABEL_NAME = r"[A-Za-z0-9](?:[\w.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL_NAME}", re.ASCII)
_LABEL_VALUE = re.compile(rf"(?:{_LABEL_NAME})?", re.ASCII)
_EXAMPLE = "docs/deploy.md describes the clusters file"


class Cluster(Section):
    """One Kubernetes cluster: cloud, region, zones, version, autoscaler and limits."""

    name: DnsLabel = Field(description="Name of the cluster and of its overlay.")
    cloud: Cloud = Field("on-premises", description="`aws`, `gcp`, `azure` or `on-premises`.")
    region: OneLine | None = Field(None, description="Region of the cloud.")
    zones: list[OneLine] = Field(default_factory=list, description="Zones with GPU nodes.")
    kubernetes: str = Field("1.35", description="Version of Kubernetes, `1.32` to `1.37`. `v1.35.2` is 1.35.")
    autoscaler: Autoscaler = Field(
        "none",
        description="Autoscaler of the nodes: `cluster-autoscaler`, `karpenter`, `gke` (on gcp), `eks-auto` (on aws), "
        "or `none`.",
    )
    capacity_buffers: bool = Field(
        False,
        description="Whether CapacityBuffers are switched on in the autoscaler, where they are off by default. If not, "
        "placeholder pods keep nodes.",
    )
    mig_strategy: Literal["mixed", "single"] = Field(
        "mixed",
        description="MIG strategy of the device plugin. `mixed`: a slice is `nvidia.com/mig-3g.20gb`. `single`: it is "
        "`nvidia.com/gpu`.",
    )
    gpu_labels: Literal["nvidia", "gke"] | None = Field(
        None,
        description="Labels of GPU nodes: `nvidia` (GPU feature discovery of the GPU Operator) or `gke`. "
        "Default: gke on gcp, else nvidia.",
    )
    share: float | None = Field(
        None, ge=0, le=1, description="Share of the traffic. Default: an equal part of what the others leave."
    )
    max_replicas: dict[str, Replicas] = Field(
        default_factory=dict,
        description="Most replicas by hardware (your own: the name of its file) that this cluster can have, for all "
        "models together.",
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Labels that nodes must have as well.")
    prometheus: Url | None = Field(
        None, description="URL of Prometheus in this cluster. Default: `prometheus`, else `deploy.prometheus`."
    )

    @property
    def minor(self) -> int:
        """The minor version of Kubernetes: 35 for 1.35."""
        return int(self.kubernetes.partition(".")[2])

    @property
    def node_labels(self) -> Literal["nvidia", "gke"]:
        """Who labels the GPU nodes."""
        return self.gpu_labels or ("gke" if self.cloud == "gcp" else "nvidia")

    @property
    def buffer_version(self) -> str | None:
        """The API version of CapacityBuffer that the autoscaler of this cluster serves; None if it has none.

        Cluster Autoscaler has v1alpha1 alone in 1.34 and v1beta1 from 1.35; Karpenter has v1beta1 only, and GKE has
        active buffers from 1.35. EKS Auto Mode has none.
        """
        if not self.capacity_buffers or self.autoscaler in ("eks-auto", "none"):
            return None
        if self.autoscaler == "karpenter" or self.minor >= 35:
            return "autoscaling.x-k8s.io/v1beta1"
        if self.autoscaler == "cluster-autoscaler" and self.minor == 34:
            return "autoscaling.x-k8s.io/v1alpha1"
        return None

    @property
    def warnings(self) -> list[str]:
        """What in this file has no effect."""
        found = []
        if self.autoscaler == "karpenter" and self.cloud not in ("aws", "azure"):
            found.append(f"cluster {self.name}: no NodePools are written for Karpenter on {self.cloud}: write your own")
        if self.capacity_buffers and self.buffer_version is None:
            found.append(
                f"cluster {self.name}: the autoscaler {self.autoscaler} has no CapacityBuffer in Kubernetes "
                f"{self.kubernetes}, so placeholder pods are written: remove capacity_buffers"
            )
        return found

    @field_validator("kubernetes", mode="before")
    @classmethod
    def _tested_version(cls, version: Any) -> str:
        try:
            return versions.tested(str(version))
        except UsageError as error:
            quotes = ", in quotes: 1.30 is the number 1.3" if isinstance(version, float) else ""
            raise ValueError(f"kubernetes: {error.message}: {error.hint}{quotes}") from None

    @model_validator(mode="after")
    def _autoscaler_of_the_cloud(self) -> Self:
        for autoscaler, cloud in (("gke", "gcp"), ("eks-auto", "aws")):
            if self.autoscaler == autoscaler and self.cloud != cloud:
                raise ValueError(f"the cluster {self.name} has autoscaler: {autoscaler}, which needs cloud: {cloud}")
        return self

    @field_validator("zones")
    @classmethod
    def _valid_zones(cls, zones: list[str]) -> list[str]:
        if wrong := next((zone for zone in zones if not _LABEL_VALUE.fullmatch(zone)), None):
            raise ValueError(f"zones: {wrong!r} is not the value of a label of Kubernetes")
        return list(dict.fromkeys(zones))

    @field_validator("labels")
    @classmethod
    def _valid_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for key, value in labels.items():
            if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
                raise ValueError(f"labels: {key!r}: {value!r} is not a label of Kubernetes")
        return labels

    @field_validator("max_replicas")
    @classmethod
    def _known_hardware(cls, limits: dict[str, int]) -> dict[str, int]:
        """Return the limits by the key of the hardware, which is the name of its file for hardware of your own."""
        found: dict[str, int] = {}
        for name, limit in limits.items():
            own = name.endswith((".yaml", ".yml"))
            key = Path(name).stem if own else name
            if not own and key not in hardware_profiles():
                close = did_you_mean(key, hardware_profiles()) or "`inferctl catalog hardware` lists all"
                raise ValueError(f"max_replicas: hardware {key!r} not found; {close}")
            if key in found:
                raise ValueError(f"max_replicas has the hardware {key} twice")
            found[key] = limit
        return found


class Clusters(Section):
    """The clusters file."""

    prometheus: Url | None = Field(None, description="URL of Prometheus, for clusters without their own.")
    clusters: list[Cluster] = Field(min_length=1, max_length=100, description="The clusters.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [cluster.name for cluster in self.clusters]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the cluster {twice} is listed twice")
        given = [cluster.share for cluster in self.clusters if cluster.share is not None]
        total, complete = sum(given), len(given) == len(self.clusters)
        if total > 1 + 1e-9 or (complete and abs(total - 1) > 1e-9):
            raise ValueError(f"the shares of the clusters add up to {total:g}, not to 1")
        return self

    def resolved(self) -> tuple[Cluster, ...]:
        """Return the clusters with their shares and the URL of Prometheus filled in."""
        missing = [cluster for cluster in self.clusters if cluster.share is None]
        rest = 1 - sum(cluster.share or 0 for cluster in self.clusters)
        equal = rest / len(missing) if missing else 0.0
        return tuple(
            cluster.model_copy(
                update={
                    "share": equal if cluster.share is None else cluster.share,
                    "prometheus": cluster.prometheus or self.prometheus,
                }
            )
            for cluster in self.clusters
        )


def read(path: Path) -> tuple[Cluster, ...]:
    """Read the clusters file. Raises `UsageError` if it cannot be read, `SpecError` with all errors and their lines."""
    found = document.read(path, _EXAMPLE)
    try:
        return Clusters.model_validate(found.data).resolved()
    except ValidationError as error:
        raise SpecError(str(path), validation.problems(error, found, _keys_at, _EXAMPLE), _EXAMPLE) from None


def default() -> tuple[Cluster, ...]:
    """Return the one cluster that is assumed without a clusters file."""
    return Clusters(clusters=[Cluster(name="default")]).resolved()  # type: ignore[call-arg]


def _keys_at(location: Sequence[str | int]) -> list[str]:
    return list((Cluster if location else Clusters).model_fields)
