"""Reads `clusters.yaml`, the file of the platform team: where models run, and what each cluster can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from inferctl.config.deploy_spec import DnsLabel, Replicas, Url
from inferctl.config.spec_types import Section
from inferctl.core import document, validation
from inferctl.core.errors import SpecError, UsageError, did_you_mean
from inferctl.facts.catalog import hardware_profiles
from inferctl.manifests import versions

_EXAMPLE = "docs/deploy.md describes the clusters file"


class Cluster(Section):
    """One Kubernetes cluster: its version, labels, share of the traffic and limits."""

    name: DnsLabel = Field(description="Name of the cluster and of its overlay.")
    kubernetes: str = Field("1.35", description="Version of Kubernetes, `1.32` to `1.37`. `v1.35.2` is 1.35.")
    mig_strategy: Literal["mixed", "single"] = Field(
        "mixed",
        description="MIG strategy of the device plugin. `mixed`: a slice is `nvidia.com/mig-3g.20gb`. `single`: it is "
        "`nvidia.com/gpu`.",
    )
    gpu_labels: Literal["nvidia", "gke"] = Field(
        "nvidia",
        description="Labels of GPU nodes: `nvidia` (GPU feature discovery of the GPU Operator) or `gke` (node pools of "
        "GKE).",
    )
    share: float | None = Field(
        None, ge=0, le=1, description="Share of the traffic. Default: an equal part of what the others leave."
    )
    max_replicas: dict[str, Replicas] = Field(
        default_factory=dict,
        description="Most replicas by hardware (your own: the name of its file) that this cluster can have, for all "
        "models together.",
    )
    prometheus: Url | None = Field(
        None,
        description="URL of Prometheus in this cluster. Default: `prometheus` of the file, else "
        "http://prometheus-operated.monitoring:9090, the Service of the Prometheus Operator.",
    )

    @property
    def minor(self) -> int:
        """The minor version of Kubernetes: 35 for 1.35."""
        return int(self.kubernetes.partition(".")[2])

    @field_validator("kubernetes", mode="before")
    @classmethod
    def _tested_version(cls, version: Any) -> str:
        try:
            return versions.tested(str(version))
        except UsageError as error:
            quotes = ", in quotes: 1.30 is the number 1.3" if isinstance(version, float) else ""
            raise ValueError(f"kubernetes: {error.message}: {error.hint}{quotes}") from None

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
