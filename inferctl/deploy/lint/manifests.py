"""A view of Kubernetes objects for the rules: workloads, their containers and GPUs, and what refers to what.

The rules run on anyone's files, so nothing here assumes that a field has the type that it should have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from inferctl.deploy.manifests_file import FieldPath, Located

# Kind -> path of its pod template.
_TEMPLATES: Mapping[str, FieldPath] = {
    "Pod": (),
    "PodTemplate": ("template",),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    "LeaderWorkerSet": ("spec", "leaderWorkerTemplate", "workerTemplate"),
}
_SCALABLE = ("Deployment", "StatefulSet", "ReplicaSet")
_GPU = re.compile(
    r"(?:nvidia\.com/(?:gpu(?:\.shared)?|mig-.+)|amd\.com/gpu.*|gpu\.intel\.com/.+|habana\.ai/.+"
    r"|aws\.amazon\.com/neuron.*|google\.com/tpu)$"
)
_PAUSE = re.compile(r"(?:^|/)pause(?:-[a-z0-9]+)?(?::|@|$)")
_SERVERS = re.compile(
    r"vllm|text-generation-inference|text-generation-launcher|text-embeddings-inference|tritonserver|triton-inference"
    r"|sglang|llama-server|llama\.cpp|ollama|lmdeploy|tensorrt|inferctl|infinity-emb|torchserve|openai/v1",
    re.IGNORECASE,
)
_QUANTITY = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d+))?$")
_FACTORS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18} | {
    f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)
}


def get(value: Any, *path: str | int) -> Any:
    """Return the value at `path`; None if it is absent or something else is in the way."""
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and -len(value) <= part < len(value):
            value = value[part]
        else:
            return None
    return value


def mapping(value: Any, *path: str | int) -> dict[str, Any]:
    """Return the mapping at `path`; an empty one if there is none."""
    found = get(value, *path)
    return found if isinstance(found, dict) else {}


def sequence(value: Any, *path: str | int) -> list[Any]:
    """Return the list at `path`; an empty one if there is none."""
    found = get(value, *path)
    return found if isinstance(found, list) else []


def text(value: Any, *path: str | int) -> str:
    """Return the text at `path`; "" if there is none."""
    found = get(value, *path)
    return found if isinstance(found, str) else ""


def integer(value: Any, *path: str | int) -> int | None:
    """Return the integer at `path`; None if there is none."""
    found = get(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def quantity(value: Any) -> float | None:
    """Return a Kubernetes quantity such as `500m` or `16Gi` as a number; None if it is not one."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    found = _QUANTITY.match(value) if isinstance(value, str) else None
    if not found:
        return None
    number = float(found[1]) * (-1 if value.startswith("-") else 1)
    return number * (_FACTORS.get(found[2] or "", 1.0) if not found[3] else 10.0 ** min(int(found[3]), 30))


def selects(selector: Any, labels: Mapping[str, Any]) -> bool:
    """Return whether a label selector (matchLabels, matchExpressions) selects `labels`. An empty one selects all."""
    if any(labels.get(key) != value for key, value in mapping(selector, "matchLabels").items()):
        return False
    for each in sequence(selector, "matchExpressions"):
        key, values, operator = text(each, "key"), sequence(each, "values"), get(each, "operator")
        present, value = key in labels, labels.get(key)
        ok = {
            "In": present and value in values,
            "NotIn": not present or value not in values,
            "Exists": present,
            "DoesNotExist": not present,
        }
        if not (isinstance(operator, str) and ok.get(operator, False)):
            return False
    return True


def same_namespace(a: Located, b: Located) -> bool:
    """Return whether two objects can be in one namespace. An object without one gets that of kubectl or kustomize."""
    return not a.namespace or not b.namespace or a.namespace == b.namespace


@dataclass(frozen=True, eq=False)
class Container:
    """One container of a workload, and its path in the object."""

    workload: Workload
    path: FieldPath
    data: Any

    @property
    def name(self) -> str:
        return text(self.data, "name")

    @property
    def image(self) -> str:
        return text(self.data, "image")

    @property
    def words(self) -> list[str]:
        """Command and arguments, split at spaces where one is a line of shell."""
        words = [str(word) for key in ("command", "args") for word in sequence(self.data, key)]
        return [part for word in words for part in word.split()]

    @property
    def gpus(self) -> dict[str, int]:
        """GPUs by resource name, from the limits, else the requests."""
        found: dict[str, int] = {}
        for key in ("requests", "limits"):
            for name, value in mapping(self.data, "resources", key).items():
                if isinstance(name, str) and _GPU.match(name) and (number := quantity(value)):
                    found[name] = int(number)
        return found


