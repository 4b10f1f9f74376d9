"""What dashboards and alerts need to know about a model, and how their templates are filled with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from inferctl.config.spec import Task
from inferctl.core import assets, document

# The letters of generated names. Kubernetes leaves out vowels, so `overflow` and `gateway` are none of them.
_GENERATED = "[bcdfghjklmnpqrstvwxz2-9]+"
_NOT_READY_S = 300


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

    `cache`, `metering`: whether the servers have them. `keda`: whether KEDA scales them.
    """

    name: str
    namespace: str
    task: Task
    flavors: tuple[WatchedFlavor, ...]
    cache: bool = False
    metering: bool = False
    keda: bool = True
    gpu: bool = True

    def features(self, flavor: WatchedFlavor | None = None) -> set[str | None]:
        """Return what the model, or a flavor of it, has of what `only` names in the templates, and None."""
        found = {
            "generate": self.task == "generate",
            "encoder": self.task != "generate",
            "cache": self.cache,
            "metering": self.metering,
            "keda": self.keda,
            "gpu": self.gpu,
            "planned": all(each.rate for each in self.flavors),
            "overflow": flavor is not None and flavor.overflow is not None,
        }
        return {None, *(name for name, has in found.items() if has)}

    def values(self, flavor: WatchedFlavor | None = None) -> dict[str, str]:
        """Return the text for each <name> in the templates: labels of series and numbers."""
        space, names = f'namespace="{self.namespace}"', "|".join(each.name for each in self.flavors)
        found = {
            "namespace": self.namespace,
            "flavors": names,
            "series": f'{space},service="{self.name}"',
            "deployments": f'{space},deployment=~"{names}"',
            # KEDA names the autoscalers that it makes `keda-hpa-NAME`.
            "autoscalers": f'{space},horizontalpodautoscaler=~"(keda-hpa-)?({names})"',
            "pods": f'{space},pod=~"{self.pod_names()}"',
            "pod_names": self.pod_names(),
            "planned": " + ".join(
                f'(sum(kube_deployment_status_replicas_available{{{space},deployment="{each.name}"}}) or vector(0))'
                f" * {each.rate or 0:.10g}"
                for each in self.flavors
            ),
            "planned_source": "receipts" if all(each.measured for each in self.flavors) else "partly assumed",
        }
        if flavor:
            found |= {
                "flavor": flavor.name,
                "flavor_pods": f'{space},pod=~"{self.pod_names(flavor)}"',
                "overflow": flavor.overflow or "",
                "cold_start_s": str(flavor.cold_start_s),
                "not_ready_s": str(max(_NOT_READY_S, 2 * flavor.load_s)),
            }
        return found

    def pod_names(self, *flavors: WatchedFlavor) -> str:
        """Return an expression for the names of the pods, without those of placeholders.

        Kubernetes shortens the second part of a long name, so it may end without the third one.
        """
        return f"({'|'.join(each.name for each in flavors or self.flavors)})-{_GENERATED}(-{_GENERATED})?"


@cache
def template(name: str) -> Any:
    """Return the data of a YAML file in this folder."""
    return document.read(assets.package() / "deploy" / "observe" / name, "install inferctl again").data


def filled(value: Any, values: Mapping[str, str]) -> Any:
    """Return a copy of `value` with each <name> in its texts replaced. Raises `KeyError` for an unknown name."""
    if isinstance(value, dict):
        return {filled(key, values): filled(each, values) for key, each in value.items()}
    return re.sub("<([a-z_]+)>", lambda name: values[name[1]], value) if isinstance(value, str) else value
