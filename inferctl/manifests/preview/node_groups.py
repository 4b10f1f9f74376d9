"""The short form of a nodes file: groups of equal nodes, written by hand.

nodes:
- name: a100
  count: 4
  cluster: gke-europe-west4
  zones: [europe-west4-a, europe-west4-b]
  labels: {nvidia.com/gpu.product: NVIDIA-A100-SXM4-40GB}
  taints: ["nvidia.com/gpu=present:NoSchedule"]
  allocatable: {cpu: 11, memory: 80Gi, nvidia.com/mig-3g.20gb: 2}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from inferctl.core import validation
from inferctl.core.document import Document
from inferctl.core.errors import SpecError
from inferctl.manifests.kubernetes import fields
from inferctl.manifests.kubernetes.labels import HOSTNAME, REGION, ZONE

EXAMPLE = "save `kubectl get nodes,pods -A -o yaml` as the nodes file, or write it as in docs/deploy-preview.md"
# The kubelet's default.
_PODS = 110
# Of disks, those who write nodes by hand seldom know what is free.
_DISK = "1Ei"
_TAINT = re.compile(r"([^=:\s]+)(?:=([^=:\s]*))?:(NoSchedule|PreferNoSchedule|NoExecute)")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NodeGroup(_Section):
    """Nodes that are equal except for their name and zone."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=200)]
    count: int = Field(1, ge=0, le=1000)
    cluster: str = "cluster"
    region: str | None = None
    zones: list[str] = Field(default_factory=list)
    labels: dict[str, str | bool | int] = Field(default_factory=dict)
    taints: list[str] = Field(default_factory=list)
    allocatable: dict[str, str | int | float] = Field(min_length=1)
    unschedulable: bool = False
    ready: bool = True

    @field_validator("taints")
    @classmethod
    def _known_taints(cls, taints: list[str]) -> list[str]:
        for taint in taints:
            if not _TAINT.fullmatch(taint):
                raise ValueError(f"{taint!r} is not a taint such as nvidia.com/gpu=present:NoSchedule")
        return taints

    @field_validator("allocatable")
    @classmethod
    def _quantities(cls, values: dict[str, str | int | float]) -> dict[str, str | int | float]:
        fields.amounts(values)
        return values


class NodeGroups(_Section):
    """A document of the nodes file in the short form."""

    nodes: list[NodeGroup] = Field(min_length=1, max_length=1000)


def read(document: Document) -> list[tuple[str, dict[str, Any]]]:
    """Return the nodes of a document as Kubernetes objects, each with the name of its cluster. Raises `SpecError`."""
    try:
        groups = NodeGroups.model_validate(document.data).nodes
    except ValidationError as error:
        raise SpecError(document.file, validation.problems(error, document, _keys_at, EXAMPLE), EXAMPLE) from None
    return [(group.cluster, node) for group in groups for node in _nodes(group)]


def _nodes(group: NodeGroup) -> Iterator[dict[str, Any]]:
    taints = [_taint(text) for text in group.taints]
    if not group.ready:
        taints.append({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"})
    if group.unschedulable:
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    for index in range(group.count):
        name = group.name if group.count == 1 else f"{group.name}-{index + 1}"
        labels = {HOSTNAME: name, "kubernetes.io/os": "linux"}
        if group.region:
            labels[REGION] = group.region
        if group.zones:
            # One after the other, as managed node groups fill their zones.
            labels[ZONE] = group.zones[index % len(group.zones)]
        yield {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels | fields.text_map(group.labels)},
            "spec": {"taints": taints, "unschedulable": group.unschedulable},
            "status": {"allocatable": {"pods": _PODS, "ephemeral-storage": _DISK, **group.allocatable}},
        }


def _taint(text: str) -> dict[str, str]:
    match = _TAINT.fullmatch(text)
    assert match is not None
    key, value, effect = match.groups()
    return {"key": key, "effect": effect, **({"value": value} if value else {})}


def _keys_at(location: Sequence[str | int]) -> list[str]:
    return list((NodeGroup if location else NodeGroups).model_fields)