@dataclass(frozen=True, eq=False)
class Workload:
    """An object with a pod template. `path`: of the template in the object."""

    object: Located
    path: FieldPath

    @property
    def template(self) -> dict[str, Any]:
        return mapping(self.object.data, *self.path)

    @property
    def spec_path(self) -> FieldPath:
        return (*self.path, "spec")

    @property
    def spec(self) -> dict[str, Any]:
        return mapping(self.template, "spec")

    @property
    def labels(self) -> dict[str, Any]:
        return mapping(self.template, "metadata", "labels")

    @property
    def containers(self) -> list[Container]:
        """The containers that run all the time: also init containers with `restartPolicy: Always`."""
        return [each for each in self.all_containers if each.path[-2] == "containers" or _is_sidecar(each.data)]

    @property
    def all_containers(self) -> list[Container]:
        return [
            Container(self, (*self.spec_path, key, index), data)
            for key in ("initContainers", "containers")
            for index, data in enumerate(sequence(self.spec, key))
        ]

    @property
    def gpus(self) -> dict[str, int]:
        """GPUs of one pod by resource name."""
        total: dict[str, int] = {}
        for container in self.containers:
            for name, count in container.gpus.items():
                total[name] = total.get(name, 0) + count
        return total

    def request(self, name: str) -> float:
        """Return how much of a resource all containers request; a limit without a request is the request."""
        found = 0.0
        for container in self.containers:
            requested = get(container.data, "resources", "requests", name)
            limit = get(container.data, "resources", "limits", name)
            found += quantity(limit if requested is None else requested) or 0.0
        return found

    @property
    def is_placeholder(self) -> bool:
        """Whether all containers are pause containers: the pod only holds a place."""
        return bool(self.containers) and all(_PAUSE.search(each.image) for each in self.containers)

    @property
    def is_model_server(self) -> bool:
        """Whether the pods stay and serve: they have a GPU or a claim, or the name of a known model server."""
        if self.is_placeholder or self.object.kind in ("Job", "CronJob", "DaemonSet", "PodTemplate"):
            return False
        return bool(self.gpus or self.spec.get("resourceClaims")) or any(
            _SERVERS.search(" ".join([each.image, *each.words])) for each in self.containers
        )

    @property
    def node_labels(self) -> dict[str, set[str]]:
        """Node labels that a pod requires: its nodeSelector and the `In` of its required node affinity.

        The terms of an affinity are alternatives: a key counts only if each of them has it.
        """
        found = {key: {str(value)} for key, value in mapping(self.spec, "nodeSelector").items()}
        terms = [
            {
                text(each, "key"): {str(value) for value in sequence(each, "values")}
                for each in sequence(term, "matchExpressions")
                if get(each, "operator") == "In"
            }
            for term in self.affinity_terms
        ]
        for key in set.intersection(*(set(term) for term in terms)) if terms else ():
            found.setdefault(key, set().union(*(term[key] for term in terms)))
        return found

    @property
    def affinity_terms(self) -> list[Any]:
        return sequence(
            self.spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms"
        )

    def runs_on(self, labels: Mapping[str, Any]) -> bool:
        """Return whether nodeSelector and required node affinity allow a node with `labels`."""
        if any(str(labels.get(key)) != str(value) for key, value in mapping(self.spec, "nodeSelector").items()):
            return False
        return not self.affinity_terms or any(selects(term, labels) for term in self.affinity_terms)

    def tolerates(self, taint: Any) -> bool:
        """Return whether the pod tolerates a taint of a node."""
        return any(
            get(each, "effect") in (None, "", get(taint, "effect"))
            and (
                (get(each, "operator") == "Exists" and get(each, "key") in (None, "", get(taint, "key")))
                or (
                    get(each, "operator") in (None, "", "Equal")
                    and get(each, "key") == get(taint, "key")
                    and (get(each, "value") or "") == (get(taint, "value") or "")
                )
            )
            for each in sequence(self.spec, "tolerations")
        )


