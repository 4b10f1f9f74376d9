"""What `inferctl deploy` renders: models with their flavors, and the clusters, with every derived number resolved.

`planning.py` makes a `DeploymentPlan` from specs, the clusters file and receipts. The object builders only read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from inferctl.config.spec import Spec, Task
from inferctl.deploy.clusters import Cluster
from inferctl.deploy.figure import Figure
from inferctl.facts.catalog import Hardware
from inferctl.models.fit import Fit

T = TypeVar("T")
# Of a GPU: a pod has all of it, a MIG slice, or takes turns with other pods.
Sharing = Literal["whole", "mig", "time-slicing"]


@dataclass(frozen=True)
class Warned(Generic[T]):
    """A result, and warnings about it."""

    value: T
    warnings: tuple[str, ...] = ()


def object_name(text: str) -> str:
    """Return `text` as a part of a name: lower-case letters, digits and `-`. Empty if it has none of these."""
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Rate:
    """Tokens per second that one replica serves within the SLO. `measured` is False for an assumed rate.

    For generation, tokens of the prompt and of the answer count. `tokens_per_request`, `load_s`, `longest_s` (longest
    response), `memory_bytes` and `cores` of the server and `seal` (its first digits) are from the same receipt; None if
    it does not have them.
    """

    tokens_per_second: float
    measured: bool
    source: str
    tokens_per_request: float | None = None
    load_s: float | None = None
    longest_s: float | None = None
    memory_bytes: int | None = None
    cores: float | None = None
    seal: str | None = None

    @property
    def origin(self) -> str:
        """Where the rate is from, for a comment: `receipt 0123abcd`, or that it is assumed."""
        if self.seal is None:
            return "rate assumed in the spec"
        return f"receipt {self.seal}" if self.measured else f"sample receipt {self.seal}, invented"


@dataclass(frozen=True)
class GpuResource:
    """How a pod gets its GPU in one cluster: an extended resource, and the node labels that it requires.

    `labels`: label -> allowed values, for a required node affinity; without values, the node must not have the label.
    """

    name: str
    count: int
    labels: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Placement:
    """One flavor in one cluster: the limits of its autoscaler and its spare capacity.

    `replicas`: their number if no autoscaler sets it, else None: with `scaling: none`, for a flavor without a rate, and
    0 in a cluster that can have none of this hardware. `at_base` and `at_peak` are None without a rate or traffic.
    `overflow` is None if there is none. `surge`: additional pods of a rollout.
    """

    cluster: str
    resource: GpuResource | None
    min_replicas: Figure
    max_replicas: Figure
    replicas: Figure | None = None
    at_base: Figure | None = None
    at_peak: Figure | None = None
    overflow: Figure | None = None
    surge: int = 0


@dataclass(frozen=True)
class FlavorPlan:
    """One kind of hardware of a model: one Deployment, named `name`, with the label value `label`.

    `resource` is the GPU as the NVIDIA device plugin names it; a `Placement` has that of its cluster. None for a CPU.
    """

    name: str
    label: str
    hardware: Hardware
    precision: str
    image: str
    sharing: Sharing
    shared_by: int
    rate: Rate | None
    fit: Fit
    resource: GpuResource | None
    placements: tuple[Placement, ...]
    load_s: Figure
    cold_start_s: Figure
    startup_period_s: Figure
    startup_failures: Figure
    pre_stop_s: Figure
    drain_s: Figure
    grace_s: Figure
    memory_bytes: Figure
    cpu: Figure
    warnings: tuple[str, ...] = ()

    @property
    def surge(self) -> int:
        """The most additional pods of a rollout in a cluster."""
        return max((each.surge for each in self.placements), default=0)

    def at(self, cluster: Cluster) -> Placement:
        """Return the placement in `cluster`."""
        return next(placement for placement in self.placements if placement.cluster == cluster.name)

    def only_at(self, cluster: Cluster) -> FlavorPlan:
        """Return the flavor with the GPU resource of `cluster`."""
        return replace(self, resource=self.at(cluster).resource)


@dataclass(frozen=True)
class TrafficPlan:
    """The traffic in tokens per second, in all clusters together."""

    base: Figure
    peak: Figure
    slope: Figure
    tokens_per_request: Figure


@dataclass(frozen=True)
class ModelPlan:
    """One server: its flavors in order of preference. `name` is the DNS label of its Service.

    `tasks`: of its models. `key_servers`: servers among which the limit of a key is divided; None without keys and
    limits. `weights_bytes`: size of the weights on disk, 0 if unknown. `warnings`: also those of its flavors.
    """

    spec: Spec
    name: str
    tasks: tuple[Task, ...]
    flavors: tuple[FlavorPlan, ...]
    traffic: TrafficPlan | None
    warnings: tuple[str, ...] = ()
    key_servers: Figure | None = None
    weights_bytes: int = 0

    @property
    def task(self) -> str:
        """The tasks, as one word of a label."""
        return "-".join(self.tasks)


@dataclass(frozen=True)
class DeploymentPlan:
    """All that is rendered. `warnings`: those about a cluster or several models. A `ModelPlan` has its own."""

    namespace: str
    models: tuple[ModelPlan, ...]
    clusters: tuple[Cluster, ...]
    warnings: tuple[str, ...] = ()

    @property
    def all_warnings(self) -> list[str]:
        """The warnings about clusters, and those of the models."""
        return [*self.warnings, *(warning for model in self.models for warning in model.warnings)]
