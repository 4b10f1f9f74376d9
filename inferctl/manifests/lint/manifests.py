"""A view of Kubernetes objects for the rules: workloads, their containers and GPUs, and what refers to what."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from inferctl.manifests.kubernetes import fields, selectors
from inferctl.manifests.kubernetes.fields import as_float, get, integer, mapping, sequence, text
from inferctl.manifests.label_keys import TASK
from inferctl.manifests.lint import pod_templates
from inferctl.manifests.manifests_file import FieldPath, Located
from inferctl.manifests.versions import OLDEST_SUPPORTED

_GPU = re.compile(
    r"(?:nvidia\.com/(?:gpu(?:\.shared)?|mig-.+)|amd\.com/gpu.*|gpu\.intel\.com/.+|habana\.ai/.+"
    r"|aws\.amazon\.com/neuron.*|google\.com/tpu)$"
)
# An option other than those of Python and shells that a program follows, such as -m, -u and -c.
_TAKES_VALUE = re.compile(r"--?\w[^=]+$|-[^-muceils]$")
# What Kubernetes replaces in a command, $(NAME), and what a shell does, $NAME and ${NAME}.
_REFERENCE = re.compile(r"(?<!\$)\$(?:\(([\w.-]+)\)|\{(\w+)\}|(\w+))")
# Longer values in a file of bad intent could make gigabytes of words.
_LONGEST_VALUE = 1000
_SERVERS = re.compile(
    r"vllm|text-generation-inference|text-generation-launcher|text-embeddings-inference|tritonserver|triton-inference"
    r"|sglang|llama-server|llama\.cpp|ollama|lmdeploy|tensorrt|inferctl|infinity-emb|torchserve|openai/v1",
    re.IGNORECASE,
)


def is_gpu(resource: object) -> bool:
    """Return whether a resource is a GPU, a share of one or another accelerator."""
    return isinstance(resource, str) and _GPU.match(resource) is not None


def same_namespace(a: Located, b: Located) -> bool:
    """Return whether two objects can be in one namespace. An object without one gets that of kubectl."""
    return not a.namespace or not b.namespace or a.namespace == b.namespace


@dataclass(frozen=True, eq=False)
class ManifestContainer:
    """One container of a workload, and its path in the object."""

    workload: ManifestWorkload
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
    def variables(self) -> dict[str, str]:
        """Environment variables that have their value in the manifest."""
        return {text(each, "name"): text(each, "value") for each in sequence(self.data, "env") if text(each, "value")}

    @property
    def expanded(self) -> list[str]:
        """The words, with the values of `variables` in the place of their names."""
        values = {name: value for name, value in self.variables.items() if len(value) <= _LONGEST_VALUE}
        line = " ".join(self.words)
        return _REFERENCE.sub(lambda found: values.get(found[found.lastindex or 0], found[0]), line).split()

    @property
    def programs(self) -> list[str]:
        """The words that may be a program: no options with their values, and no addresses, which clients have too."""
        words = self.expanded
        before = ["", *words]
        return [
            word
            for index, word in enumerate(words)
            if not word.startswith("-") and "://" not in word and not _TAKES_VALUE.match(before[index])
        ]

    @property
    def port_names(self) -> list[str]:
        """The names of its ports; "" for a port without one."""
        return [text(each, "name") for each in sequence(self.data, "ports")]

    @property
    def gpus(self) -> dict[str, int]:
        """GPUs by resource name, from the limits, else the requests."""
        found: dict[str, int] = {}
        for key in ("requests", "limits"):
            for name, value in mapping(self.data, "resources", key).items():
                if is_gpu(name) and (number := as_float(value)):
                    found[name] = math.ceil(number)
        return found


@dataclass(frozen=True, eq=False)
class ManifestWorkload:
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

    @cached_property
    def labels(self) -> dict[str, str]:
        return fields.text_map(mapping(self.template, "metadata", "labels"))

    @property
    def group_size(self) -> int:
        """How many pods serve one copy of a model: more than one in a LeaderWorkerSet."""
        return max(1, integer(self.object.data, "spec", "leaderWorkerTemplate", "size") or 1)

    @property
    def pods_per_replica(self) -> int:
        """How many pods of this template a replica has."""
        if self.path == pod_templates.LEADER:
            return 1
        return self.group_size - (1 if get(self.object.data, *pod_templates.LEADER) and self.group_size > 1 else 0)

    @property
    def containers(self) -> list[ManifestContainer]:
        """The containers that run all the time: also init containers with `restartPolicy: Always`."""
        return [each for each in self.all_containers if each.path[-2] == "containers" or fields.is_sidecar(each.data)]

    @property
    def port_names(self) -> set[str] | None:
        """The names of all ports; None if they are not known, because the operator of Ray adds ports to its pods."""
        ray = self.object.kind.startswith("Ray")
        return None if ray else {name for each in self.containers for name in each.port_names if name}

    @property
    def all_containers(self) -> list[ManifestContainer]:
        return [
            ManifestContainer(self, (*self.spec_path, key, index), data)
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
            found += as_float(limit if requested is None else requested) or 0.0
        return found

    @property
    def image_volumes(self) -> list[tuple[FieldPath, Any]]:
        """The volumes of its pods that are images, each with its path in the object."""
        volumes = enumerate(sequence(self.spec, "volumes"))
        return [
            ((*self.spec_path, "volumes", index, "image"), each["image"])
            for index, each in volumes
            if isinstance(each, dict) and "image" in each
        ]

    @property
    def is_placeholder(self) -> bool:
        """Whether all containers are pause containers: the pod only holds a place."""
        return bool(self.containers) and all(fields.is_pause(each.image) for each in self.containers)

    @property
    def is_model_server(self) -> bool:
        """Whether the pods stay and serve: a GPU, a claim, our label of the task, or the name of a known server."""
        ends = self.spec.get("restartPolicy") in ("Never", "OnFailure")
        if ends or self.is_placeholder or self.object.kind in ("Job", "CronJob", "DaemonSet", "PodTemplate"):
            return False
        return bool(self.gpus or self.spec.get("resourceClaims") or TASK in self.labels) or any(
            _SERVERS.search(" ".join([each.image, *each.programs])) for each in self.containers
        )

    @property
    def node_labels(self) -> dict[str, set[str]]:
        """Node labels that a pod requires: its nodeSelector and the `In` of its required node affinity.

        The terms of an affinity are alternatives: a key counts only if each of them has it.
        """
        found = {key: {str(value)} for key, value in mapping(self.spec, "nodeSelector").items()}
        required = get(self.spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
        terms = [
            {
                text(each, "key"): {str(value) for value in sequence(each, "values")}
                for each in sequence(term, "matchExpressions")
                if get(each, "operator") == "In"
            }
            for term in sequence(required, "nodeSelectorTerms")
        ]
        for key in set.intersection(*(set(term) for term in terms)) if terms else ():
            found.setdefault(key, set().union(*(term[key] for term in terms)))
        return found


class Manifests:
    """All objects of one lint run. `minor`: the version of Kubernetes is 1.`minor`."""

    def __init__(self, objects: Sequence[Located], minor: int = OLDEST_SUPPORTED) -> None:
        self.objects, self.minor = list(objects), minor

    def of(self, *kinds: str) -> list[Located]:
        """Return the objects of these kinds."""
        return [each for each in self.objects if each.kind in kinds]

    @cached_property
    def workloads(self) -> list[ManifestWorkload]:
        """All pod templates of the objects. The leader of a group, such as that of Ray, has one of its own."""
        return [ManifestWorkload(each, path) for each in self.objects for path in pod_templates.paths(each)]

    @cached_property
    def model_servers(self) -> list[ManifestWorkload]:
        return [each for each in self.workloads if each.is_model_server]

    @cached_property
    def placeholders(self) -> list[ManifestWorkload]:
        return [each for each in self.workloads if each.is_placeholder]

    @cached_property
    def autoscalers(self) -> list[Located]:
        return self.of("HorizontalPodAutoscaler", "ScaledObject")

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], list[ManifestWorkload]]:
        found: dict[tuple[str, str], list[ManifestWorkload]] = {}
        for each in self.workloads:
            found.setdefault((each.object.kind, each.object.name), []).append(each)
        return found

    @cached_property
    def _autoscalers(self) -> dict[ManifestWorkload, list[Located]]:
        found: dict[ManifestWorkload, list[Located]] = {}
        for each in self.autoscalers:
            if (workload := self.target(each)) is not None:
                found.setdefault(workload, []).append(each)
        return found

    def autoscalers_of(self, workload: ManifestWorkload) -> list[Located]:
        """Return the HPAs and ScaledObjects whose target is `workload`."""
        return self._autoscalers.get(workload, [])

    def named(self, by: Located, kind: str, name: object) -> ManifestWorkload | None:
        """Return the workload of this kind and name in the namespace of `by`; None if it is not among the objects."""
        return next((w for w in self._by_name.get((kind, str(name)), ()) if same_namespace(w.object, by)), None)

    def target(self, autoscaler: Located) -> ManifestWorkload | None:
        """Return the workload that an HPA or a ScaledObject scales; None if it is not among the objects."""
        reference = mapping(autoscaler.data, "spec", "scaleTargetRef")
        return self.named(autoscaler, text(reference, "kind") or "Deployment", reference.get("name"))

    def buffer_target(self, buffer: Located) -> ManifestWorkload | None:
        """Return the workload or pod template that a CapacityBuffer keeps room for; None if it is not here."""
        for key, kind in (("scalableRef", ""), ("podTemplateRef", "PodTemplate")):
            reference = mapping(buffer.data, "spec", key)
            if reference and (found := self.named(buffer, kind or text(reference, "kind"), reference.get("name"))):
                return found
        return None

    def replicas(self, workload: ManifestWorkload) -> tuple[int, int]:
        """Return the lowest and the highest number of pods, by its autoscalers, else by `replicas`."""
        if "workerGroupSpecs" in workload.path:
            group = get(workload.object.data, *workload.path[:-1])
            numbers = [integer(group, key) or 1 for key in ("minReplicas", "replicas", "maxReplicas")]
            return numbers[0], max(numbers)
        found = [fields.replica_limits(each.data) for each in self.autoscalers_of(workload)]
        limits = [each for each in found if each is not None]
        if not limits:
            key = "parallelism" if workload.object.kind == "Job" else "replicas"
            count = integer(workload.object.data, "spec", key, default=1)
            limits = [(count, count)]
        size = workload.pods_per_replica
        return min(least for least, _ in limits) * size, max(most for _, most in limits) * size

    def surge(self, workload: ManifestWorkload) -> int:
        """Return how many more pods than its replicas a rollout of `workload` may start."""
        if workload.object.kind != "Deployment":
            return 0
        strategy = mapping(workload.object.data, "spec", "strategy")
        if strategy.get("type") == "Recreate":
            return 0
        most = self.replicas(workload)[1]
        surge = fields.count_of(get(strategy, "rollingUpdate", "maxSurge"), most)
        return -(-most * 25 // 100) if surge is None else surge

    def selected(self, by: Located, selector: Any) -> Iterator[ManifestWorkload]:
        """Yield the workloads in the namespace of `by` whose templates a label selector selects: none without one."""
        for each in self.workloads:
            if same_namespace(by, each.object) and selectors.matches(selector, each.labels):
                yield each

    def behind(self, service: Located) -> list[ManifestWorkload]:
        """Return the workloads that a Service selects. A Service without a selector selects none."""
        return self._behind.get(id(service), [])

    @cached_property
    def _behind(self) -> dict[int, list[ManifestWorkload]]:
        found = {}
        for service in self.of("Service"):
            if labels := mapping(service.data, "spec", "selector"):
                found[id(service)] = list(self.selected(service, {"matchLabels": labels}))
        return found