def _is_sidecar(container: Any) -> bool:
    return bool(get(container, "restartPolicy") == "Always")


class Manifests:
    """All objects of one lint run."""

    def __init__(self, objects: Sequence[Located]) -> None:
        self.objects = list(objects)

    def of(self, *kinds: str) -> list[Located]:
        """Return the objects of these kinds."""
        return [each for each in self.objects if each.kind in kinds]

    @cached_property
    def workloads(self) -> list[Workload]:
        """All objects with a pod template."""
        return [Workload(each, _TEMPLATES[each.kind]) for each in self.objects if each.kind in _TEMPLATES]

    @cached_property
    def model_servers(self) -> list[Workload]:
        return [each for each in self.workloads if each.is_model_server]

    @cached_property
    def placeholders(self) -> list[Workload]:
        return [each for each in self.workloads if each.is_placeholder]

    @cached_property
    def autoscalers(self) -> list[Located]:
        return self.of("HorizontalPodAutoscaler", "ScaledObject")

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], list[Workload]]:
        found: dict[tuple[str, str], list[Workload]] = {}
        for each in self.workloads:
            found.setdefault((each.object.kind, each.object.name), []).append(each)
        return found

    @cached_property
    def _autoscalers(self) -> dict[Workload, list[Located]]:
        found: dict[Workload, list[Located]] = {}
        for each in self.autoscalers:
            if (workload := self.target(each)) is not None:
                found.setdefault(workload, []).append(each)
        return found

    def autoscalers_of(self, workload: Workload) -> list[Located]:
        """Return the HPAs and ScaledObjects whose target is `workload`."""
        return self._autoscalers.get(workload, [])

    def named(self, by: Located, kind: str, name: object) -> Workload | None:
        """Return the workload of this kind and name in the namespace of `by`; None if it is not among the objects."""
        return next((w for w in self._by_name.get((kind, str(name)), ()) if same_namespace(w.object, by)), None)

    def target(self, autoscaler: Located) -> Workload | None:
        """Return the workload that an HPA or a ScaledObject scales; None if it is not among the objects."""
        reference = mapping(autoscaler.data, "spec", "scaleTargetRef")
        return self.named(autoscaler, text(reference, "kind") or "Deployment", reference.get("name"))

    def replicas(self, workload: Workload) -> tuple[int, int]:
        """Return the lowest and the highest number of pods, by autoscaler or `replicas`. At least 1 at most."""
        lows, highs = [], []
        for each in self.autoscalers_of(workload):
            keda = each.kind == "ScaledObject"
            low = integer(each.data, "spec", "minReplicaCount" if keda else "minReplicas")
            high = integer(each.data, "spec", "maxReplicaCount" if keda else "maxReplicas")
            lows.append(low if low is not None else 0 if keda else 1)
            highs.append(high if high is not None else 100 if keda else 1)
        if not highs:
            key = "parallelism" if workload.object.kind == "Job" else "replicas"
            count = integer(workload.object.data, "spec", key)
            lows = highs = [1 if count is None else count]
        return min(lows), max(highs)

    def surge(self, workload: Workload) -> int:
        """Return how many more pods than its replicas a rollout of `workload` may start."""
        if workload.object.kind != "Deployment":
            return 0
        strategy = mapping(workload.object.data, "spec", "strategy")
        if strategy.get("type") == "Recreate":
            return 0
        value = get(strategy, "rollingUpdate", "maxSurge")
        if isinstance(value, int):
            return value
        share = re.match(r"(\d{1,4})%$", value) if isinstance(value, str) else None
        percent = int(share[1]) if share else 25
        return -(-self.replicas(workload)[1] * percent // 100)

    def selected(self, by: Located, selector: Any) -> Iterator[Workload]:
        """Yield the workloads in the namespace of `by` whose pods a label selector selects."""
        for each in self.workloads:
            if same_namespace(by, each.object) and selects(selector, each.labels):
                yield each

    def behind(self, service: Located) -> list[Workload]:
        """Return the workloads that a Service selects. A Service without a selector selects none."""
        return self._behind.get(id(service), [])

    @cached_property
    def _behind(self) -> dict[int, list[Workload]]:
        found = {}
        for service in self.of("Service"):
            if labels := mapping(service.data, "spec", "selector"):
                found[id(service)] = list(self.selected(service, {"matchLabels": labels}))
        return found
