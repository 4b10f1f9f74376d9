"""What dashboards and alerts need to know about a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from inferctl.config.spec import Task

# The letters of generated names. Kubernetes leaves out vowels, so `overflow` and `gateway` are none of them.
_GENERATED = "[bcdfghjklmnpqrstvwxz2-9]+"


@dataclass(frozen=True)
class WatchedFlavor:
    """One Deployment of a model.

    `rate`: planned tokens per second of a replica, None if unknown; it is `measured`, or else assumed.

    `overflow`: the Deployment of its placeholders, None if it has none anywhere. Times are in seconds.
    """

    name: str
    cold_start_s: int
    load_s: int
    rate: float | None = None
    measured: bool = False
    overflow: str | None = None


@dataclass(frozen=True)
class Watched:
    """One model in one namespace. `name`: of its Service, which is the label `service` of its series.

    `backlog_s`: seconds of queued work per replica from which replicas are added. `cache`, `shared_cache`, `metering`:
    whether the servers have them. `keda`: whether KEDA scales them.
    """

    name: str
    namespace: str
    task: Task
    flavors: tuple[WatchedFlavor, ...]
    backlog_s: float = 1.0
    cache: bool = False
    shared_cache: bool = False
    metering: bool = False
    keda: bool = True
    gpu: bool = True

    @property
    def series(self) -> str:
        """The labels of the server's series."""
        return f'namespace="{self.namespace}",service="{self.name}"'

    @property
    def deployments(self) -> str:
        """The labels of the Deployments of all flavors, as kube-state-metrics has them."""
        return f'namespace="{self.namespace}",deployment=~"{_any(f.name for f in self.flavors)}"'

    @property
    def autoscalers(self) -> str:
        """The labels of the autoscalers of all flavors. KEDA names those that it makes `keda-hpa-NAME`."""
        names = _any(f.name for f in self.flavors)
        return f'namespace="{self.namespace}",horizontalpodautoscaler=~"(keda-hpa-)?({names})"'

    def pods(self, *flavors: WatchedFlavor) -> str:
        """Return the labels of the pods of some flavors, default all, as kube-state-metrics has them."""
        return f'namespace="{self.namespace}",pod=~"{self.pod_names(*flavors)}"'

    def pod_names(self, *flavors: WatchedFlavor) -> str:
        """Return an expression for the names of the pods, without those of placeholders.

        Kubernetes shortens the second part of a long name, so it may end without the third one.
        """
        return f"({_any(f.name for f in flavors or self.flavors)})-{_GENERATED}(-{_GENERATED})?"


def _any(names: Iterable[str]) -> str:
    return "|".join(names)
