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
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from inferctl.deploy.preview import fields
from inferctl.deploy.preview.cluster import HOSTNAME, REGION, ZONE
from inferctl.document import Document, dotted
from inferctl.errors import Problem, SpecError, did_you_mean

EXAMPLE = "save `kubectl get nodes,pods -A -o yaml` as the nodes file, or write it as in docs/deploy-preview.md"
# The kubelet's default.
_PODS = 110
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
        problems = [_problem(dict(each), document) for each in error.errors()]
        raise SpecError(document.file, sorted(problems, key=lambda problem: problem.line or 0)) from None
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
            "status": {"allocatable": {"pods": _PODS, **group.allocatable}},
        }


def _taint(text: str) -> dict[str, str]:
    match = _TAINT.fullmatch(text)
    assert match is not None
    key, value, effect = match.groups()
    return {"key": key, "effect": effect, **({"value": value} if value else {})}


def _problem(error: dict[str, Any], document: Document) -> Problem:
    location = list(error["loc"])
    path, line = dotted(location), document.line(location)
    if error["type"] == "extra_forbidden":
        known = list((NodeGroup if len(location) > 1 else NodeGroups).model_fields)
        hint = did_you_mean(str(location[-1]), known) or f"known: {', '.join(known)}"
        return Problem(path, f"unknown key {str(location[-1])!r}", line, hint)
    if error["type"] == "missing":
        return Problem(path, f"{path} is missing", document.line(location[:-1]), EXAMPLE)
    if error["type"] == "value_error":
        return Problem(path, str(error["msg"]).removeprefix("Value error, "), line, EXAMPLE)
    message = re.sub("^(Input|String|List|Value|Dictionary) should", "must", str(error["msg"]))
    return Problem(path, f"{path}: {message}, got {error.get('input')!r}", line, EXAMPLE)
